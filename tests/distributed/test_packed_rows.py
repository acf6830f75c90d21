"""Rows of several documents train alike under every kind of layout."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megaswitch.layers.noise import Noise
from megaswitch.train.objectives import MicroBatch
from tests.distributed import layouts
from tests.distributed.equality import CPU, Outcome, Training, compare, working_in
from tests.distributed.layouts import config

CASES = [
    layouts.case("tp2", sequence_parallel=True),
    layouts.case("edp2·ep2", zero="full", activation_checkpointing=True),
    layouts.case("pp2·tp2", schedule="1f1b", sequence_parallel=False, micro_batches=2),
    layouts.case("pp2·ep2·tp2", sequence_parallel=True, micro_batches=2),
]


class PackedTraining(Training):
    """The same tokens, each row cut into two documents."""

    packed = True

    def micro_batches(self, step: int) -> list[MicroBatch]:
        whole = super().micro_batches(step)
        return [self._cut(micro, step) for micro in whole] if self.packed else whole

    @staticmethod
    def _cut(micro: MicroBatch, step: int) -> MicroBatch:
        batch = micro.batch
        segments = [
            (mask * (1 + (torch.arange(mask.shape[1]) >= 3 + batch.sample_index[:, None] % 3)))
            for mask in (batch.encoder_mask, batch.decoder_mask)
        ]
        batch = replace(batch, encoder_segments=segments[0], decoder_segments=segments[1])
        return MicroBatch.of(batch, CPU, Noise(1, step, batch.sample_index))


class WholeTraining(PackedTraining):
    """Each row one document."""

    packed = False


def train(config: Any, kind: type[Training]) -> Outcome:
    with working_in(torch.float64):
        return kind.start(config).steps(2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.grid))
def test_packed_rows_train_as_in_one_process(world, case):
    single = case.alone()
    (expected,) = world.run(1, train, config(single), PackedTraining)
    (whole,) = world.run(1, train, config(single), WholeTraining)
    assert abs(expected.loss - whole.loss) > 1e-4, "segments must matter here"
    outcomes = world.run(case.ranks, train, config(case), PackedTraining)
    assert compare(outcomes, expected, 1e-10, 1e-9) == {}
