"""The table of a layout agrees with the mesh that the ranks form."""

import json
import os
import subprocess
import sys

import pytest

from megaswitch.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig
from megaswitch.parallel.table import layout_lines, layout_rows

LAYOUTS = [
    (4, {}),
    (8, {"pp": 2, "ep": 2, "tp": 2}),
    (16, {"pp": 2, "ep": 2, "tp": 2}),
    (16, {"ep": 4, "zero": "optimizer"}),
    (32, {"pp": 2, "ep": 2, "tp": 2, "zero": "full", "replicas": 2}),
    (24, {"tp": 3, "ep": 2, "zero": "full", "replicas": 4}),
]


def config_of(experts: int = 8, **keys) -> RunConfig:
    model = ModelConfig(moe=MoEConfig(num_experts=experts))
    return RunConfig(model=model, parallel=ParallelConfig(**keys))


# Prints, for each layout, the ranks that each axis of the real mesh joins with rank 0. Groups of
# torch's "fake" backend need no other process.
MESHES = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megaswitch.config import ParallelConfig
from megaswitch.parallel.mesh import Mesh

for size, keys in json.loads(sys.argv[1]):
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    axes = Mesh.over_ranks(torch.device("cpu"), ParallelConfig(**keys)).axes.values()
    ranks = {a.name: dist.get_process_group_ranks(a.group) if a.group else [0] for a in axes}
    print(json.dumps(ranks))
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def mesh_ranks() -> dict[str, dict[str, list[int]]]:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MESHES, json.dumps(LAYOUTS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(map(str, LAYOUTS), map(json.loads, process.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_axis_joins_the_ranks_of_the_mesh(layout, mesh_ranks):
    world_size, keys = layout
    rows = {row.axis: row for row in layout_rows(config_of(**keys), world_size)}
    expected = {"pp", "dp", "edp", "ep", "tp"}
    if keys.get("replicas", 1) > 1:
        expected |= {"replica", "shard", "dense_shard"}
    assert set(rows) == expected
    for axis, row in rows.items():
        assert list(row.ranks) == mesh_ranks[str(layout)][axis], axis
        assert len(row.ranks) == row.size


def test_a_dense_model_has_no_axes_of_experts():
    config = config_of(0, zero="full", replicas=2)
    axes = [row.axis for row in layout_rows(config, 8)]
    assert axes == ["pp", "dp", "replica", "dense_shard", "tp"]


def test_a_table_in_full():
    lines = layout_lines(config_of(pp=2, ep=2, tp=2, zero="full", replicas=2), 32)
    assert (
        "\n".join(lines)
        == """\
32 ranks = pp 2 × dp 8 × tp 2, dp = edp 4 × ep 2
  axis         size  with rank 0                spread over it
  pp              2  0, 16                      blocks in 2 stages
  dp              8  0, 2, 4, 6, 8, 10, 12, 14  samples
  edp             4  0, 4, 8, 12                replica × shard
  replica         2  0, 8                       copies of the shards
  dense_shard     4  0, 2, 4, 6                 weights, gradients, optimizer states but of experts
  shard           2  0, 4                       weights, gradients, optimizer states of experts
  ep              2  0, 2                       experts, 4 on each
  tp              2  0, 1                       heads, d_ff, vocabulary; tokens between them"""
    )


def test_long_axes_are_cut_and_axes_of_one_rank_stay_blank():
    lines = list(layout_lines(config_of(0), 1024))
    assert lines[0] == "1024 ranks = pp 1 × dp 1024 × tp 1"
    assert lines[2].split() == ["pp", "1", "–", "–"]
    assert lines[3] == "  dp    1024  0, 1, 2 … 1023  samples"


@pytest.mark.parametrize(
    ("keys", "axis", "spread"),
    [
        ({}, "dp", "samples"),
        ({}, "edp", "copies of the experts"),
        ({"ep": 2}, "ep", "experts, 4 on each"),
        ({"zero": "optimizer"}, "dp", "samples; gradients, optimizer states but of experts"),
        ({"zero": "optimizer"}, "edp", "gradients, optimizer states of experts"),
        ({"zero": "full"}, "edp", "weights, gradients, optimizer states of experts"),
        ({"tp": 2, "sequence_parallel": False}, "tp", "heads, d_ff, vocabulary"),
        ({"pp": 2, "schedule": "interleaved", "stages_per_rank": 3}, "pp", "blocks in 6 stages"),
        (
            {"experts": 0, "zero": "full"},
            "dp",
            "samples; weights, gradients, optimizer states",
        ),
    ],
)
def test_what_is_spread_over_an_axis(keys, axis, spread):
    rows = {row.axis: row.spread for row in layout_rows(config_of(**keys), 8)}
    assert rows[axis] == spread
