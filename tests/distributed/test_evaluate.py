"""Ranks evaluate as one process does, in any layout, and fail together."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaswitch.parallel.mesh import Mesh
from megaswitch.train.evaluate import Request, evaluate
from tests.distributed.equality import CPU, working_in
from tests.distributed.layouts import case
from tests.distributed.test_layout_changes import leg

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


def figures(checkpoint: Path, data: list[str], layout: str) -> dict:
    """All that a rank reports, by where it stands."""
    grid = case(layout).grid
    with working_in(torch.float64):
        request = Request(checkpoint=checkpoint, data=data, samples=18, ep=grid.ep, tp=grid.tp)
        plan = request.plan(grid.ranks)
        grouped = torch.distributed.is_initialized()
        mesh = Mesh.over_ranks(CPU, plan.config.parallel) if grouped else Mesh(0, 1, CPU, None)
        found = evaluate(plan, mesh)
    tables = {**found.sources, "total": found.total}.items()
    router = {name: {k: vars(load) for k, load in one.router.items()} for name, one in tables}
    return leaves(
        {"router": router, **{name: vars(replace(one, router={})) for name, one in tables}}
    )


def test_figures_of_any_layout_are_those_of_one_process(world, run_options, tmp_path, corpus):
    """Of a checkpoint that yet another layout wrote; batches can nowhere be shared evenly."""
    layout = ["--parallel.pp=2", "--parallel.ep=2", "--parallel.tp=2"]
    steps = ["--train.steps=2", "--train.batch_size=16"]
    assert all(world.run(8, leg, 8, [*run_options, *layout, *steps]))
    data = [f"{corpus}-valid", str(corpus)]
    (one,) = world.run(1, figures, tmp_path / "run", data, "alone")
    assert one["/total/samples"] == 36
    for layout in ("ep2", "tp2", "ep4", "tp4", "ep2·tp2", "edp2·ep2", "edp2·tp2", "ep4·tp2",
                   "edp2·ep2·tp2"):  # fmt: skip
        for found in world.run(case(layout).ranks, figures, tmp_path / "run", data, layout):
            assert found.keys() == one.keys()
            for key, value in one.items():
                expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
                assert found[key] == expected, (layout, key)


@pytest.mark.parametrize("layout", [[], ["--ep", 2, "--tp", 2]], ids=str)
def test_several_ranks_give_the_figures_of_one(text_run, tmp_path, layout):
    # 5 batches of two sources: neither source's can be shared evenly.
    arguments = [
        *("-m", "megaswitch", "evaluate", text_run / "run"),
        *(f"{text_run}/valid", f"text={text_run}/texts.jsonl", "--samples", 10, "--json"),
    ]
    reports = []
    many = 4 if layout else 2
    for ranks, options in ((1, []), (many, layout)):
        process = launch(ranks, tmp_path, *arguments, *options)
        assert process.returncode == 0, process.stderr
        assert process.stderr.count(f"{ranks} × cpu") == 1
        assert ("4 ranks = pp 1 × dp 2 × tp 2" in process.stderr) == bool(options)
        reports.append(leaves(json.loads(process.stdout)))
        assert not list((tmp_path / "tmp").glob("megaswitch-*"))
    one, several = reports
    assert one["/total/samples"] == 20
    assert one.keys() == several.keys()
    bound = 1e-5 if layout else 1e-9  # sliced sums are rounded otherwise in fp32
    for key, value in one.items():
        if isinstance(value, float):
            assert several[key] == pytest.approx(value, rel=bound), key
        else:
            assert several[key] == value, key


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
