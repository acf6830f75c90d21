"""Loss on held-out text, and the baseline that shows whether anything was learned.

`Validation` serves the training loop; `measure`, below it, runs over several corpora at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.config import ModelConfig, RunConfig
from megaswitch.data.document_loader import DocumentLoader
from megaswitch.data.indexed import TokenizerInfo
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.samples import Corpus
from megaswitch.data.span_corruption import EOS_ID, Seq2SeqBatch
from megaswitch.layers.vocab import TokenLosses, token_losses
from megaswitch.model.switch_transformer import SwitchOutput
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.tensor_parallel import TensorParallel
from megaswitch.train.memory import enough_memory
from megaswitch.train.metrics import LayerLoad, LossMeter, RouterMeter, router_metrics
from megaswitch.train.objectives import MicroBatch
from megaswitch.train.runner import Runner

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
        name: of the corpus among several.
    """

    def __init__(
        self,
        loader: Corpus,
        *,
        samples: int | None,
        micro_batch_size: int,
        name: str = "",
    ) -> None:
        self.name = name
        self.loader = loader
        most = loader.samples_per_epoch
        self.samples = most if samples is None else min(samples, most)
        self.micro_batch_size = micro_batch_size

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


def validate(runner: Runner, sources: Sequence[Validation]) -> dict[str, float]:
    """Evaluate on all sources, spread over the ranks.

    Returns:
        `Figures.metrics` and `router_metrics` of all samples together; those of a source that has a
        name have it appended: `loss/name`.
    """
    figures = measure(runner, sources, total=len(sources) > 1)
    metrics = figures[-1].metrics | router_metrics(figures[-1].router)
    for source, one in zip(sources, figures, strict=False):
        if source.name:
            metrics |= {f"{key}/{source.name}": value for key, value in one.metrics.items()}
    return metrics


class _Tally:
    """Sums over the samples of one source on this rank."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.losses, self.content = LossMeter(device), LossMeter(device)
        self.router = RouterMeter(config, device)
        self.counts = torch.zeros(config.vocab_size, dtype=torch.float64, device=device)

    def add(
        self, output: SwitchOutput, micro: MicroBatch, content: Tensor, tp: TensorParallel
    ) -> None:
        """Count what some layers say of a batch, `content` [B, Ld] of whose targets are text."""
        batch, rows = micro.batch, micro.rows
        targets, logits = batch.decoder_targets, output.logits
        self.router.add(output.routing, micro.inputs)
        everything = text = None
        if logits is not None:
            words = self.counts.numel()
            everything = token_losses(logits, targets, batch.decoder_mask, tp=tp, vocab_size=words)
            text = token_losses(logits, targets, content, tp=tp, vocab_size=words)
            self.counts.scatter_add_(0, targets.flatten(), content.flatten().double())
        self.losses.add(everything, output.aux_loss, rows)
        self.content.add(text, output.aux_loss, rows)

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
    runner: Runner,
    sources: Sequence[Validation],
    *,
    total: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Figures]:
    """Run the model, in evaluation mode, over all sources.

    The batches of all sources are dealt out to the data-parallel ranks in turn; each is the same
    batch whatever the number of ranks.

    Args:
        runner: whose model is left in the mode that it was in.
        sources: at least one.
        total: append the figures of all sources together.
        advance: called with the number of samples of each batch that this rank has done.

    Raises:
        UserError: on every rank, if one cannot read its data or is out of memory.
    """
    mesh, model = runner.mesh, runner.config.model
    tallies = [_Tally(model, mesh.device) for _ in sources]
    work = [(index, rows) for index, s in enumerate(sources) for rows in s.batches()]
    mine = work[mesh.dp.rank :: mesh.dp.size]
    # Ranks that exchange tokens, or gather each other's weights, run equally many batches: the last
    # ones perhaps to no account.
    lonely = mesh.axis("ep").size == 1 and runner.config.parallel.zero == "none"
    passes = len(mine) if lonely else -(-len(work) // mesh.dp.size)
    training = runner.parts.training
    runner.parts.train(False)
    try:
        for start in range(0, -(-len(work) // mesh.dp.size), _ROUND):
            some = range(start, min(start + _ROUND, passes))
            with mesh.together():
                pieces = [mine[i] if i < len(mine) else work[0] for i in some]
                batches = [sources[index].loader.batch(rows) for index, rows in pieces]
            with mesh.together():
                for i, (index, rows), batch in zip(some, pieces, batches, strict=True):
                    counted = i < len(mine)
                    _add(tallies[index] if counted else None, sources[index], batch, runner)
                    advance(len(rows) if counted else 0)
    finally:
        runner.parts.train(training)
    if total:
        tallies.append(_Tally(model, mesh.device))
        for tally in tallies[:-1]:
            tallies[-1].merge(tally)
    return [tally.figures(mesh) for tally in tallies]


def _add(tally: _Tally | None, source: Validation, batch: Seq2SeqBatch, runner: Runner) -> None:
    """Run a batch, and count it if there is a tally."""
    device = runner.mesh.device
    rows = len(batch.encoder_tokens)
    content = source.is_text(batch).to(device)

    def record(output: SwitchOutput, sums: TokenLosses | None, micro: MicroBatch) -> None:
        if tally is not None:
            tally.add(output, micro, content, runner.tp)

    remedy = f"{rows} samples are too many for {device}; use a smaller batch"
    with enough_memory(remedy, alone=not runner.mesh.exchanges):
        runner.evaluate(MicroBatch.of(batch, device, None), record)


def _entropy(counts: Tensor) -> float:
    """Entropy, in nats, of the distribution with these counts."""
    total = counts.sum().item()
    if total == 0:
        return 0.0
    present = counts[counts > 0]
    return math.log(total) - (present * present.log()).sum().item() / total


def open_corpus(
    config: RunConfig,
    prefix: str | Path,
    tokenizer: TokenizerInfo | None,
    *,
    shuffle: bool,
    seed: int | None = None,
) -> Corpus:
    """The corpus at `prefix` as samples of `config`'s objective and lengths; None: of its seed."""
    data = config.data
    settings: dict[str, Any] = {
        "seed": config.train.seed if seed is None else seed,
        "vocab_size": config.model.vocab_size,
        "encoder_length": data.encoder_length,
        "decoder_length": data.decoder_length,
        "noise_density": data.noise_density,
        "mean_span_length": data.mean_span_length,
        "random_roll": data.random_roll,
        "shuffle": shuffle,
        "tokenizer": tokenizer,
        "pread": data.access == "pread",
    }
    if data.objective == "span-corruption" and not data.packing:
        return SpanCorruptionLoader(prefix, **settings)
    return DocumentLoader(prefix, objective=data.objective, packing=data.packing, **settings)
