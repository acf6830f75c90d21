"""Expert parallelism under the worst of routings, and garbage in all memory that is not data."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

from megaswitch.config import RunConfig
from megaswitch.model.router import Router
from megaswitch.parallel.expert_parallel import Shipment
from megaswitch.train.parts import Parts
from tests.distributed.equality import Outcome, Routings, Training, compare, working_in
from tests.distributed.layouts import Case, Grid, Structure, case, config

# Multiples of nothing: tokens of a row, rows of a group, features and hidden units of a rank.
LENGTHS = 11, 7
GROUP = 3
ROWS = 12
MODEL = {"d_model": 10, "d_ff": 14, "num_heads": 2, "d_kv": 3,
         "num_encoder_layers": 2, "num_decoder_layers": 2}  # fmt: skip

# The experts that tokens like, of as many as there are.
ONE, FIRST_RANK, SOME = (4,), (0, 1), (0, 3, 5)


def exchange_config(case: Case, experts: int) -> RunConfig:
    moe = {"num_experts": experts, "group_size": GROUP * LENGTHS[0], "encoder_sparse_step": 1,
           "decoder_sparse_step": 1}  # fmt: skip
    changed = config(case, moe=moe, **MODEL)
    train = replace(changed.train, batch_size=ROWS, micro_batch_size=ROWS // case.grid.dp)
    return replace(changed, train=train)


def prefer(parts: Parts, liked: tuple[int, ...]) -> None:
    """Let every token go to one of the experts `liked`.

    Features that are alike in all embeddings are a bias to the router: several, as dropout takes
    some from a token.
    """
    with torch.no_grad():
        parts.weights["embedding.weight"].local[:, :5] = 5.0
        for model in parts.models.values():
            for module in model.modules():
                if isinstance(module, Router):
                    module.weight[:, :5] = -1.0
                    module.weight[list(liked), :5] = 1.0


def step(config: RunConfig, liked: tuple[int, ...], poison: bool) -> Outcome:
    with working_in(torch.float64), poisoned() if poison else nullcontext():
        return Training.start(config, LENGTHS, lambda parts: prefer(parts, liked)).steps(1)


def step_alone(config: RunConfig, liked: tuple[int, ...]) -> tuple[Outcome, Routings]:
    with working_in(torch.float64):
        training = Training.start(config, LENGTHS, lambda parts: prefer(parts, liked))
        routings = Routings(training.parts)
        return training.steps(1), routings


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill all new memory with NaN, and the slots that no row fills, in both directions."""
    pack, unpack = Shipment.pack, Shipment.unpack

    def spoil(self: Shipment, parts: list[Tensor]) -> list[Tensor]:
        if self.slots is None:
            return parts
        empty = (self._row_of_slot < 0)[:, None].chunk(self.chunks)
        assert any(mask.any() for mask in empty)
        return [part.masked_fill(mask, torch.nan) for part, mask in zip(parts, empty, strict=True)]

    def pack_spoiled(self: Shipment, rows: Tensor) -> list[Tensor]:
        parts = pack(self, rows)
        return spoil(self, parts) if rows.is_floating_point() else parts

    def unpack_spoiled(self: Shipment, parts: list[Tensor]) -> Tensor:
        if self.slots is not None:
            for number, part in enumerate(parts):
                mask = (self._row_of_slot < 0)[:, None].chunk(self.chunks)[number]
                part.register_hook(lambda grad, mask=mask: grad.masked_fill(mask, torch.nan))
        return unpack(self, spoil(self, list(parts)))

    torch.use_deterministic_algorithms(True)  # which alone lets torch fill new memory
    assert deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    try:
        with (
            mock.patch.object(Shipment, "pack", pack_spoiled),
            mock.patch.object(Shipment, "unpack", unpack_spoiled),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["group", "dropless"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("liked", [ONE, FIRST_RANK, SOME], ids=["one", "first rank", "some"])
@pytest.mark.parametrize("layout", ["ep2", "ep2·tp2"])
def test_extreme_routings_train_as_in_one_process(world, layout, liked, chunks, mode):
    chosen = case(layout, capacity_mode=mode, activation="gated-gelu")
    compare_step(world, chosen, liked, 6, chunks, poison=False)


@pytest.mark.parametrize("mode", ["group", "dropless"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("layout", ["ep4", "ep2·tp2", "ep2·tp2 whole"])
def test_what_buffers_held_before_does_not_matter(world, layout, chunks, mode):
    options = {"sequence_parallel": False} if layout.endswith("whole") else {}
    chosen = case(layout, capacity_mode=mode, activation="gated-gelu", **options)
    compare_step(world, chosen, SOME, 8, chunks, poison=True)


def compare_step(
    world: Any, chosen: Case, liked: tuple[int, ...], experts: int, chunks: int, *, poison: bool
) -> None:
    single = exchange_config(Case(Grid(), Structure(), chosen.free), experts)
    ((expected, routings),) = world.run(1, step_alone, single, liked)
    # As extreme as it was meant to be.
    taken = [{e for e, number in enumerate(tokens) if number} for tokens in routings.tokens]
    assert set.union(*taken) == set(liked)
    assert routings.margin > 1e-9
    parallel = exchange_config(chosen, experts)
    parallel = replace(parallel, parallel=replace(parallel.parallel, ep_chunks=chunks))
    found = world.run(chosen.ranks, step, parallel, liked, poison)
    assert compare(found, expected, 1e-10, 1e-9) == {}


def test_unfilled_memory_would_be_seen():
    with poisoned():
        assert torch.ones(3).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
