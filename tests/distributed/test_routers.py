"""Every router, exploration and Switch attention: each layout trains as one process does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megaswitch.config import RunConfig
from megaswitch.model.routers import ROUTERS
from megaswitch.rules import check
from tests.distributed import layouts
from tests.distributed.equality import Outcome, compare, train, train_alone
from tests.distributed.layouts import GRIDS, Case, Free, Grid, Structure, case
from tests.distributed.world import World

MODELS: dict[str, dict[str, Any]] = {
    "top-2": {"router": "top-2", "exploration": "input-dropout"},
    "top-2, all": {"router": "top-2", "train_second_policy": "all", "z_loss_weight": 0.0},
    "ntlb": {"router": "ntlb", "rounds": 2, "exploration": "jitter", "train_capacity_factor": 0.8},
    "expert-choice": {"router": "expert-choice"},
    "sampled": {"exploration": "sample", "temperature": 0.5},
    "attention": {"attention": "linear", "feed_forward": False},
    "attention and ffn": {"attention": "ffn", "router": "top-2"},
}
# Sums over ranks in fp64, and an update is the gradient over its own size.
GRADIENTS, PARAMETERS, STEPS = 1e-10, 1e-9, 2


def config(name: str, case: Case) -> RunConfig:
    return layouts.config(case, moe=MODELS[name])


Reference = Callable[[str, Free], Outcome]


@pytest.fixture(scope="module")
def alone(world: World) -> Reference:
    """What one process does of a model."""
    known: dict[Any, Outcome] = {}

    def find(name: str, free: Free) -> Outcome:
        single = Case(Grid(), Structure(), replace(free, activation_checkpointing=False))
        key = name, single
        if key not in known:
            known[key] = world.run(1, train_alone, config(name, single), torch.float64, STEPS)[0]
        return known[key]

    return find


def compare_layout(world: World, alone: Reference, name: str, case: Case) -> None:
    expected = alone(name, case.free)
    assert (expected.dropped > 0) == (case.free.capacity_mode != "dropless")
    assert expected.margin > 1e-12
    assert check(config(name, case), case.ranks) == []
    outcomes = world.run(case.ranks, train, config(name, case), torch.float64, STEPS)
    assert compare(outcomes, expected, GRADIENTS, PARAMETERS) == {}, f"{name} on {case}"


SEQUENCE = case("tp2", sequence_parallel=True)
WHOLE = case("ep2·tp2", sequence_parallel=False, ep_chunks=2, activation="gated-gelu")
SHARDED = case("edp2·ep2", zero="full", activation_checkpointing=True, micro_batches=2)
PIPELINE = case("pp2·ep2·tp2", schedule="1f1b", sequence_parallel=True, micro_batches=2)
DEFERRED = case("pp2·ep2", schedule="zero-bubble", micro_batches=2, capacity_mode="dropless")
SHORT = [
    ("top-2", SEQUENCE), ("top-2", WHOLE), ("top-2", SHARDED), ("top-2", PIPELINE),
    ("top-2, all", DEFERRED),
    ("ntlb", SEQUENCE), ("ntlb", SHARDED),
    ("expert-choice", SEQUENCE), ("expert-choice", WHOLE), ("expert-choice", SHARDED),
    ("sampled", SEQUENCE), ("sampled", SHARDED),
    ("attention", SEQUENCE), ("attention", WHOLE), ("attention", SHARDED),
    ("attention", DEFERRED),
    ("attention and ffn", SEQUENCE), ("attention and ffn", WHOLE),
    ("attention and ffn", PIPELINE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), SHORT, ids=lambda v: str(getattr(v, "grid", v)))
def test_a_layout_trains_as_one_process_does(world, alone, name, case):
    compare_layout(world, alone, name, case)


@pytest.mark.long
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_trains_as_one_process_does(world, alone, name, grid):
    structures = layouts.structures(grid)
    free = (Free(), Free(activation="gated-gelu", activation_checkpointing=True, dropout=0.0))
    for structure, some in zip((structures[0], structures[-1]), free, strict=True):
        compare_layout(world, alone, name, Case(grid, structure, some))


def test_every_router_takes_part():
    trained = {options.get("router", "switch") for options in MODELS.values()}
    assert trained == set(ROUTERS)
