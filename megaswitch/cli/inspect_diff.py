"""`megaswitch inspect --diff`: how two checkpoints differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from megaswitch.checkpoint.diff import TensorDiff, compare
from megaswitch.checkpoint.integrity import check_sizes
from megaswitch.checkpoint.manager import (
    find_checkpoint,
    read_config,
    read_state,
    tensor_files,
)
from megaswitch.checkpoint.tensor_files import StoredTensor, read_headers
from megaswitch.cli.show import print_fields, print_lines, print_table
from megaswitch.config import differences

_SHOWN = 40  # tensors; --json has all


def diff_report(path: Path, other: Path) -> dict[str, Any]:
    """How two checkpoints differ: configuration, where training stands, and every tensor.

    Args:
        path: a checkpoint.
        other: another, or a run folder, whose newest is taken. Layouts need not be the same.

    Raises:
        UserError: one is incomplete or damaged.
    """
    other = find_checkpoint(other)
    here, there = _tensors(path), _tensors(other)
    states = read_state(path)["state"], read_state(other)["state"]
    tensors = list(compare(here, there))
    return {
        "kind": "diff",
        "paths": [str(path), str(other)],
        "config": [
            {"key": key, "difference": text}
            for key, text in differences(read_config(path), read_config(other))
        ],
        "state": {
            key: [value, states[1].get(key)]
            for key, value in states[0].items()
            if value != states[1].get(key)
        },
        "counts": dict(Counter(diff.kind for diff in tensors)),
        "elements": sum(diff.count for diff in tensors),
        "equal_elements": sum(diff.equal for diff in tensors),
        "tensors": [asdict(diff) for diff in tensors if diff.kind != "equal"],
    }


def _tensors(path: Path) -> dict[str, StoredTensor]:
    check_sizes(path, read_state(path)["files"])
    return read_headers(tensor_files(path))


def print_diff(report: dict[str, Any]) -> None:
    """Show a report of `diff_report` to people."""
    counts = report["counts"]
    other = ", ".join(f"{n} {_WORDS[k]}" for k, n in counts.items() if k != "equal") or "no other"
    print_fields(
        "{} and {}".format(*report["paths"]),
        [
            ("tensors", f"{counts.get('equal', 0)} bit for bit equal, {other}"),
            ("elements", f"{report['equal_elements']:,} of {report['elements']:,} equal"),
            *((key, f"{a!r} and {b!r}") for key, (a, b) in report["state"].items()),
        ],
    )
    if report["config"]:
        print_lines("Configuration", [entry["difference"] for entry in report["config"]])
    if not report["tensors"]:
        return
    titles = ("equal", "max abs", "max relative", "not finite")
    table = Table("tensor", "what", *titles, box=None)
    ranked = sorted(report["tensors"], key=lambda t: (t["kind"] == "values", -t["max_relative"]))
    for entry in ranked[:_SHOWN]:
        diff = TensorDiff(**entry)
        figures = ["–"] * 4
        if diff.count:
            figures = [f"{diff.equal:,}/{diff.count:,}"]
            figures += [f"{diff.max_abs:.3g}", f"{diff.max_relative:.3g}", f"{diff.not_finite:,}"]
        table.add_row(diff.name, _what(diff), *figures)
    more = len(ranked) - _SHOWN
    title = f"Tensors that differ{f'; {more} more with --json' if more > 0 else ''}"
    print_table(title, table, right_from=2)


_WORDS = {
    "values": "of other values",
    "dtype": "of another type",
    "shape": "of another shape",
    "missing": "missing in the other",
    "extra": "in the other alone",
}


def _what(diff: TensorDiff) -> str:
    if diff.kind == "dtype":
        return "{} and {}".format(*diff.dtypes)
    if diff.kind == "shape":
        return " and ".join("×".join(map(str, shape or ())) for shape in diff.shapes)
    return _WORDS[diff.kind]
