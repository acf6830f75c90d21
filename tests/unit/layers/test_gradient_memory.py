"""Memory of gradients is used again when, and only when, nothing refers to it any more."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaswitch.layers import linear
from megaswitch.layers.gradient_memory import GradientMemory
from megaswitch.layers.linear import GroupedLinear, grouped_linear
from megaswitch.layers.parameter import Init


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_dtype_are_as_asked(dtype):
    asked = torch.zeros(3, 4, 5, dtype=dtype).transpose(0, 2)
    made = GradientMemory().empty_like(asked)
    assert (made.shape, made.dtype) == (asked.shape, dtype)
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0


def test_memory_that_nothing_refers_to_is_used_again():
    memory, like = GradientMemory(), torch.zeros(4, 5)
    address = memory.empty_like(like).data_ptr()
    assert memory.empty_like(like).data_ptr() == address
    assert memory.empty_like(torch.zeros(20)).data_ptr() == address
    assert memory.empty_like(torch.zeros(10, dtype=torch.float64)).data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t,
        lambda t: t[1:, 2],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: torch.utils.dlpack.to_dlpack(t),
    ],
    ids=["tensor", "view", "detached", "numpy", "storage", "dlpack"],
)
def test_memory_that_is_referred_to_is_not(keep):
    memory, like = GradientMemory(), torch.zeros(4, 5)
    first = memory.empty_like(like)
    address, kept = first.data_ptr(), keep(first)
    del first
    assert memory.empty_like(like).data_ptr() != address
    del kept
    assert memory.empty_like(like).data_ptr() == address


def test_blocks_of_sizes_gone_by_are_dropped():
    memory = GradientMemory()
    for size in range(1, 20):
        memory.empty_like(torch.zeros(size))
    assert len(memory._blocks) == 1


def test_two_threads_never_share_memory():
    memory, like, taken = GradientMemory(), torch.zeros(8), []

    def take():
        for _ in range(200):
            taken.append(memory.empty_like(like))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({t.data_ptr() for t in taken}) == 800


@pytest.fixture
def layer():
    made = GroupedLinear(3, 4, 5, shard="column", init=Init("normal", 1.0))
    torch.manual_seed(0)
    torch.nn.init.normal_(made.weight)
    return made


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def inputs(seed):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def expected(seed):
    """The gradient of `loss`, by hand."""
    weight = torch.zeros(3, 5, 4)
    x = inputs(seed)
    for expert, rows in ((0, slice(0, 2)), (2, slice(2, 5))):
        weight[expert] = torch.ones(5, rows.stop - rows.start) @ x[rows]
    return weight


def loss(layer, seed):
    return layer(inputs(seed), ENDS).sum()


def test_steps_use_the_same_memory_whatever_it_held(layer):
    loss(layer, 0).backward()
    address = layer.weight.grad.data_ptr()
    layer.weight.grad.fill_(float("nan"))  # also where the next step's expert has no rows
    layer.zero_grad()
    loss(layer, 1).backward()
    assert layer.weight.grad.data_ptr() == address
    torch.testing.assert_close(layer.weight.grad, expected(1))


def test_an_old_gradient_that_is_kept_stays_as_it_was(layer):
    loss(layer, 0).backward()
    kept = layer.weight.grad
    layer.zero_grad()
    loss(layer, 1).backward()
    torch.testing.assert_close(kept, expected(0))
    torch.testing.assert_close(layer.weight.grad, expected(1))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_add_up(layer, set_to_none):
    for start in (0, 3):
        layer.zero_grad(set_to_none)
        for seed in range(start, start + 3):
            loss(layer, seed).backward()
        total = sum(expected(seed) for seed in range(start, start + 3))
        torch.testing.assert_close(layer.weight.grad, total)


def test_adding_up_takes_one_block_more_for_all_layers_together():
    linear._MEMORY.forget()
    layers = [GroupedLinear(3, 4, 4, shard="column", init=Init("constant", 1.0)) for _ in range(4)]
    for one in layers:
        torch.nn.init.ones_(one.weight)
    for _ in range(3):
        x = inputs(0).requires_grad_()
        for one in layers:
            x = one(x, ENDS)
        x.sum().backward()
    assert len(linear._MEMORY._blocks) == 5


def test_asking_for_a_gradient_leaves_the_stored_one_alone(layer):
    loss(layer, 0).backward()
    (asked,) = torch.autograd.grad(loss(layer, 1), layer.weight)
    torch.testing.assert_close(asked, expected(1))
    torch.testing.assert_close(layer.weight.grad, expected(0))


def test_a_weight_used_twice_gets_both_gradients(layer):
    (loss(layer, 0) + loss(layer, 1)).backward()
    torch.testing.assert_close(layer.weight.grad, expected(0) + expected(1))


def test_a_graph_gone_through_twice_adds_twice(layer):
    value = loss(layer, 0)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * expected(0))


def test_hooks_see_and_may_replace_the_gradient(layer):
    seen = []
    layer.weight.register_hook(lambda grad: grad * 2)
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for seed in (0, 1):
        layer.zero_grad()
        loss(layer, seed).backward()
        torch.testing.assert_close(seen[-1], 2 * expected(seed))


def test_recomputation_gives_the_same_gradient(layer):
    for seed in (0, 1):
        layer.zero_grad()
        x = inputs(seed).requires_grad_()
        checkpoint(layer, x, ENDS, use_reentrant=False).sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected(seed))


def test_autocast_gradients_of_successive_steps(layer):
    for seed in (0, 1):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(layer, seed)
        value.backward()
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.weight.grad, expected(seed), rtol=0.02, atol=0.02)


def test_memory_goes_with_the_layers():
    made = GroupedLinear(2, 4, 5, shard="row", init=Init("constant", 1.0))
    torch.nn.init.ones_(made.weight)
    grouped_linear(inputs(0), made.weight, ENDS[:2]).sum().backward()
    made.zero_grad()
    assert linear._MEMORY._blocks
    del made
    assert not linear._MEMORY._blocks
