"""`megaswitch reshard`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megaswitch.cli.common import PATH, echo
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override
from megaswitch.log import UserError, console, info

if TYPE_CHECKING:
    from megaswitch.checkpoint.placement import Piece
    from megaswitch.checkpoint.reshard import Work
    from megaswitch.train.relayout import Changes

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**n for n, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)}
_PROBE_BYTES = 64 << 20  # written to measure the disk


class _Bytes(click.ParamType):
    """A number of bytes with a unit, such as 2GiB or 500MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*?)(?:/s)?", value)
        if not match or match[2] not in _UNITS or not float(match[1]):
            self.fail(f"{value!r} is no size; write it as 2GiB or 500MB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class _Numbers(click.ParamType):
    """Numbers and runs of numbers, such as 0-63,128."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        """All of them, in order."""
        numbers: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
            run = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
            if not run:
                self.fail(f"{value!r} is no list of numbers; write it as 0-63,128", param, ctx)
            numbers += run
        return numbers


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.argument("checkpoint", type=PATH)
@click.argument("destination", type=PATH)
@click.option("--ranks", type=click.IntRange(1), show_default="pp × ep × tp",
              help="Ranks of the new layout; more are data-parallel.")  # fmt: skip
@click.option("--max-memory", type=_Bytes(), default="2GiB", show_default=True,
              help="Most that this process occupies, whatever the model's size.")  # fmt: skip
@click.option("--no-optimizer", is_flag=True, help="Leave the optimizer's states out.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]),
              help="Type of the weights; optimizer states keep theirs.")  # fmt: skip
@click.option("--experts", type=_Numbers(), help="Keep these of every Switch layer, as 0-63,128.")
@click.option("--encoder-layers", type=_Numbers(), help="Keep these, counted from 0.")
@click.option("--decoder-layers", type=_Numbers(), help="Keep these, counted from 0.")
@click.option("--dry-run", is_flag=True, help="List the files and the expected time; write none.")
@click.option("--disk-bandwidth", type=_Bytes(), show_default="measured",
              help="Bytes a second, for the expected time.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
def reshard(
    checkpoint: Path,
    destination: Path,
    ranks: int | None,
    max_memory: int,
    dry_run: bool,
    disk_bandwidth: int | None,
    as_json: bool,
    overrides: tuple[str, ...],
    **content: Any,
) -> None:
    """Rewrite a checkpoint so that each rank of a layout finds what it reads in a file of its own.

    Every layout loads every checkpoint; this makes loading local and fast, and can make a
    checkpoint smaller. CHECKPOINT is a checkpoint or a run folder, whose newest is taken;
    DESTINATION is the new one's folder. OVERRIDES are --parallel.KEY=VALUE and give the layout;
    what they leave out has its default. What several ranks read lies once, in the file of one.

    Source checksums are verified, results recorded. When it was killed, the same command goes on
    after the files that are finished; nothing that loads is there before all is right.

    With --dry-run, CHECKPOINT may be a preset.

    \b
    Examples:
      megaswitch reshard runs/base-8 wide/step_00001000 --parallel.ep=4 --parallel.tp=2
      megaswitch reshard runs/base-8 small --no-optimizer --dtype bf16 --experts 0-3
      megaswitch reshard --dry-run switch-c-2048 out --parallel.ep=256 --parallel.tp=2
    """
    from megaswitch.checkpoint.subset import Subset
    from megaswitch.config import RunConfig, model_config
    from megaswitch.parallel.mesh import world_size
    from megaswitch.presets import PRESETS
    from megaswitch.train.relayout import Changes, plan_fresh, plan_work

    if world_size() > 1:
        raise UserError("reshard does all ranks' files in one process; start it without torchrun")
    layers = content["encoder_layers"], content["decoder_layers"]
    changes = Changes(
        not content["no_optimizer"], content["dtype"], Subset(content["experts"], *layers)
    )
    if dry_run and not checkpoint.exists() and str(checkpoint) in PRESETS:
        fresh = RunConfig(model=model_config(str(checkpoint)))
        files, _ = plan_fresh(fresh, overrides, ranks, changes)
    else:
        work, _ = plan_work(checkpoint, overrides, ranks, changes)
        files = [list(file) for file in work.files]
    if dry_run:
        _show_plan(files, destination, disk_bandwidth, as_json)
    else:
        _do(work, destination, max_memory, changes, as_json)


def _do(work: Work, destination: Path, max_memory: int, changes: Changes, as_json: bool) -> None:
    from megaswitch.checkpoint.reshard import reshard as run
    from megaswitch.cli.show import print_json, size

    start = time.monotonic()
    with _progress(work) as progress:
        run(work, destination, max_memory=max_memory, progress=progress)
    seconds = time.monotonic() - start
    held = sum(1 for file in work.files if file)
    report = {
        "path": str(destination), "files": held, "bytes": work.bytes, "seconds": seconds,
    }  # fmt: skip
    if as_json:
        print_json(report)
        return
    echo(f"{destination}: {held} files, {size(work.bytes)}, in {seconds:.1f} s; checksums match")
    if not changes.optimizer:
        info("without optimizer states it serves evaluation and new runs; training cannot go on")
    elif changes.kind:
        info(f"weights are {changes.kind} now; optimizer states keep their type")


@contextmanager
def _progress(work: Work) -> Iterator[Callable[[int], None]]:
    """A bar on terminals."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    used = {part.file for tensor in work.wanted.values() for part in tensor.parts}
    total = work.bytes + sum(file.stat().st_size for file in used)
    columns = BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def _show_plan(
    files: Sequence[Sequence[Piece]], destination: Path, bandwidth: int | None, as_json: bool
) -> None:
    from rich.table import Table

    from megaswitch.checkpoint.chunks import shard_name
    from megaswitch.checkpoint.contents import MODEL
    from megaswitch.cli.show import print_fields, print_json, print_table, size

    measured = bandwidth or _disk_bandwidth(destination)
    rows: list[dict[str, Any]] = [
        {
            "file": shard_name(rank, len(files)),
            "tensors": len(file),
            "bytes": sum(piece.bytes for piece in file),
        }
        for rank, file in enumerate(files)
    ]
    total = sum(row["bytes"] for row in rows)
    # Every byte is read to be checked, read again to be placed, and written.
    seconds = 3 * total / measured
    numbers = sum(p.count for file in files for p in file if p.name.startswith(MODEL))
    report = {
        "files": rows, "bytes": total, "parameters": numbers,
        "disk_bandwidth": measured, "seconds": seconds,
    }  # fmt: skip
    if as_json:
        print_json(report)
        return
    table = Table("file", "tensors", "bytes", "size", box=None)
    for row in rows:
        table.add_row(row["file"], str(row["tensors"]), f"{row['bytes']:,}", size(row["bytes"]))
    print_table(f"Files of {len(files)} ranks", table)
    how = "given" if bandwidth else "measured"
    print_fields(
        "In all",
        [
            ("parameters", f"{numbers:,}"),
            ("size", f"{size(total)} ({total:,} bytes)"),
            ("disk", f"{size(measured)}/s ({how})"),
            ("expected time", f"{_duration(seconds)}: all is read twice and written once"),
        ],
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _disk_bandwidth(destination: Path) -> int:
    """Bytes a second that the disk of a folder, or of its nearest parent that exists, takes."""
    import tempfile

    folder = destination.absolute()
    while not folder.is_dir():
        folder = folder.parent
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_PROBE_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return int(_PROBE_BYTES / (time.perf_counter() - start))
