"""Every router, exploration and Switch attention: each layout trains as one process does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megaswitch.config import RunConfig
from megaswitch.model.routers import ROUTERS
from megaswitch.parallel import collectives
from megaswitch.rules import check
from megaswitch.train.text import Completion
from tests.distributed import layouts
from tests.distributed.equality import Outcome, compare, train, train_alone, working_in
from tests.distributed.layouts import GRIDS, Case, Free, Grid, Structure, case
from tests.distributed.test_generate_layouts import complete, run_config
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
PARTS = 3  # of a model's cases, so that no test is long


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
# Each router where its tokens are sliced and where they are exchanged; the long tier has all pairs.
SHORT = [
    ("top-2", SEQUENCE), ("top-2", SHARDED), ("top-2, all", WHOLE),
    ("ntlb", SEQUENCE), ("ntlb", SHARDED),
    ("expert-choice", SEQUENCE), ("expert-choice", SHARDED),
    ("sampled", SEQUENCE),
    ("attention", WHOLE), ("attention", SHARDED), ("attention", DEFERRED),
    ("attention and ffn", PIPELINE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), SHORT, ids=lambda v: str(getattr(v, "grid", v)))
def test_a_layout_trains_as_one_process_does(world, alone, name, case):
    compare_layout(world, alone, name, case)


# Of eight ranks those with three axes. How a layout's other options get on with each other is a
# matter of the base model, whose pairs `test_layouts` goes through on every mesh.
MESHES = tuple(grid for grid in GRIDS if grid.ranks <= 4 or len(layouts.axes(grid)) == 3)


def allowed(name: str, case: Case) -> Case:
    """The case itself, or with the capacity that every router has."""
    if check(config(name, case), case.ranks):
        case = replace(case, free=replace(case.free, capacity_mode="group"))
    return case


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", MODELS)
def test_all_pairs_of_what_a_router_meets_train_as_one_process_does(world, alone, name, part):
    for one in layouts.routed_cover(MESHES)[part::PARTS]:
        compare_layout(world, alone, name, allowed(name, one))


@pytest.mark.long
def test_those_are_all_pairs():
    def met(item):
        return item[1] == "several" or item[0] in layouts.ROUTED

    possible = {pair for pair in layouts.possible_pairs(MESHES) if all(map(met, pair))}
    covered = set().union(*map(layouts.routed_pairs, layouts.routed_cover(MESHES)))
    assert len(possible) > 200
    assert possible <= covered


# ---------------------------------------------------------------- precision


def exchanged(config: RunConfig) -> tuple[Outcome, set[torch.dtype]]:
    """Train a step in bf16, and see what experts are sent."""
    seen = set()
    send_rows = collectives._send_rows

    def look(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add(x.dtype)
        return send_rows(x, *rest)

    with mock.patch.object(collectives, "_send_rows", look):
        return train(config, torch.float32, 1), seen - {torch.int64}


@pytest.mark.parametrize(
    ("precision", "travels"),
    [("selective", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_what_travels_in_a_bf16_run(world, precision, travels):
    moe = {"router_precision": precision, "attention": "ffn"}
    layout = case("ep2", zero="full")
    single = layouts.config(Case(free=layout.free), "bf16", moe=moe)
    (expected,) = world.run(1, train_alone, single, torch.float32, 1)
    found = world.run(2, exchanged, layouts.config(layout, "bf16", moe=moe))
    for outcome, seen in found:
        assert seen == {travels}
        assert outcome.loss == pytest.approx(expected.loss, rel=1e-2)


# ---------------------------------------------------------------- generation


def complete_in_fp64(config: RunConfig) -> list[list[Completion]]:
    with working_in(torch.float64):
        return complete(config)


@pytest.mark.parametrize("layout", ["ep2·tp2", pytest.param("edp2·ep2", marks=pytest.mark.long)])
def test_texts_of_expert_attention_and_two_experts_are_those_of_one_process(world, layout):
    options = {"attention": "linear", "router": "top-2", "exploration": "argmax"}

    def run(grid: Grid) -> list[list[list[Completion]]]:
        config = run_config("capacity", grid)
        moe = replace(config.model.moe, **options)
        config = replace(config, model=replace(config.model, moe=moe))
        return world.run(grid.ranks, complete_in_fp64, config)

    (expected,) = run(Grid())
    for found in run(case(layout).grid):
        for ours, theirs in zip(found, expected, strict=True):
            assert [a.output for a in ours] == [a.output for a in theirs]
            assert [a.score for a in ours] == pytest.approx([a.score for a in theirs], rel=1e-9)


def test_every_router_takes_part():
    trained = {options.get("router", "switch") for options in MODELS.values()}
    assert trained == set(ROUTERS)
