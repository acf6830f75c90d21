"""Every layout trains as one process does: losses, every gradient, every weight afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megaswitch.rules_parallel import check_parallel
from tests.distributed import layouts
from tests.distributed.equality import Outcome, compare, train, train_alone
from tests.distributed.layouts import CLIP, GRIDS, Case, config
from tests.distributed.world import RankError, World

GRADIENTS = 1e-10  # relative to a tensor's largest element
# An update is the gradient over its own size, so what is small in a tensor counts as much as what
# is large, and three of them follow each other.
PARAMETERS = 1e-9
STEPS = 3

Reference = Callable[..., Outcome]


@pytest.fixture(scope="module")
def alone(world: World) -> Reference:
    """What one process does of a case."""
    known: dict[Any, Outcome] = {}

    def find(case: Case, dtype: torch.dtype, steps: int, precision: str = "fp32") -> Outcome:
        single = case.alone()
        key = single, dtype, steps, precision
        if key not in known:
            (known[key],) = world.run(1, train_alone, config(single, precision), dtype, steps)
        return known[key]

    return find


def check(world: World, alone: Reference, case: Case) -> None:
    expected = alone(case, torch.float64, STEPS)
    # The proof must not be easy: tokens are dropped, gradients clipped, and no choice of an expert
    # is so close that rounding could decide it.
    assert (expected.dropped > 0) == (case.free.capacity_mode != "dropless")
    assert expected.margin > 1e-9
    assert expected.norm > CLIP
    outcomes = world.run(case.ranks, train, config(case), torch.float64, STEPS)
    assert compare(outcomes, expected, GRADIENTS, PARAMETERS) == {}, str(case)


@pytest.mark.parametrize("case", layouts.short_tier(), ids=str)
def test_a_layout_trains_as_one_process_does(world, alone, case):
    check(world, alone, case)


@pytest.mark.long
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_mesh_trains_as_one_process_does_with_all_pairs_of_options(world, alone, grid):
    for case in layouts.long_tier(grid):
        check(world, alone, case)


SAMPLE = [
    layouts.case("tp2", sequence_parallel=True),
    layouts.case("edp2·ep2", zero="full", optimizer="adafactor"),
    layouts.case("pp2·ep2·tp2", sequence_parallel=True, micro_batches=2),
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: str(case.grid))
def test_in_fp32_a_layout_differs_by_rounding(world, alone, case):
    expected = alone(case, torch.float32, 1)
    assert expected.margin > 1e-6
    outcomes = world.run(case.ranks, train, config(case), torch.float32, 1)
    assert compare(outcomes, expected, 1e-5, 1e-3) == {}


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: str(case.grid))
def test_in_bf16_the_loss_stays_close(world, alone, case):
    # Rounding decides here where some tokens go, so that no gradient can be compared.
    expected = alone(case, torch.float32, 1, "bf16")
    outcomes = world.run(case.ranks, train, config(case, "bf16"), torch.float32, 1)
    assert {outcome.loss for outcome in outcomes} == {outcomes[0].loss}
    assert outcomes[0].loss == pytest.approx(expected.loss, rel=1e-2)
    assert outcomes[0].norm == pytest.approx(expected.norm, rel=0.1)


def test_every_mesh_of_2_4_and_8_ranks_is_there():
    assert [len(layouts.grids(ranks)) for ranks in (2, 4, 8)] == [4, 10, 20]
    assert {case.grid for case in layouts.short_tier()} == set(GRIDS)


def test_cases_cover_every_pair_of_values_that_is_possible():
    covered = {pair for case in layouts.short_tier() for pair in layouts.pairs(case)}
    expected = layouts.possible_pairs(tuple(GRIDS)).keys()
    assert expected <= covered


def test_long_tier_covers_every_pair_on_every_mesh():
    for grid in GRIDS:
        covered = {pair for case in layouts.long_tier(grid) for pair in layouts.pairs(case)}
        assert layouts.possible_pairs((grid,)).keys() <= covered


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_cases_are_layouts_that_a_run_accepts(grid):
    for case in layouts.long_tier(grid):
        assert list(check_parallel(config(case), case.ranks)) == []


def fail_on(rank: int) -> int:
    here = torch.distributed.get_rank()
    if here == rank:
        raise ValueError(f"planted on rank {here}")
    torch.distributed.all_reduce(torch.zeros(1))
    return here


def test_a_rank_that_fails_is_named_and_the_next_test_has_a_new_world():
    small = World(4)
    try:
        with pytest.raises(RankError, match=r"--- rank 1 failed ---\n(.*\n)*ValueError: planted"):
            small.run(4, fail_on, 1)
        assert small.run(2, fail_on, 7) == [0, 1]
    finally:
        small.close()
