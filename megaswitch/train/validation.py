"""Loss on held-out text, and the baseline that shows whether anything was learned.

`Validation` serves the training loop; `measure`, below it, runs over several corpora at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.config import ModelConfig, RunConfig
from megaswitch.data.indexed import TokenizerInfo
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.span_corruption import EOS_ID, Seq2SeqBatch
from megaswitch.layers.vocab import token_losses
from megaswitch.model.switch_transformer import SwitchOutput, SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.memory import enough_memory
from megaswitch.train.metrics import LayerLoad, LossMeter, RouterMeter, router_metrics
from megaswitch.train.objectives import forward

# Batches per rank between two looks at the other ranks: a failure is known to all that soon.
_ROUND = 16


@dataclass(frozen=True)
class Figures:
    """What was measured on some samples.

    Attributes:
        samples: sequences.
        target_tokens: sentinels and EOS included.
        content_tokens: masked tokens of text, the rest of the targets.
        metrics: `loss` (nats per target), `perplexity`, `accuracy` and `aux_loss` over all
            targets; `content_loss`, `content_perplexity` and `content_accuracy` over the targets
            that are text; `content_unigram_entropy`, the least loss on those same targets of a
            model that knows only how frequent each is.
        router: of each Switch layer by name.
    """

    samples: int
    target_tokens: int
    content_tokens: int
    metrics: dict[str, float]
    router: dict[str, LayerLoad]


class Validation:
    """The first samples of a held-out corpus, and a model run over them.

    Args:
        loader: unshuffled.
        samples: how many sequences; all that there are, if fewer or if None.
        micro_batch_size: sequences per forward; whole routing groups.
    """

    def __init__(
        self, loader: SpanCorruptionLoader, *, samples: int | None, micro_batch_size: int
    ) -> None:
        self.loader = loader
        most = loader.samples_per_epoch
        self.samples = most if samples is None else min(samples, most)
        self.micro_batch_size = micro_batch_size

    def run(self, model: SwitchTransformer, mesh: Mesh, precision: torch.dtype) -> dict[str, float]:
        """Evaluate, spread over the ranks.

        Returns:
            `Figures.metrics` and `router_metrics`.
        """
        (figures,) = measure(model, [self], mesh, precision)
        return figures.metrics | router_metrics(figures.router)

    def batches(self) -> Iterator[range]:
        """Sample indices of each forward pass."""
        for start in range(0, self.samples, self.micro_batch_size):
            yield range(start, min(start + self.micro_batch_size, self.samples))

    def is_text(self, batch: Seq2SeqBatch) -> Tensor:
        """[B, Ld] bool, True on targets that are neither sentinel nor EOS nor padding."""
        targets = batch.decoder_targets
        loader = self.loader
        text = (targets != EOS_ID) & (targets < loader.sentinel_top - loader.num_sentinels)
        return batch.decoder_mask & text


class _Tally:
    """Sums over the samples of one source on this rank."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.losses, self.content = LossMeter(device), LossMeter(device)
        self.router = RouterMeter(config, device)
        self.counts = torch.zeros(config.vocab_size, dtype=torch.float64, device=device)

    def add(
        self,
        output: SwitchOutput,
        batch: Seq2SeqBatch,
        content: Tensor,
        masks: dict[str, Tensor | None],
    ) -> None:
        """Count a batch, `content` [B, Ld] of whose targets are text."""
        targets = batch.decoder_targets
        self.losses.add(token_losses(output.logits, targets, batch.decoder_mask), output)
        self.content.add(token_losses(output.logits, targets, content), output)
        self.counts.scatter_add_(0, targets.flatten(), content.flatten().double())
        self.router.add(output.routing, masks)

    def merge(self, other: _Tally) -> None:
        """Add the sums of `other`, which keeps them."""
        self.losses.sums += other.losses.sums
        self.content.sums += other.content.sums
        self.counts += other.counts
        for name, sums in other.router.layers.items():
            self.router.layers[name] += sums

    def figures(self, mesh: Mesh) -> Figures:
        """Figures over all ranks; the sums are used up."""
        everything, content = self.losses.totals(mesh), self.content.totals(mesh)
        text = content.metrics()
        metrics = everything.metrics()
        metrics |= {f"content_{k}": text[k] for k in ("loss", "perplexity", "accuracy")}
        metrics["content_unigram_entropy"] = _entropy(mesh.sum_(self.counts))
        return Figures(
            samples=int(everything.rows),
            target_tokens=int(everything.tokens),
            content_tokens=int(content.tokens),
            metrics=metrics,
            router=self.router.loads(mesh),
        )


def measure(
    model: SwitchTransformer,
    sources: Sequence[Validation],
    mesh: Mesh,
    precision: torch.dtype,
    *,
    total: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Figures]:
    """Run `model`, in evaluation mode, over all sources.

    The batches of all sources are dealt out to the ranks in turn; each is the same batch whatever
    the number of ranks.

    Args:
        model: left in the mode that it was in.
        sources: at least one.
        mesh: the ranks.
        precision: of the forward pass.
        total: append the figures of all sources together.
        advance: called with the number of samples of each batch that this rank has done.

    Raises:
        UserError: on every rank, if one cannot read its data or is out of memory.
    """
    tallies = [_Tally(model.config, mesh.device) for _ in sources]
    work = ((index, rows) for index, s in enumerate(sources) for rows in s.batches())
    mine = islice(work, mesh.rank, None, mesh.size)
    batches = sum(-(-s.samples // s.micro_batch_size) for s in sources)
    training = model.training
    model.eval()
    try:
        for _ in range(0, batches, _ROUND * mesh.size):
            with mesh.together():
                for index, rows in islice(mine, _ROUND):
                    _add(tallies[index], sources[index], rows, model, mesh.device, precision)
                    advance(len(rows))
    finally:
        model.train(training)
    if total:
        tallies.append(_Tally(model.config, mesh.device))
        for tally in tallies[:-1]:
            tallies[-1].merge(tally)
    return [tally.figures(mesh) for tally in tallies]


@torch.no_grad()
def _add(
    tally: _Tally,
    source: Validation,
    rows: range,
    model: SwitchTransformer,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    with enough_memory(f"{len(rows)} samples are too many for {device}; use a smaller batch"):
        output, batch, masks = forward(model, source.loader.batch(rows), device, precision)
        tally.add(output, batch, source.is_text(batch), masks)


def _entropy(counts: Tensor) -> float:
    """Entropy, in nats, of the distribution with these counts."""
    total = counts.sum().item()
    if total == 0:
        return 0.0
    present = counts[counts > 0]
    return math.log(total) - (present * present.log()).sum().item() / total


def open_corpus(
    config: RunConfig, prefix: str | Path, tokenizer: TokenizerInfo | None, *, shuffle: bool
) -> SpanCorruptionLoader:
    """The corpus at `prefix` as samples of `config`'s lengths, corruption and seed."""
    return SpanCorruptionLoader(
        prefix,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        encoder_length=config.data.encoder_length,
        decoder_length=config.data.decoder_length,
        noise_density=config.data.noise_density,
        mean_span_length=config.data.mean_span_length,
        shuffle=shuffle,
        tokenizer=tokenizer,
    )
