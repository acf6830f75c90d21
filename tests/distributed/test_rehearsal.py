"""A rank rehearsed on shapes sends, and holds, what a real one does."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megaswitch.config import RunConfig
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.train.objectives import BatchSize, MicroBatch
from megaswitch.train.runner import Runner
from tests.distributed.equality import Training, working_in
from tests.distributed.layouts import CLIP, Case, case, config
from tests.distributed.test_collectives_counted import count, plan_config
from tests.distributed.traffic import Traffic
from tests.distributed.world import World

SENT: dict[str, Case] = {
    "dp and edp": case("edp2·ep2", zero="none", micro_batches=4),
    "tp": case("tp2", sequence_parallel=False),
    "ep and tp, sequence": case("ep2·tp2", zero="none", sequence_parallel=True, ep_chunks=2),
    "ep and tp, hf": case("ep2·tp2", zero="none", sequence_parallel=False, capacity_mode="hf"),
    "pp": case("pp2", schedule="1f1b", micro_batches=2),
    "pp, many micro-batches": case("pp2", schedule="1f1b", micro_batches=4),
    "pp, zero-bubble": case("pp2·ep2", schedule="zero-bubble", zero="none", micro_batches=4),
    "pp, zero": case("pp2·edp2", schedule="1f1b", zero="full", micro_batches=4),
    "zero, full": case("edp2", zero="full", micro_batches=4),
}


def tiers(cases: dict[str, Case], short: set[str]) -> list[Any]:
    """Names of cases, those that are not `short` for the long tier."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in cases]


def sent(run: RunConfig, ranks: int, rank: int, reads: Sequence[Any] = ()) -> dict[Any, Any]:
    """Calls and bytes of a rehearsed rank, as `Traffic.table` has them."""
    with working_in(torch.float64):
        step = rehearse_rank(run, ranks, rank, "cpu", reads)
    found: dict[Any, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for kind, calls in step.collectives.items():
        key = kind.operation, kind.axis
        found[key] = found[key][0] + calls, found[key][1] + calls * kind.size
    return dict(found)


@pytest.mark.parametrize("name", tiers(SENT, {"ep and tp, sequence", "pp"}))
def test_bytes_of_each_collective_are_those_of_a_real_run(world: World, name: str):
    chosen = SENT[name]
    run = plan_config(chosen)
    for rank, traffic in enumerate(world.run(chosen.ranks, count, run)):
        assert sent(run, chosen.ranks, rank) == traffic.table()


DROPLESS: dict[str, Case] = {
    "ep": case("ep4", zero="none", ep_chunks=1, capacity_mode="dropless"),
    "ep, chunks": case("ep2", zero="none", ep_chunks=2, capacity_mode="dropless"),
    "ep and tp": case("ep2·tp2", zero="none", sequence_parallel=True, capacity_mode="dropless"),
}


def count_and_read(run: RunConfig) -> tuple[Traffic, list[Any]]:
    """A step's collectives, and what the host read of its routing."""
    reads: list[Any] = []
    tolist = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> Any:
        reads.append(tolist(tensor))
        return reads[-1]

    @contextmanager
    def listen() -> Iterator[None]:
        reads.clear()
        with mock.patch.object(torch.Tensor, "tolist", read):
            yield

    return count(run, listen), reads


@pytest.mark.parametrize("name", tiers(DROPLESS, {"ep, chunks"}))
def test_without_capacity_bytes_are_those_of_the_same_routing(world: World, name: str):
    chosen = DROPLESS[name]
    run = plan_config(chosen)
    for rank, (traffic, reads) in enumerate(world.run(chosen.ranks, count_and_read, run)):
        assert sent(run, chosen.ranks, rank, reads) == traffic.table()
        assert sent(run, chosen.ranks, rank) != traffic.table()  # routing is not even


HELD: dict[str, Case] = {
    "alone": case("", activation_checkpointing=False),
    "alone, selective": case("", activation_checkpointing="selective"),
    "alone, recomputed": case("", activation_checkpointing=True),
    "dp": case("edp2", zero="none", optimizer="adafactor"),
    "zero, optimizer": case("edp2", zero="optimizer"),
    "zero, full": case("edp2", zero="full", activation_checkpointing=True),
    "ep": case("ep2", zero="none", activation="gated-gelu"),
    "tp": case("tp2", sequence_parallel=True),
    "ep and tp": case("ep2·tp2", zero="none", sequence_parallel=True),
    "ep and tp, whole sequence": case("ep2·tp2", zero="none", sequence_parallel=False),
    "pp": case("pp2", schedule="1f1b", micro_batches=2),
    "pp and ep": case("pp2·ep2", schedule="1f1b", zero="none", micro_batches=2),
}
_MARK = 12_345_677  # bytes that nothing else asks for
_LENGTHS = 96, 64


def sized(case: Case) -> RunConfig:
    """The run of a case, but large enough that tensors outweigh what kernels use inside."""
    sizes = {"vocab_size": 997, "d_model": 64, "d_ff": 256, "d_kv": 16}
    run = config(case, **sizes, moe={"group_size": 2 * _LENGTHS[0]})
    run = replace(run, data=replace(run.data, encoder_length=96, decoder_length=64))
    if case.grid.pp == 1:
        return run
    stages = [case.blocks // case.grid.pp] * case.grid.pp
    return replace(run, parallel=replace(run.parallel, layers_per_stage=stages))


def unpadded(micro: MicroBatch) -> MicroBatch:
    """Rows as span corruption fills them."""
    return replace(micro, inputs=replace(micro.inputs, encoder_mask=None, decoder_mask=None))


def measure_peak(run: RunConfig) -> int:
    """Bytes that the allocator had given out at most, in the leanest of some steps.

    gloo's threads hold copies of what travels for as long as they take, which is not ours.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        training = Training.start(run, _LENGTHS)
        runner = Runner(run, training.mesh, training.parts)
        optimizer = build_optimizer(training.parts.parameters(), run.optim)
        size = BatchSize(run.train.batch_size, run.train.batch_size * _LENGTHS[1])
        for step in range(6):
            if step >= 2:
                torch.empty(_MARK, dtype=torch.uint8)
            micro = [unpadded(one) for one in training.micro_batches(step)]
            runner.backward(micro, size, lambda *_: None)
            training.parts.gradients.finish()
            clip_gradients(training.parts.parameters(), CLIP, training.mesh)
            optimizer.step()
            training.parts.gradients.clear()
    events = profile.profiler.kineto_results.events()
    memory = sorted(
        (e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"
    )
    live, peaks = 0, [0]
    for _, _, size_of in memory:
        live += size_of
        if size_of == -_MARK:
            peaks.append(live)
        peaks[-1] = max(peaks[-1], live)
    return min(peaks[1:])


@pytest.mark.parametrize("name", tiers(HELD, {"zero, optimizer"}))
def test_peak_memory_is_that_of_a_real_run(world: World, name: str):
    chosen = HELD[name]
    run = sized(chosen)
    measured = world.run(chosen.ranks, measure_peak, run)
    for rank in range(chosen.ranks):
        peak = rehearse_rank(run, chosen.ranks, rank, "cpu").peak
        print(f"{name:<16} rank {rank}: {peak / 1e6:8.2f} MB, {peak / measured[rank] - 1:+.1%}")
        assert peak == pytest.approx(measured[rank], rel=0.05)
