"""What a run measures, summed exactly over micro-batches and ranks, and where it is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megaswitch.layers.vocab import TokenLosses
from megaswitch.model.switch_transformer import LayerRouting, SwitchOutput
from megaswitch.parallel.mesh import Mesh

# Dense bf16 tensor-core peaks, FLOP/s, from the vendors' data sheets; others are not guessed.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of one device in training precision, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)


class RouterMeter:
    """Sums of one or more Switch layers' routing, over real tokens.

    The vector of a layer is [tokens, kept, Σ entropy, Σ gate, tokens per expert …].
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self.device = device
        self.layers: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, routing: Mapping[str, LayerRouting], masks: Mapping[str, Tensor | None]) -> None:
        """Count a batch.

        Args:
            routing: of each layer, by name.
            masks: of each stack by name, [B, L] bool, True on real tokens; None: all are.
        """
        for name, layer in routing.items():
            mask = masks[name.split(".")[0]]
            real = torch.ones_like(layer.kept) if mask is None else mask
            ones = real.flatten().double()
            load = torch.zeros(self.num_experts, dtype=torch.float64, device=self.device)
            load.scatter_add_(0, layer.expert.flatten(), ones)
            kept = (layer.kept & real).sum()
            sums = [real.sum(), kept, (layer.entropy * real).sum(), (layer.gate * real).sum()]
            row = torch.cat([torch.stack([s.double() for s in sums]), load])
            self.layers[name] = self.layers[name] + row if name in self.layers else row

    def summary(self, mesh: Mesh) -> dict[str, float]:
        """Metrics over all ranks; the meter is emptied.

        `dropped_fraction` and `load_imbalance` (busiest expert ÷ even share) are over all layers;
        with `/layer` appended they are of one. `router_entropy` is in nats (ln E when undecided),
        `router_confidence` the mean probability of the chosen expert.
        """
        if not self.layers:
            return {}
        names = sorted(self.layers)
        table = mesh.sum_(torch.stack([self.layers[name] for name in names])).cpu()
        self.layers = {}
        tokens = table[:, 0].clamp(min=1)
        columns = {
            "dropped_fraction": 1 - table[:, 1] / tokens,
            "load_imbalance": table[:, 4:].amax(1) * self.num_experts / tokens,
            "router_entropy": table[:, 2] / tokens,
            "router_confidence": table[:, 3] / tokens,
        }
        metrics = {
            "dropped_fraction": 1 - (table[:, 1].sum() / tokens.sum()).item(),
            "load_imbalance": columns["load_imbalance"].mean().item(),
        }
        for key, values in columns.items():
            metrics |= {f"{key}/{n}": v for n, v in zip(names, values.tolist(), strict=True)}
        return metrics


class LossMeter:
    """Sums of token losses since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, sums: TokenLosses, output: SwitchOutput) -> None:
        """Count a micro-batch; its auxiliary loss counts by its rows."""
        rows = len(output.logits)
        values = (sums.cross_entropy, sums.tokens, sums.correct, output.aux_loss * rows)
        row = torch.stack([torch.as_tensor(v).double() for v in values])
        self.sums += torch.cat([row, row.new_full((1,), rows)])

    def summary(self, mesh: Mesh) -> dict[str, float]:
        """Means over all ranks; the meter is emptied. `loss` is nats per target token."""
        cross_entropy, tokens, correct, aux, rows = mesh.sum_(self.sums.clone()).tolist()
        self.sums.zero_()
        loss = cross_entropy / max(tokens, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": correct / max(tokens, 1),
            "aux_loss": aux / max(rows, 1),
        }


class MetricLog:
    """`metrics.jsonl` and TensorBoard files in the run folder, with the same names in both.

    Args:
        run_dir: the run's folder.
        first_step: steps from here on are about to be written; a resumed run drops what an
            interrupted one had written beyond its checkpoint, so a curve has no step twice.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self._cut(first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and its TensorBoard scalars."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        self.board.close()

    def _cut(self, first_step: int) -> None:
        kept = [m for m in read_metrics(self.path) if m["step"] < first_step]
        aside = self.path.with_suffix(".unfinished")
        aside.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")
        os.replace(aside, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    metrics = []
    for number, line in enumerate(lines):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return metrics
