"""`megaswitch convert`: models of other programs in and out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megaswitch.cli.common import PATH, echo
from megaswitch.cli.upcycle import prune, upcycle
from megaswitch.log import UserError

if TYPE_CHECKING:
    from megaswitch.checkpoint.conversion import Converted, Options
    from megaswitch.checkpoint.streams import Advance

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Location(click.ParamType):
    """A local path, or a URL that fsspec knows."""

    name = "path or URL"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        from megaswitch.storage import location

        try:
            return location(value)
        except UserError as error:
            self.fail(str(error), param, ctx)


class _Size(click.ParamType):
    """Bytes with a unit."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]i?B|)", value, re.IGNORECASE)
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
        if size < 10**3:
            self.fail(f"{value!r} is no size of 1 KB or more; write 500MB, 5GB or 4GiB", param, ctx)
        return size


class _Capacity(click.ParamType):
    """Slots per row and expert, or no limit."""

    name = "N|dropless"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "dropless" or isinstance(value, int):
            return value
        if not re.fullmatch(r"[1-9]\d{0,8}", value):
            self.fail(f"{value!r} is neither a number of slots nor 'dropless'", param, ctx)
        return int(value)


LOCATION = _Location()


@click.group()
def convert() -> None:
    """Models of Hugging Face and T5X in, models for Hugging Face out, models of other models.

    Tensors are streamed: memory holds a few pieces, however large the model. Places are local
    folders, or URLs such as s3://bucket/folder with the extra s3 or gcs. A destination must not
    exist, and appears whole or not at all.
    """


def _options(command: Any) -> Any:
    """What all conversions take."""
    for option in (
        click.option(
            "--tokenizer", type=PATH, help="SentencePiece model to take along, if not SRC's."
        ),
        click.option(
            "--shard-size",
            type=_Size(),
            default="5GB",
            show_default=True,
            help="Largest file, unless one matrix alone is larger.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Of the tensors written; default: as stored.",
        ),
        click.argument("dst", type=LOCATION),
        click.argument("src", type=LOCATION),
    ):
        command = option(command)
    return command


@convert.command("import-hf")
@_options
def import_hf(src: Path, dst: Path, **options: Any) -> None:
    """Write a checkpoint of a Hugging Face model.

    SRC is a folder with config.json and safetensors or old .bin files, of t5 (v1.0, v1.1, FLAN),
    mt5 or switch_transformers. DST is a checkpoint for `generate`, `evaluate` and `inspect`,
    and where `train` with train.init_from=DST begins.

    Example: megaswitch convert import-hf switch-base-8/ base-8/
    """
    from megaswitch.checkpoint.huggingface_files import import_hf as run

    _report(time.monotonic(), run(src, dst, _read(options)))


@convert.command("import-t5x")
@_options
def import_t5x(src: Path, dst: Path, **options: Any) -> None:
    """Write a checkpoint of a T5X model: Switch, T5 v1.1, mT5.

    SRC is a folder checkpoint_N of msgpack and zarr, as T5X and Flaxformer write and Google has
    published. Needs the extra t5x. T5X keeps the tokenizer elsewhere: give it by --tokenizer.

    Example: megaswitch convert import-t5x checkpoint_500100/ base-8/ --tokenizer spiece.model
    """
    from megaswitch.checkpoint.t5x import import_t5x as run

    _report(time.monotonic(), run(src, dst, _read(options)))


@convert.command("export-hf")
@_options
@click.option(
    "--capacity",
    type=_Capacity(),
    help="Slots of an expert for each row with HF, or dropless. Needed if the model was trained "
    "with a capacity for each group, which HF does not have.",
)
def export_hf(src: Path, dst: Path, capacity: int | str | None, **options: Any) -> None:
    """Write a checkpoint, or the newest of a run, as a Hugging Face model with its tokenizer.

    What HF cannot express is refused: gated experts, other routers, sparse layers other than all or
    every second.
    init_scale, expert_dropout, exploration but for jitter, aux_loss_reduction and aux_loss_padding,
    which act in training alone, have no place there and are left out.

    Example: megaswitch convert export-hf runs/base-8 base-8-hf/ --capacity dropless --dtype bf16
    """
    from megaswitch.checkpoint.huggingface_files import export_hf as run

    _report(time.monotonic(), run(src, dst, _read(options), capacity=capacity))


def _read(options: dict[str, Any]) -> Options:
    from megaswitch.checkpoint.conversion import Options

    return Options(
        dtype=options["dtype"],
        shard_bytes=options["shard_size"],
        tokenizer=options["tokenizer"],
        progress=_progress,
    )


def _report(started: float, result: Converted) -> None:
    from megaswitch.log import warn

    for note in result.notes:
        warn(note)
    seconds = time.monotonic() - started
    echo(
        f"{result.path}: {result.parameters:,} parameters, {result.bytes / 1e9:.2f} GB in "
        f"{seconds:.1f} s ({result.bytes / 1e6 / max(seconds, 1e-3):,.0f} MB/s)"
    )


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """A bar on a terminal, with bytes per second and the time that is left."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from megaswitch.log import console

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    place = console()
    bar = Progress(*columns, console=place, transient=True, disable=not place.is_terminal)
    with bar:
        task = bar.add_task("", total=total)
        yield lambda written: bar.advance(task, written)


convert.add_command(upcycle)
convert.add_command(prune)
