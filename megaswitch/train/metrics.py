"""What a run measures, summed exactly over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaswitch.config import ModelConfig
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.vocab import TokenLosses
from megaswitch.metrics_file import read_metrics
from megaswitch.model.switch_transformer import Inputs, LayerRouting
from megaswitch.parallel.mesh import Mesh

__all__ = ["LayerLoad", "LossMeter", "LossTotals", "RouterMeter", "SourceMeter", "peak_flops",
           "read_metrics", "router_metrics"]  # fmt: skip

# Dense bf16 tensor-core peaks, FLOP/s, from the vendors' data sheets; others are not guessed.
# (PCIe and NVL cards of the H100 are slower and have names of their own.)
_BF16_PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 SXM": 989e12, "A100": 312e12}


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Peak FLOP/s of one device in `precision`, or None if it is not known."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _BF16_PEAKS.items() if key in name), None)


@dataclass(frozen=True)
class LayerLoad:
    """How one Switch layer spread its tokens. Padding does not count.

    Attributes:
        tokens: routed.
        kept: of them, those that some expert had a slot left for.
        router_entropy: mean of the router's entropy, nats; ln E when undecided.
        router_confidence: mean gate of a token's best expert: with one expert, its probability.
        tokens_per_expert: [E], as the router chose, dropped tokens too.
    """

    tokens: int
    kept: int
    router_entropy: float
    router_confidence: float
    tokens_per_expert: list[int]

    @property
    def dropped_fraction(self) -> float:
        """Share of tokens that no expert works on."""
        return 1 - self.kept / max(self.tokens, 1)

    @property
    def load_imbalance(self) -> float:
        """Tokens of the busiest expert ÷ an even share."""
        per_expert = self.tokens_per_expert
        return max(per_expert) * len(per_expert) / max(sum(per_expert), 1)

    @property
    def unused_experts(self) -> list[int]:
        """Experts, from 0, that no token chose."""
        return [expert for expert, tokens in enumerate(self.tokens_per_expert) if not tokens]


class RouterMeter:
    """Sums of all Switch layers' routing, over real tokens.

    The vector of a layer is [tokens, kept, Σ entropy, Σ gate, tokens per expert …]. Every rank has
    one for every layer, also a rank that counts nothing, so that all can add them up.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.num_experts = config.moe.num_experts
        self.layers = {
            name: torch.zeros(4 + self.num_experts, dtype=torch.float64, device=device)
            for name in config.switch_layers()
        }

    @torch.no_grad()
    def add(self, routing: Mapping[str, LayerRouting], inputs: Inputs) -> None:
        """Count a batch.

        Args:
            routing: of each layer, by name.
            inputs: of the batch, with its masks.
        """
        for name, layer in routing.items():
            encoder = name.startswith("encoder")
            mask = inputs.encoder_mask if encoder else inputs.decoder_mask
            real = layer.entropy.new_ones(()) > 0 if mask is None else mask
            real = real.expand_as(layer.entropy)
            # [B, L, experts of a token]
            expert, gate, kept = (
                t.view(*real.shape, -1) for t in (layer.expert, layer.gate, layer.kept)
            )
            asked = ((expert >= 0) & real[..., None]).flatten().double()
            load = torch.zeros(self.num_experts, dtype=torch.float64, device=asked.device)
            load.scatter_add_(0, expert.flatten().clamp(min=0), asked)
            taken = (kept.any(-1) & real).sum()
            best = gate.amax(-1)
            sums = [real.sum(), taken, (layer.entropy * real).sum(), (best * real).sum()]
            self.layers[name] += torch.cat([torch.stack([s.double() for s in sums]), load])

    def summary(self, mesh: Mesh) -> dict[str, float]:
        """`router_metrics` over all ranks; the meter is emptied."""
        return router_metrics(self.loads(mesh))

    def loads(self, mesh: Mesh) -> dict[str, LayerLoad]:
        """Each layer's load over all ranks; the meter is emptied."""
        if not self.layers:
            return {}
        table = mesh.sum_(torch.stack(list(self.layers.values()))).tolist()
        for sums in self.layers.values():
            sums.zero_()
        return {
            name: LayerLoad(
                tokens=int(tokens),
                kept=int(kept),
                router_entropy=entropy / max(tokens, 1),
                router_confidence=gate / max(tokens, 1),
                tokens_per_expert=[int(count) for count in per_expert],
            )
            for name, (tokens, kept, entropy, gate, *per_expert) in zip(
                self.layers, table, strict=True
            )
        }


def router_metrics(loads: Mapping[str, LayerLoad]) -> dict[str, float]:
    """Metrics of all Switch layers, by one name each.

    `dropped_fraction` and `load_imbalance` (busiest expert ÷ even share) are over all layers; with
    `/layer` appended they are of one. `router_entropy` is in nats, `router_confidence` the mean
    gate of a token's best expert.
    """
    if not loads:
        return {}
    tokens = sum(max(load.tokens, 1) for load in loads.values())
    metrics = {
        "dropped_fraction": 1 - sum(load.kept for load in loads.values()) / tokens,
        "load_imbalance": sum(load.load_imbalance for load in loads.values()) / len(loads),
    }
    for key in ("dropped_fraction", "load_imbalance", "router_entropy", "router_confidence"):
        metrics |= {f"{key}/{name}": getattr(load, key) for name, load in loads.items()}
    return metrics


@dataclass(frozen=True)
class LossTotals:
    """What a `LossMeter` counted on all ranks.

    Attributes:
        cross_entropy: summed over the counted targets, nats.
        tokens: targets counted.
        correct: of them, those with the largest logit.
        aux_loss: load-balancing loss, summed over rows.
        rows: sequences.
    """

    cross_entropy: float
    tokens: float
    correct: float
    aux_loss: float
    rows: float

    def metrics(self) -> dict[str, float]:
        """Means. `loss` is nats per target token."""
        loss = self.cross_entropy / max(self.tokens, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.correct / max(self.tokens, 1),
            "aux_loss": self.aux_loss / max(self.rows, 1),
        }


class LossMeter:
    """Sums of token losses since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, sums: TokenLosses | None, aux_loss: Tensor, rows: int) -> None:
        """Count what some layers know of a micro-batch of `rows`.

        The rows count where the token losses are known. The auxiliary loss counts by its rows.
        """
        self.sums[3] += aux_loss.double() * rows
        if sums is not None:
            values = (sums.cross_entropy, sums.tokens, sums.correct)
            self.sums[:3] += torch.stack([v.double() for v in values])
            self.sums[4] += rows

    def summary(self, mesh: Mesh) -> dict[str, float]:
        """Means over all ranks; the meter is emptied. `loss` is nats per target token."""
        return self.totals(mesh).metrics()

    def totals(self, mesh: Mesh) -> LossTotals:
        """Sums over all ranks; the meter is emptied."""
        totals = LossTotals(*mesh.sum_(self.sums.clone()).tolist())
        self.sums.zero_()
        return totals


class SourceMeter:
    """Loss of each source of a mixture since the last reading; without a mixture, nothing.

    Args:
        names: of the sources.
        device: where the losses are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, sums: TokenLosses | None, batch: Seq2SeqBatch) -> None:
        """Count the rows of a micro-batch, where their losses are known."""
        if sums is not None and batch.source is not None:
            rows = torch.stack([sums.by_row.double(), batch.decoder_mask.sum(1).double()])
            self.sums.index_add_(1, batch.source, rows)

    def summary(self, mesh: Mesh) -> dict[str, float]:
        """`loss/name`, nats per target token, of the sources seen; the meter is emptied."""
        if not self.names:
            return {}
        losses, tokens = mesh.sum_(self.sums.clone()).tolist()
        self.sums.zero_()
        table = zip(self.names, losses, tokens, strict=True)
        return {f"loss/{name}": loss / count for name, loss, count in table if count}
