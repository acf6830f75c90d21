"""Dispatch: queue positions and the permutation by expert, against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.model.dispatch import Dispatch, queue_positions


@st.composite
def choices(draw):
    """Experts [G, S], a mask [G, S], and the number of experts."""
    num_experts = draw(st.integers(1, 6))
    groups, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(num_experts, (groups, tokens), generator=generator)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return expert, torch.rand(groups, tokens, generator=generator) < share, num_experts


@settings(max_examples=150, deadline=None, database=None)
@given(choices())
def test_positions_count_earlier_candidates_of_the_group_and_expert(case):
    expert, candidates, num_experts = case
    positions = queue_positions(expert, candidates, num_experts)
    assert positions.shape == expert.shape
    for group, row in enumerate(expert.tolist()):
        waiting = [0] * num_experts
        for token, chosen in enumerate(row):
            if candidates[group, token]:
                assert positions[group, token] == waiting[chosen]
                waiting[chosen] += 1


def test_positions_of_a_literal_table():
    expert = torch.tensor([[0, 1, 0, 0, 1, 2], [1, 1, 1, 0, 0, 1]])
    candidates = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    positions = queue_positions(expert, candidates, 3)
    expected = torch.tensor([[0, 0, -1, 1, 1, 0], [0, 1, 2, 0, 1, -1]])
    assert torch.equal(positions[candidates], expected[candidates])


@settings(max_examples=150, deadline=None, database=None)
@given(choices())
def test_order_is_by_expert_then_position_with_the_rest_behind(case):
    expert, kept, num_experts = case
    dispatch = Dispatch.by_expert(expert, kept, num_experts)
    flat_expert, flat_kept = expert.flatten().tolist(), kept.flatten().tolist()
    everyone = range(len(flat_expert))
    order, ends = [], []
    for e in range(num_experts):
        order += [t for t in everyone if flat_kept[t] and flat_expert[t] == e]
        ends.append(len(order))
    order += [t for t in everyone if not flat_kept[t]]
    assert dispatch.order.tolist() == order
    assert dispatch.ends.tolist() == ends
    assert dispatch.ends.dtype == torch.int32  # what F.grouped_mm takes
    assert dispatch.inverse[dispatch.order].tolist() == list(everyone)


@settings(max_examples=50, deadline=None, database=None)
@given(choices())
def test_gather_and_restore_are_inverse(case):
    expert, kept, num_experts = case
    dispatch = Dispatch.by_expert(expert, kept, num_experts)
    x = torch.randn(expert.numel(), 3)
    assert torch.equal(dispatch.gather(x), x[dispatch.order])
    assert torch.equal(dispatch.restore(dispatch.gather(x)), x)
    assert torch.equal(dispatch.gather(dispatch.restore(x)), x)


@pytest.mark.parametrize("way", ["gather", "restore"])
def test_gradients(way):
    expert = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    kept = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()
    move = getattr(Dispatch.by_expert(expert, kept, 3), way)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(move, x)
    weight = torch.randn(7, 3, dtype=torch.float64)
    (move(x) * weight).sum().backward()
    moved = move(torch.eye(7, dtype=torch.float64))
    assert torch.equal(x.grad, moved.T @ weight)


def test_none_kept():
    dispatch = Dispatch.by_expert(torch.tensor([[1, 0, 2]]), torch.zeros(1, 3).bool(), 3)
    assert dispatch.order.tolist() == [0, 1, 2]
    assert dispatch.ends.tolist() == [0, 0, 0]


def test_all_kept():
    dispatch = Dispatch.by_expert(torch.tensor([[1, 0, 2, 1]]), torch.ones(1, 4).bool(), 3)
    assert dispatch.order.tolist() == [1, 0, 3, 2]
    assert dispatch.inverse.tolist() == [1, 0, 3, 2]
    assert dispatch.ends.tolist() == [1, 3, 4]
