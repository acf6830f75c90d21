"""The collectives of a training step are those that the formulas say, and no more."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from megaswitch.config import RunConfig
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.optim.build import clip_gradients
from megaswitch.train.objectives import BatchSize
from megaswitch.train.runner import Runner
from tests.distributed.equality import Training, batch, working_in
from tests.distributed.layouts import CLIP, DECODER, ENCODER, ROWS, Case, case, config
from tests.distributed.traffic import Traffic, counted, expected
from tests.distributed.world import World

LENGTHS = ENCODER, DECODER

PLANS: dict[str, Case] = {
    "dp": case("edp2", zero="none", micro_batches=2),
    "dp and edp": case("edp2·ep2", zero="none", capacity_mode="dropless"),
    "tp": case("tp2", sequence_parallel=False),
    "tp, sequence": case("tp4", sequence_parallel=True, micro_batches=2),
    "ep": case("ep4", zero="none", ep_chunks=1),
    "ep, chunks": case("ep2", zero="none", ep_chunks=2, micro_batches=2),
    "ep, dropless": case("ep4", zero="none", ep_chunks=1, capacity_mode="dropless"),
    "ep, dropless, chunks": case("ep2", zero="none", ep_chunks=2, capacity_mode="dropless"),
    "ep, no dropout": case("ep2", zero="none", dropout=0.0),
    "ep and tp": case("ep2·tp2", zero="none", sequence_parallel=False),
    "ep and tp, sequence": case("ep2·tp2", zero="none", sequence_parallel=True, ep_chunks=2),
    "ep and tp, dropless": case(
        "ep2·tp2", zero="none", sequence_parallel=True, capacity_mode="dropless"
    ),
    "pp": case("pp2", schedule="1f1b", micro_batches=2),
    "pp, untied": case("pp4", schedule="gpipe", micro_batches=4, tie_embeddings=False),
    "zero, full": case("edp2", zero="full", micro_batches=2),
    "zero, optimizer": case("edp2", zero="optimizer"),
}


def plan_config(case: Case) -> RunConfig:
    whole = config(case)
    if case.grid.pp == 1:
        return whole
    stages = [case.blocks // case.grid.pp] * case.grid.pp
    return replace(whole, parallel=replace(whole.parallel, layers_per_stage=stages))


def count(config: RunConfig, listen: Any = nullcontext) -> Traffic:
    """The second step's collectives on this rank: the first makes what stays.

    `listen` makes a context in which each step runs.
    """
    with working_in(torch.float64):
        training = Training.start(config)
        runner = Runner(config, training.mesh, training.parts)
        size = BatchSize(ROWS, int(whole_batch().decoder_mask.sum()))
        for step in range(2):
            micro = training.micro_batches(step)
            with counted(training.mesh) as traffic, listen():
                runner.backward(micro, size, lambda output, sums, one: None)
                training.parts.gradients.finish()
                clip_gradients(training.parts.parameters(), CLIP, training.mesh)
            training.parts.gradients.clear()
    return traffic


def whole_batch() -> Seq2SeqBatch:
    return batch(range(ROWS))


def measure(world: World, case: Case) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What all ranks counted, and the formulas."""
    chosen, total = plan_config(case), Traffic()
    for traffic in world.run(case.ranks, count, chosen):
        total.include(traffic)
    masks = whole_batch().encoder_mask, whole_batch().decoder_mask
    real = [int(mask.sum()) for mask in masks]
    return total.table(), expected(chosen, case.ranks, LENGTHS, real).table()


@pytest.mark.parametrize("plan", PLANS)
def test_collectives_are_those_of_the_formulas(world, plan):
    found, formulas = measure(world, PLANS[plan])
    assert found == formulas


@pytest.mark.parametrize("mode", ["group", "dropless"])
@pytest.mark.parametrize("sequence", [True, False])
def test_tensor_parallel_ranks_send_slices_of_a_token_not_copies(world, mode, sequence):
    """With twice the ranks over tp, no more bytes cross ep, keys and counts left aside."""
    options = {"zero": "none", "capacity_mode": mode, "dropout": 0.0, "ep_chunks": 1}
    single, _ = measure(world, case("ep2", **options, micro_batches=2))
    sliced, _ = measure(
        world, case("ep2·tp2", **options, micro_batches=2, sequence_parallel=sequence)
    )
    # Two ranks, two micro-batches, two Switch layers, counts of eight experts in int64.
    counts = 2 * 2 * 2 * 8 * 8
    key = "all_to_all", "ep"
    assert sliced[key][1] - 2 * counts == single[key][1] - counts
