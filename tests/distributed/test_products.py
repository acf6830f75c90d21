"""Delayed scaling takes magnitudes over all ranks and micro-batches, so layouts train alike."""

from dataclasses import replace

import pytest
import torch

from megaswitch.config import FP8Config, RunConfig
from tests.distributed import layouts
from tests.distributed.equality import compare, train, train_alone
from tests.distributed.layouts import Case, config

STEPS = 3  # the first rounds nothing
FP8 = FP8Config(recipe="delayed", amax_history=4)

CASES = [
    layouts.case("tp2", sequence_parallel=True),
    layouts.case("ep2·tp2", ep_chunks=2, sequence_parallel=False),
    layouts.case("edp2·ep2", zero="full", micro_batches=2, activation_checkpointing=True),
    layouts.case("pp2·edp2", schedule="zero-bubble", micro_batches=4),
]


def in_fp8(case: Case, fp8: FP8Config = FP8) -> RunConfig:
    plain = config(case)
    return replace(plain, train=replace(plain.train, fp8=fp8))


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.grid))
def test_a_layout_trains_in_fp8_as_one_process_does(world, case):
    single = case.alone()
    (expected,) = world.run(1, train_alone, in_fp8(single), torch.float64, STEPS)
    outcomes = world.run(case.ranks, train, in_fp8(case), torch.float64, STEPS)
    assert compare(outcomes, expected, 1e-10, 1e-9) == {}
    (plain,) = world.run(1, train_alone, config(single), torch.float64, STEPS)
    differing = compare([expected], plain, 1e-10, 1e-9)
    assert differing.keys() == {"parameters"}, "the first step rounds nothing, the others do"
    maps = [name for name in plain.parameters if name.endswith(("wi.weight", "wo.weight"))]
    assert differing["parameters"].keys() >= set(maps)


@pytest.mark.parametrize("recipe", ["current", "block", "mxfp8"])
def test_scales_of_tensors_on_a_rank_stay_close(world, recipe):
    case = layouts.case("ep2·tp2", sequence_parallel=True)
    single = case.alone()
    fp8 = FP8Config(recipe=recipe)
    (expected,) = world.run(1, train_alone, in_fp8(single, fp8), torch.float32, 1)
    outcomes = world.run(case.ranks, train, in_fp8(case, fp8), torch.float32, 1)
    (plain,) = world.run(1, train_alone, config(single), torch.float32, 1)
    assert outcomes[0].loss == pytest.approx(expected.loss, rel=1e-2)
    assert outcomes[0].norm == pytest.approx(expected.norm, rel=0.1)
    assert expected.loss != plain.loss


@pytest.mark.parametrize("layout", ["tp2", "pp2·tp2", "edp2"])
def test_a_loss_that_makes_its_logits_is_the_same_under_layouts(world, layout):
    case = layouts.case(layout, **({"zero": "full"} if "edp" in layout else {}))
    single = case.alone()
    lazy = config(case)
    lazy = replace(lazy, train=replace(lazy.train, loss_tokens=5))
    (expected,) = world.run(1, train_alone, config(single), torch.float64, 2)
    outcomes = world.run(case.ranks, train, lazy, torch.float64, 2)
    assert compare(outcomes, expected, 1e-10, 1e-9) == {}
