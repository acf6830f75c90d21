"""Two ranks evaluate as one process does, and fail together."""

import json
import os
import subprocess
import sys

import pytest

# Runs the command line with one rank made to differ.
UNEQUAL = """
import os, sys
from megaswitch.cli import main
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.log import UserError
from megaswitch.train import trained

kind = sys.argv.pop(1)
if os.environ["RANK"] == "1":
    if kind == "cannot read its data":
        def batch(self, indices):
            raise UserError("the data of this node is gone")
        SpanCorruptionLoader.batch = batch
    if kind == "sees another checkpoint":
        read_state = trained.read_state
        trained.read_state = lambda path: read_state(path) | {"state": {"step": 99}}
main()
"""


def launch(ranks, folder, *arguments):
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [*start, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def leaves(value, path=""):
    """Every figure of a report by where it stands."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in leaves(part, f"{path}/{key}").items()}
    return {path: value}


def test_two_ranks_give_the_figures_of_one(text_run, tmp_path):
    # 5 batches of two sources: neither source's can be shared evenly.
    arguments = [
        *("-m", "megaswitch", "evaluate", text_run / "run"),
        *(f"{text_run}/valid", f"text={text_run}/texts.jsonl", "--samples", 10, "--json"),
    ]
    reports = []
    for ranks in (1, 2):
        process = launch(ranks, tmp_path, *arguments)
        assert process.returncode == 0, process.stderr
        assert process.stderr.count(f"{ranks} × cpu") == 1
        reports.append(leaves(json.loads(process.stdout)))
        assert not list((tmp_path / "tmp").glob("megaswitch-*"))
    one, two = reports
    assert one["/total/samples"] == 20
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, float):
            assert two[key] == pytest.approx(value, rel=1e-9), key
        else:
            assert two[key] == value, key


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cannot read its data", "the data of this node is gone"),
        ("sees another checkpoint", "the ranks see different checkpoints"),
    ],
)
def test_one_rank_in_trouble_ends_all_with_its_reason(text_run, tmp_path, kind, message):
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    process = launch(
        2, tmp_path, script, kind, "evaluate", text_run / "run", f"{text_run}/texts.jsonl"
    )
    ours = process.stderr.split("ChildFailedError")[0]
    assert process.returncode != 0
    assert process.stdout == ""
    assert f"error: {message}" in ours or f"error on rank 1: {message}" in ours
    assert "GLHF" not in ours
    assert not list((tmp_path / "tmp").glob("megaswitch-*"))
