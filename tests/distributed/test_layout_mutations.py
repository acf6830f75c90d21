"""Bugs that such trainers have had, planted one by one: the comparison finds each, and where."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from megaswitch.config import RunConfig
from megaswitch.layers import noise, vocab
from megaswitch.model.router import SwitchRouter
from megaswitch.optim import build
from megaswitch.parallel import gradients, tensor_parallel
from megaswitch.parallel.mesh import Mesh
from megaswitch.train import runner
from megaswitch.train.parts import Parts
from tests.distributed.equality import Outcome, compare, train, train_alone
from tests.distributed.layouts import Case, case, config

EVERYTHING = ""
SEQUENCE = case("tp2", sequence_parallel=True)
TENSOR = case("tp2", sequence_parallel=False)
DATA = case("edp2", zero="none", micro_batches=4)
PIPELINE = case("pp4", schedule="1f1b", micro_batches=4)
EXPERT = case("ep2", zero="none", capacity_mode="dropless")


def no_sum_over_tp_of(kind: str) -> Any:
    original = gradients._Buckets.__init__

    def forgetful(self: Any, weights: list[Any], axis: Any) -> None:
        kept = [w for w in weights if axis.name != "tp" or not re.search(kind, w.name)]
        original(self, kept, axis)

    return mock.patch.object(gradients._Buckets, "__init__", forgetful)


def untied(kind: str) -> Any:
    original = gradients._Ties.__init__

    def forgetful(self: Any, tied: Any, mesh: Any) -> None:
        original(self, [(w, ranks) for w, ranks in tied if not re.search(kind, w.name)], mesh)

    return mock.patch.object(gradients._Ties, "__init__", forgetful)


def aux_loss_times(factor: int) -> Any:
    original = runner.training_loss

    def scaled(output: Any, batch: Any, whole: Any, config: RunConfig, *rest: Any) -> Any:
        moe = config.model.moe
        moe = replace(moe, aux_loss_weight=moe.aux_loss_weight * factor)
        changed = replace(config, model=replace(config.model, moe=moe))
        return original(output, batch, whole, changed, *rest)

    return mock.patch.object(runner, "training_loss", scaled)


def aux_loss_forgotten_before_the_last_stage() -> Any:
    return mock.patch.object(runner, "attach", lambda x, loss: x.clone())


def experts_summed_over_dp() -> Any:
    original = Mesh.axis
    return mock.patch.object(
        Mesh, "axis", lambda self, name: original(self, "dp" if name == "edp" else name)
    )


def replicated_parameters_counted_by_all() -> Any:
    original = build.block_of
    return mock.patch.object(build, "block_of", lambda p: replace(original(p), counts=True))


def no_sum_of_gradients_where_ranks_divide_work() -> Any:
    return mock.patch.object(tensor_parallel, "whole_to_terms", lambda x, axis: x)


def gate_without_gradient() -> Any:
    original = SwitchRouter.forward

    def forward(self: Any, *args: Any) -> Any:
        routing = original(self, *args)
        return replace(routing, gate=routing.gate.detach())

    return mock.patch.object(SwitchRouter, "forward", forward)


def dropout_by_rank() -> Any:
    original = noise.stable_hash
    return mock.patch.object(noise, "stable_hash", lambda *parts: original(*parts, dist.get_rank()))


def weights_by_rank() -> Any:
    original = Parts.initialize
    return mock.patch.object(
        Parts, "initialize", lambda self, seed: original(self, seed + dist.get_rank())
    )


def targets_off_by_one_beyond_the_first_rank() -> Any:
    apply = vocab._TargetScores.apply

    def shifted(logits: Any, targets: Any, first: int, tp: Any) -> Any:
        return apply(logits, targets, first + 1 if first else 0, tp)

    return mock.patch.object(vocab, "_TargetScores", SimpleNamespace(apply=shifted))


@contextmanager
def zero_averages() -> Iterator[None]:
    with (
        mock.patch.object(FSDPModule, "set_gradient_divide_factor", return_value=None),
        mock.patch.object(FSDPModule, "set_force_sum_reduction_for_comms", return_value=None),
    ):
        yield


@dataclass(frozen=True)
class Planted:
    """A bug.

    Attributes:
        case: where it is planted.
        bug: makes it, while the model is built and trained.
        gradients: pattern of the parameters whose gradients must be found wrong.
        alone: whether all others must be found right.
        numbers: which of loss, auxiliary and norm must be found wrong, and no other.
    """

    case: Case
    bug: Callable[..., Any]
    gradients: str | None
    alone: bool
    numbers: frozenset[str]
    arguments: tuple[Any, ...] = field(default=())


def planted(
    case: Case, bug: Callable[..., Any], *args: Any, wrong: str | None, numbers: str,
    alone: bool = False,
) -> Planted:  # fmt: skip
    return Planted(case, bug, wrong, alone, frozenset(numbers.split()), args)


BUGS = {
    "router gradients not summed over tp":
        planted(SEQUENCE, no_sum_over_tp_of, r"router", wrong="router", alone=True, numbers="norm"),
    "norm gradients not summed over tp":
        planted(SEQUENCE, no_sum_over_tp_of, r"norm", wrong="norm", alone=True, numbers="norm"),
    "gradients not summed in front of column-parallel matrices":
        planted(TENSOR, no_sum_of_gradients_where_ranks_divide_work, wrong=r"norm|router|embedding",
                numbers="norm"),
    "aux loss times dp": planted(DATA, aux_loss_times, 2, wrong="router", numbers="loss norm"),
    "aux loss times accumulation":
        planted(DATA, aux_loss_times, 4, wrong="router", numbers="loss norm"),
    "aux loss times tp":
        planted(SEQUENCE, aux_loss_times, 2, wrong="router", numbers="loss norm"),
    "aux loss forgotten before the last stage":
        planted(PIPELINE, aux_loss_forgotten_before_the_last_stage, wrong=r"encoder.*router",
                numbers="norm"),
    "expert gradients summed over dp":
        planted(EXPERT, experts_summed_over_dp, wrong=r"experts", alone=True, numbers="norm"),
    "encoder's relative bias not tied":
        planted(PIPELINE, untied, r"encoder.relative_bias", wrong=r"encoder.relative_bias",
                alone=True, numbers="norm"),
    "decoder's relative bias not tied":
        planted(PIPELINE, untied, r"decoder.relative_bias", wrong=r"decoder.relative_bias",
                alone=True, numbers="norm"),
    "embedding not tied":
        planted(PIPELINE, untied, r"embedding", wrong=r"embedding", alone=True, numbers="norm"),
    "replicated parameters counted twice in the norm":
        planted(TENSOR, replicated_parameters_counted_by_all, wrong=None, alone=True,
                numbers="norm"),
    "gate without gradient": planted(EXPERT, gate_without_gradient, wrong="router", numbers="norm"),
    "dropout drawn by rank":
        planted(TENSOR, dropout_by_rank, wrong=EVERYTHING, numbers="loss auxiliary norm"),
    "weights drawn by rank":
        planted(DATA, weights_by_rank, wrong=EVERYTHING, numbers="loss auxiliary norm"),
    "targets off by one beyond the first rank's vocabulary":
        planted(TENSOR, targets_off_by_one_beyond_the_first_rank, wrong=EVERYTHING,
                numbers="loss norm"),
    "ZeRO averages":
        planted(case("edp2", zero="full"), zero_averages, wrong=r"experts|router|embedding",
                numbers="norm"),
}  # fmt: skip


def train_with(bug: str, config: RunConfig) -> Outcome:
    plan = BUGS[bug]
    with plan.bug(*plan.arguments):
        return train(config, torch.float64, 1)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_named(world, bug):
    plan = BUGS[bug]
    single = config(plan.case.alone())
    (expected,) = world.run(1, train_alone, single, torch.float64, 1)
    outcomes = world.run(plan.case.ranks, train_with, bug, config(plan.case))
    found = compare(outcomes, expected, 1e-10, 1e-9)
    assert found["numbers"].keys() == plan.numbers
    named = found.get("gradients", {}).keys()
    guilty = {
        name for name in expected.gradients
        if plan.gradients is not None and re.search(plan.gradients, name)
    }  # fmt: skip
    assert guilty or plan.gradients is None
    assert named == guilty if plan.alone else guilty <= named
    assert found["parameters"]
