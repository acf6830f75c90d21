"""`megaswitch inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from megaswitch.cli.common import PATH
from megaswitch.log import UserError, is_rank_zero

Kind = Literal["checkpoint", "run", "data", "pairs", "tokenizer"]

_NAMES = {
    "checkpoint": "a checkpoint",
    "run": "a run folder",
    "data": "a token-file prefix",
    "pairs": "a prefix of token files of pairs",
    "tokenizer": "a SentencePiece model",
}
_SERVES = {
    "--verify": ("checkpoint", "run", "data", "pairs"),
    "--stats": ("checkpoint",),
    "--diff": ("checkpoint",),
    "--tokenizer": ("data", "pairs"),
    "--plot": ("run",),
}
_PICKLE = "not token files, as no .idx lies beside it; pickles are never opened here"
_TEXT = "text, it seems; `megaswitch preprocess` makes token files of it"
_OTHER = {
    ".safetensors": "a tensor file; give the folder of the checkpoint that it belongs to",
    ".toml": "a configuration; `megaswitch train` takes it, and its train.run_dir is a run",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _PICKLE),
    **dict.fromkeys((".jsonl", ".txt", ".gz", ".zst"), _TEXT),
}


@click.command("inspect")
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Compare files with their checksums.")
@click.option("--stats", is_flag=True, help="Checkpoint: read all tensors; NaNs, dead experts.")
@click.option("--diff", type=PATH, help="Checkpoint: compare it with this one, of any layout.")
@click.option("--tokenizer", type=PATH, help="Data: decode documents and samples with this model.")
@click.option("--plot", type=PATH, help="Run: draw its curves to this picture, such as loss.png.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
def inspect_command(
    path: Path,
    verify: bool,
    stats: bool,
    diff: Path | None,
    tokenizer: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Say what a checkpoint, a run, token files or a tokenizer hold.

    PATH is a checkpoint, a run folder, the prefix of token files (or its .bin or .idx; of pairs
    without _inputs and _targets), or a SentencePiece model. Of a checkpoint only headers and small
    files are read, unless an option asks for more; of token files the index, and tokens for some
    seconds.

    \b
    Examples:
      megaswitch inspect runs/demo --plot loss.png
      megaswitch inspect runs/demo/checkpoints/step_00002000 --stats --verify
      megaswitch inspect runs/demo/checkpoints/step_00002000 --diff runs/other
      megaswitch inspect data/corpus_train --tokenizer spm.model
    """
    path, kind = find_kind(path)
    given = {"--verify": verify, "--stats": stats, "--diff": diff, "--tokenizer": tokenizer}
    given["--plot"] = plot
    for option, value in given.items():
        if value and kind not in _SERVES[option]:
            wanted = " or ".join(_NAMES[k] for k in _SERVES[option])
            raise UserError(f"{path} is {_NAMES[kind]}, and {option} is for {wanted}; leave it out")
    from megaswitch.cli.show import print_json

    if diff:
        if verify or stats:
            raise UserError("--diff reads two checkpoints; use --verify and --stats on one of them")
        from megaswitch.cli.inspect_diff import diff_report, print_diff

        report: dict[str, Any] = diff_report(path, diff)
        show: Callable[[dict[str, Any]], None] = print_diff
    else:
        report, show = _read(path, kind, verify=verify, stats=stats, tokenizer=tokenizer, plot=plot)
    if as_json:
        print_json(report)
    else:
        show(report)


def _read(
    path: Path, kind: Kind, *, verify: bool, stats: bool, tokenizer: Path | None, plot: Path | None
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    """The report on `path`, and what shows it to people."""
    if kind == "checkpoint":
        from megaswitch.cli.inspect_checkpoint import checkpoint_report, print_checkpoint

        return checkpoint_report(path, check_sums=verify, with_stats=stats), print_checkpoint
    if kind == "run":
        return _read_run(path, verify, plot)
    if kind == "data":
        from megaswitch.cli.inspect_data import data_report, print_data

        return data_report(path, tokenizer=tokenizer, check_sums=verify), print_data
    if kind == "pairs":
        from megaswitch.cli.inspect_data import pairs_report, print_pairs

        return pairs_report(path, tokenizer=tokenizer, check_sums=verify), print_pairs
    from megaswitch.cli.inspect_tokenizer import print_tokenizer, tokenizer_report

    try:
        return tokenizer_report(path), print_tokenizer
    except UserError as error:
        raise UserError(
            f"{path} is no checkpoint, run folder or token file; and as a tokenizer: {error}"
        ) from error


def _read_run(
    path: Path, verify: bool, plot: Path | None
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    from megaswitch.cli.inspect_run import print_run, run_report
    from megaswitch.cli.plot_run import plot_run
    from megaswitch.metrics_file import read_metrics
    from megaswitch.train.plots import check_plot

    if plot and is_rank_zero():
        check_plot(plot)
    report = run_report(path, check_sums=verify)
    if plot and is_rank_zero():
        plot_run(read_metrics(path / "metrics.jsonl"), str(path), plot)
    return report, print_run


def find_kind(path: Path) -> tuple[Path, Kind]:
    """What lies at `path`, and the path by which its reader knows it.

    Raises:
        UserError: nothing that can be inspected.
    """
    if path.is_dir():
        return _kind_of_folder(path)
    for suffix in (".bin", ".idx", ".meta.json"):
        prefix = path.with_name(path.name.removesuffix(suffix) or path.name)
        index = prefix.with_name(f"{prefix.name}.idx")
        if path.name not in (suffix, prefix.name) and (index.exists() or suffix == ".idx"):
            return prefix, "data"
    if any(path.with_name(path.name + suffix).exists() for suffix in (".bin", ".idx")):
        return path, "data"
    if any(path.with_name(f"{path.name}_{side}.idx").exists() for side in ("inputs", "targets")):
        return path, "pairs"
    if not path.exists():
        raise UserError(
            f"{path} does not exist, nor does {path}.idx; give a checkpoint, a run folder, the "
            "prefix of token files, or a SentencePiece model"
        )
    if what := _OTHER.get(path.suffix):
        raise UserError(f"{path} cannot be inspected: it is {what}")
    return path, "tokenizer"


def _kind_of_folder(path: Path) -> tuple[Path, Kind]:
    if path.name.endswith(".unfinished"):
        raise UserError(
            f"{path} is a checkpoint that was never finished: the run stopped while writing it. "
            "Nothing reads it and the next save removes it; inspect another checkpoint"
        )
    if path.name.endswith(".resharding"):
        raise UserError(
            f"{path} is a resharding that was never finished; the same `megaswitch reshard` "
            "command goes on with it"
        )
    if (path / "state.json").exists():
        return path, "checkpoint"
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists():
        return path, "run"
    from megaswitch.checkpoint.manager import checkpoints

    if steps := checkpoints(path):
        return steps[-1], "checkpoint"
    if any(path.glob("*.safetensors")):
        what = (
            "it holds tensors but no state.json: a checkpoint copied in part, or another program's"
        )
    else:
        what = "it holds neither state.json (a checkpoint) nor metrics.jsonl (a run)"
    raise UserError(f"the folder {path} cannot be inspected: {what}; give another path")
