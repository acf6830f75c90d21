"""What a run shows: a live panel on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megaswitch.config import RunConfig
from megaswitch.log import console, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.table import layout_lines


def _products(config: RunConfig) -> str:
    """In what, and by what, linear maps multiply."""
    train = config.train
    fp8 = "" if train.fp8.recipe == "none" else f" with {train.fp8.recipe} FP8"
    emulated = " (emulated)" if fp8 and train.backend == "torch" else ""
    by = "" if train.backend == "torch" else f" by {train.backend}"
    return f"{train.precision}{fp8}{emulated}{by}"


class Display:
    """Progress of a run.

    Args:
        config: of the run.
        mesh: only rank 0 shows anything.
        parameters: of the model, for the header.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, parameters: int) -> None:
        self.steps = config.train.steps
        self.max_entropy = math.log(max(config.model.moe.num_experts, 2))
        self.quiet = mesh.rank != 0
        self.live: Live | None = None
        self.header = (
            f"{parameters:,} parameters · {config.model.moe.num_experts or 'no'} experts · "
            f"{mesh.size} × {mesh.device.type} · {_products(config)} · {config.optim.name}"
        )
        self.layout = list(layout_lines(config, mesh.size)) if mesh.size > 1 else []
        self.first_step: int | None = None
        # Steps of a large model may be minutes apart; rich would forget them after 30 seconds.
        self.progress = Progress(
            *(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()),
            speed_estimate_period=3600,
        )
        self.task = self.progress.add_task("train", total=self.steps)

    def __enter__(self) -> Display:
        if not self.quiet:
            for line in (self.header, *self.layout):
                info(line)
            if sys.stderr.isatty():
                self.live = Live(self.progress, console=console(), refresh_per_second=4)
                self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show the metrics of a logged step."""
        if self.quiet:
            return
        if self.first_step is None:
            self.first_step = step
            self.progress.reset(self.task, total=self.steps, completed=step)
        self.progress.update(self.task, completed=step)
        if self.live:
            self.live.update(Panel(Group(self.progress, *self._tables(metrics)), title=self.header))
            return
        remaining = self.progress.tasks[0].time_remaining
        eta = "" if remaining is None else f" · ETA {remaining / 60:.1f} min"
        info(f"step {step}/{self.steps} · {_line(metrics)}{eta}")

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Show a validation."""
        self.note(
            f"step {step}: validation loss {metrics['loss']:.3f}, perplexity "
            f"{metrics['perplexity']:.1f}, accuracy {metrics['accuracy']:.1%}; text tokens "
            f"{metrics['content_loss']:.3f} against their unigram entropy "
            f"{metrics['content_unigram_entropy']:.3f}"
        )
        scores = {
            key.split("/")[1]: value
            for key, value in metrics.items()
            if key.startswith("task/") and key.endswith("/score")
        }
        if scores:
            each = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            self.note(f"step {step}: score {metrics['score']:.2f} ({each})")

    def note(self, message: str) -> None:
        """Print a line that stays."""
        if self.live:
            self.live.console.print(message)
        elif not self.quiet:
            info(message)

    def _tables(self, metrics: dict[str, Any]) -> list[Any]:
        overall = Table.grid(padding=(0, 2))
        overall.add_row(*_line(metrics).split(" · "))
        layers = [k.split("/", 1)[1] for k in metrics if k.startswith("router_entropy/")]
        if not layers:
            return [overall]
        table = Table("Switch layer", "dropped", "imbalance", "entropy", "confidence", box=None)
        for layer in layers:
            entropy = metrics[f"router_entropy/{layer}"]
            table.add_row(
                layer,
                f"{metrics[f'dropped_fraction/{layer}']:.1%}",
                f"{metrics[f'load_imbalance/{layer}']:.2f}×",
                f"{entropy:.2f} of {self.max_entropy:.2f}",
                f"{metrics[f'router_confidence/{layer}']:.2f}",
            )
        return [overall, table]


class SampleProgress:
    """How far a pass over samples is, by rank 0's share: a bar on a terminal, lines elsewhere.

    Args:
        samples: of all ranks.
        mesh: only rank 0 shows anything.
    """

    _LINE_EVERY = 10.0  # seconds

    def __init__(self, samples: int, mesh: Mesh) -> None:
        self.samples, self.ranks, self.quiet = samples, mesh.dp.size, mesh.rank != 0
        self.done = 0
        self.started = self.printed = time.monotonic()
        self.bar: Progress | None = None
        if not self.quiet and sys.stderr.isatty():
            columns = (TextColumn("samples"), MofNCompleteColumn(), BarColumn())
            self.bar = Progress(
                *columns, TimeRemainingColumn(), console=console(), speed_estimate_period=3600,
                transient=True,
            )  # fmt: skip
            self.bar.add_task("samples", total=samples)

    def __enter__(self) -> SampleProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, samples: int) -> None:
        """Count samples of this rank; the others are taken to be as far."""
        if self.quiet:
            return
        self.done = min(self.done + samples * self.ranks, self.samples)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
            return
        now = time.monotonic()
        if now - self.printed >= self._LINE_EVERY:
            self.printed = now
            remaining = (now - self.started) * (self.samples - self.done) / self.done / 60
            info(f"samples {self.done:,}/{self.samples:,} · ETA {remaining:.1f} min")


def _line(metrics: dict[str, Any]) -> str:
    parts = [
        f"loss {metrics['loss']:.3f}",
        f"accuracy {metrics['accuracy']:.1%}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if "dropped_fraction" in metrics:
        parts.append(f"dropped {metrics['dropped_fraction']:.1%}")
        parts.append(f"imbalance {metrics['load_imbalance']:.2f}×")
        entropies = [v for k, v in metrics.items() if k.startswith("router_entropy/")]
        parts.append(f"router entropy {sum(entropies) / len(entropies):.2f}")
    parts.append(f"lr {metrics['learning_rate']:.2e}")
    if "grad_norm" in metrics:
        parts.append(f"grad norm {metrics['grad_norm']:.2f}")
    return " · ".join(parts)
