"""Loss on held-out text, and the baseline that shows whether anything was learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.span_corruption import EOS_ID, Seq2SeqBatch
from megaswitch.layers.vocab import token_losses
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.metrics import LossMeter, RouterMeter
from megaswitch.train.objectives import forward


class Validation:
    """Runs a model over the first samples of a held-out corpus.

    Args:
        loader: unshuffled.
        samples: how many sequences; all that there are, if fewer.
        micro_batch_size: sequences per forward.
    """

    def __init__(
        self, loader: SpanCorruptionLoader, *, samples: int, micro_batch_size: int
    ) -> None:
        self.loader = loader
        self.samples = min(samples, loader.samples_per_epoch)
        self.micro_batch_size = micro_batch_size

    @torch.no_grad()
    def run(self, model: SwitchTransformer, mesh: Mesh, precision: torch.dtype) -> dict[str, float]:
        """Evaluate, spread over the ranks.

        Returns:
            `loss`, `perplexity` and `accuracy` over all targets; `content_loss` over the targets
            that are text; `content_unigram_entropy`, the least loss on those same targets of a
            model that knows only how frequent each is; and the router's metrics.
        """
        training = model.training
        model.eval()
        losses = LossMeter(mesh.device)
        router = RouterMeter(model.config, mesh.device)
        counts = torch.zeros(model.config.vocab_size, dtype=torch.float64, device=mesh.device)
        content_loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
        starts = range(0, self.samples, self.micro_batch_size)
        for start in starts[mesh.rank :: mesh.size]:
            rows = range(start, min(start + self.micro_batch_size, self.samples))
            output, batch, masks = forward(model, self.loader.batch(rows), mesh.device, precision)
            losses.add(
                token_losses(output.logits, batch.decoder_targets, batch.decoder_mask), output
            )
            content = self._is_text(batch)
            content_loss += token_losses(
                output.logits, batch.decoder_targets, content
            ).cross_entropy.double()
            counts.scatter_add_(0, batch.decoder_targets.flatten(), content.flatten().double())
            router.add(output.routing, masks)
        model.train(training)
        metrics = losses.summary(mesh) | router.summary(mesh)
        mesh.sum_(counts)
        mesh.sum_(content_loss)
        metrics["content_loss"] = (content_loss / counts.sum().clamp(min=1)).item()
        metrics["content_unigram_entropy"] = _entropy(counts)
        return metrics

    def _is_text(self, batch: Seq2SeqBatch) -> Tensor:
        """[B, Ld] bool, True on targets that are neither sentinel nor EOS nor padding."""
        targets = batch.decoder_targets
        loader = self.loader
        text = (targets != EOS_ID) & (targets < loader.sentinel_top - loader.num_sentinels)
        return batch.decoder_mask & text


def _entropy(counts: Tensor) -> float:
    """Entropy, in nats, of the distribution with these counts."""
    total = counts.sum().item()
    if total == 0:
        return 0.0
    present = counts[counts > 0]
    return math.log(total) - (present * present.log()).sum().item() / total
