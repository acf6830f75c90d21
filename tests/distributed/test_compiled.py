"""Layouts train as one process does when their regions are compiled."""

from dataclasses import replace

import pytest
import torch

from megaswitch.config import RunConfig
from megaswitch.layers import compiled
from tests.distributed.equality import Outcome, compare, train, train_alone
from tests.distributed.layouts import Case, case, config
from tests.distributed.world import World

CASES = [
    case("edp2·ep2", zero="full", activation_checkpointing="selective"),
    case("ep2·tp2", sequence_parallel=True, activation="gated-gelu"),
    pytest.param(case("pp2·tp2", schedule="zero-bubble", micro_batches=2), marks=pytest.mark.long),
]


def train_compiled(run: RunConfig, dtype: torch.dtype, steps: int) -> Outcome:
    """As `train`, by a compiler that takes less time than the default one."""
    before, compiled.BACKEND = compiled.BACKEND, "aot_eager"
    try:
        return train(replace(run, train=replace(run.train, compile=True)), dtype, steps)
    finally:
        compiled.compile_regions(False)
        compiled.BACKEND = before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_layout_trains_as_one_process_does(world: World, case: Case) -> None:
    (expected,) = world.run(1, train_alone, config(case.alone()), torch.float64, 2)
    outcomes = world.run(case.ranks, train_compiled, config(case), torch.float64, 2)
    assert compare(outcomes, expected, 1e-10, 1e-9) == {}
