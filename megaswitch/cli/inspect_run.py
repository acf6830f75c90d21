"""`megaswitch inspect` of a run folder."""

from __future__ import annotations

import math
import os
import shlex
import statistics
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from megaswitch.checkpoint.manager import checkpoints, read_config, read_state, verify
from megaswitch.cli.changes import changes
from megaswitch.cli.show import curve, print_fields, print_lines, print_table, size
from megaswitch.config import RunConfig
from megaswitch.files import holder
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.model.count import count
from megaswitch.train.trainer import batch_size, build_loader

_LAYER_METRICS = ("dropped_fraction", "load_imbalance", "router_entropy", "router_confidence")


def run_report(path: Path, *, check_sums: bool) -> dict[str, Any]:
    """How a run stands.

    Args:
        path: the run's folder.
        check_sums: compare every file of every checkpoint with its checksum.

    Raises:
        UserError: its configuration cannot be read, or a checkpoint's sums do not match.
    """
    if not (path / "config.toml").is_file():
        raise UserError(
            f"{path} looks like a run folder but has no config.toml, which every run writes when "
            "it starts; inspect one of its checkpoints instead"
        )
    config = read_config(path)
    saved = checkpoints(path / "checkpoints")
    if check_sums:
        for checkpoint in saved:
            verify(checkpoint)
    metrics = read_metrics(path / "metrics.jsonl")
    training = [m for m in metrics if "loss" in m]
    validation = [m for m in metrics if "valid/loss" in m]
    last_step = max([int(m["step"]) for m in metrics], default=0)
    sizes = count(config.model)
    unfinished = sorted((path / "checkpoints").glob("*.unfinished"))
    return {
        "kind": "run",
        "path": str(path),
        "model": {
            "preset": config.model.preset,
            "total_parameters": sizes.total_parameters,
            "active_parameters": sizes.active_parameters,
            "num_experts": config.model.moe.num_experts,
        },
        "changes": [c for c in changes(config) if c["key"] != "model.preset"],
        "progress": _progress(config, last_step, saved[-1] if saved else None),
        "latest": training[-1] if training else None,
        "latest_validation": validation[-1] if validation else None,
        "speed": _speed(training),
        "loss": {"steps": [m["step"] for m in training], "values": [m["loss"] for m in training]},
        "checkpoints": [
            {"name": c.name, "step": int(c.name.removeprefix("step_")), "bytes": disk_use([c])}
            for c in saved
        ],
        "unfinished_checkpoints": [c.name for c in unfinished],
        "verified": check_sums,
        "bytes": disk_use([path]),
        "held_by": holder(path),
        "continues_from_step": int(saved[-1].name.removeprefix("step_")) if saved else 0,
        "continue_with": _continuation(path, config, last_step),
    }


def disk_use(paths: Iterable[Path]) -> int:
    """Bytes of the files in these folders; links are not followed."""
    total = 0
    for path in paths:
        for folder, _, names in os.walk(path):
            for name in names:
                file = Path(folder) / name
                if not file.is_symlink() and file.exists():  # a run may be removing it just now
                    total += file.stat().st_size
    return total


def _progress(config: RunConfig, step: int, checkpoint: Path | None) -> dict[str, Any]:
    """Of the newest checkpoint, which knows what was passed over, and since then."""
    saved = {"step": 0, "samples": 0}
    with suppress(UserError):  # a damaged one, which `--verify` tells
        saved = read_state(checkpoint)["state"] if checkpoint else saved
    samples, since = saved["samples"], max(0, step - saved["step"])
    if config.train.rampup_batch_size is None:
        samples += since * config.train.batch_size
    else:
        for _ in range(since):
            samples += batch_size(config, samples)
    progress = {"step": step, "steps": config.train.steps, "samples": samples}
    try:
        return progress | {"epochs": samples / build_loader(config, "train").samples_per_epoch}
    except UserError as error:
        # The run may have been started elsewhere; what it did is known all the same.
        return progress | {"epochs": None, "epochs_unknown": str(error)}


def _speed(training: list[dict[str, Any]]) -> dict[str, float] | None:
    speeds = [m["tokens_per_second"] for m in training if "tokens_per_second" in m]
    if not speeds:
        return None
    speed = {"last_tokens_per_second": speeds[-1]}
    speed["median_tokens_per_second"] = statistics.median(speeds)
    if "mfu" in training[-1]:
        speed["mfu"] = training[-1]["mfu"]
    return speed


def _continuation(path: Path, config: RunConfig, step: int) -> str:
    words = ["megaswitch", "train", str(path / "config.toml")]
    if Path(config.train.run_dir).resolve() != path.resolve():
        words.append(f"--train.run_dir={path}")
    if step >= config.train.steps:
        words.append(f"--train.steps={2 * config.train.steps}")
    return shlex.join(words)


def print_run(report: dict[str, Any]) -> None:
    """Show a report of `run_report` to people."""
    model, progress = report["model"], report["progress"]
    complete = progress["step"] >= progress["steps"]
    epochs = progress["epochs"]
    print_fields(
        f"Run {report['path']}",
        [
            ("model", f"{model['preset'] or 'no preset'}, {model['total_parameters']:,} parameters,"
                      f" {model['active_parameters']:,} active for a token"),
            ("progress", f"step {progress['step']:,} of {progress['steps']:,}"
                         f" ({progress['step'] / progress['steps']:.0%})"),
            ("samples", f"{progress['samples']:,}"),
            ("epochs", f"{epochs:.3g}" if epochs is not None
                       else f"unknown: {progress['epochs_unknown']}"),
            ("speed", _describe_speed(report["speed"])),
            ("held by", report["held_by"] or "nobody"),
            ("disk", size(report["bytes"])),
            ("complete; go on" if complete else "go on with", report["continue_with"]),
            ("which starts at", f"step {report['continues_from_step']:,}, the newest checkpoint"
                                if report["checkpoints"] else "the beginning: nothing was saved"),
        ],
    )  # fmt: skip
    if report["changes"]:
        table = Table("key", "value", "usual", box=None)
        for change in report["changes"]:
            table.add_row(change["key"], repr(change["value"]), repr(change["usual"]))
        print_table("Differs from the preset and the defaults", table, right_from=3)
    _print_losses(report)
    _print_router(report["latest"] or {}, model["num_experts"])
    _print_checkpoints(report)


def _describe_speed(speed: dict[str, float] | None) -> str:
    if speed is None:
        return "nothing logged yet"
    mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
    return (
        f"{speed['last_tokens_per_second']:,.0f} tokens/s, median "
        f"{speed['median_tokens_per_second']:,.0f}{mfu}"
    )


_TRAINING = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("learning rate", "learning_rate", "{:.3g}"),
    ("gradient norm", "grad_norm", "{:.3g}"),
)
_VALIDATION = (
    ("loss", "valid/loss", "{:.4f}"),
    ("perplexity", "valid/perplexity", "{:.1f}"),
    ("accuracy", "valid/accuracy", "{:.1%}"),
    ("text tokens' loss", "valid/content_loss", "{:.4f}"),
    ("their unigram entropy", "valid/content_unigram_entropy", "{:.4f}"),
)


def _print_losses(report: dict[str, Any]) -> None:
    for what, metrics, rows in (
        ("training metrics", report["latest"], _TRAINING),
        ("validation", report["latest_validation"], _VALIDATION),
    ):
        if metrics:
            print_fields(
                f"Latest {what}, step {metrics['step']:,}",
                [(n, f.format(metrics[key]) if key in metrics else "–") for n, key, f in rows],
            )
    lines = curve(report["loss"]["steps"], report["loss"]["values"])
    if lines:
        print_lines("Training loss", lines)


def _print_router(latest: dict[str, Any], experts: int) -> None:
    layers = [key.partition("/")[2] for key in latest if key.startswith("router_entropy/")]
    if not layers:
        return
    most = math.log(experts) if experts > 1 else 1.0
    table = Table("Switch layer", "dropped", "busiest ÷ even", "entropy", "confidence", box=None)
    for layer in layers:
        dropped, imbalance, entropy, confidence = (
            latest[f"{metric}/{layer}"] for metric in _LAYER_METRICS
        )
        table.add_row(
            layer, f"{dropped:.1%}", f"{imbalance:.2f}", f"{entropy / most:.0%} of ln {experts}",
            f"{confidence:.2f}",
        )  # fmt: skip
        if imbalance * 2 > experts > 1:
            table.add_row("", "more than half of the tokens go to one expert")
    print_table(f"Router health, step {latest['step']:,}", table)


def _print_checkpoints(report: dict[str, Any]) -> None:
    saved, unfinished = report["checkpoints"], report["unfinished_checkpoints"]
    table = Table("checkpoint", "step", "size", box=None)
    for checkpoint in saved:
        table.add_row(checkpoint["name"], f"{checkpoint['step']:,}", size(checkpoint["bytes"]))
    for name in unfinished:
        table.add_row(name, "", "half-written; the next save removes it")
    total = size(sum(c["bytes"] for c in saved))
    sums = "; all sums match" if report["verified"] else ""
    print_table(f"Checkpoints: {len(saved)}, {total}{sums}", table)
