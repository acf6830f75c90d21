"""Adafactor against hand-computed numbers, a slow numpy reference and Hugging Face's."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megaswitch.log import UserError
from megaswitch.optim import adafactor_math, native_adafactor
from megaswitch.optim.adafactor import Adafactor
from megaswitch.parallel.shard import declare


@pytest.fixture(params=["core", "torch"])
def way(request, monkeypatch):
    """Whole factored parameters are updated by the compiled core, or by torch as on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(native_adafactor, "suits", lambda *_: False)


def parameter(values, expert=False):
    values = torch.as_tensor(values).clone()
    axes = ["ep" if expert and dim == 0 else None for dim in range(values.ndim)]
    return declare(nn.Parameter(values), *axes)


def gradients(shape, steps, dtype=torch.float64, seed=0):
    """Gradients whose scale grows: from the second step on clipping is at work."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=dtype, generator=generator) * 3.0**step for step in range(steps)
    ]


def run(start, grads, expert=False, lr=0.02, **options):
    """The parameter after one step for each of `grads`, and its optimizer."""
    weight = parameter(start, expert)
    optimizer = Adafactor([weight], lr=lr, **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight, optimizer


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def reference(start, grads, lr, min_dim, joint=False, scaled=True, decay=0.0):
    """Adafactor as the paper's algorithms read, one expert and one step at a time, in float64.

    `start` and each of `grads` hold one array per expert.
    """
    weights = [np.asarray(w) for w in start]
    seconds = [None] * len(weights)
    for t, grad in enumerate(grads, start=1):
        beta2 = 1 - t**-0.8
        updates = []
        for e, g in enumerate(np.asarray(grad)):
            square = g**2 + 1e-30
            factored = g.ndim == 2 and min(g.shape) >= min_dim
            new = [square.sum(axis=1), square.sum(axis=0)] if factored else [square]
            old = seconds[e] or new
            seconds[e] = [beta2 * o + (1 - beta2) * n for o, n in zip(old, new, strict=True)]
            if factored:
                row, column = seconds[e]
                updates.append(g / np.sqrt(np.outer(row, column) / row.sum()))
            else:
                updates.append(g / np.sqrt(seconds[e][0]))
        everything = rms(np.stack(updates)), rms(np.stack(weights))
        for e, update in enumerate(updates):
            update_rms, weight_rms = everything if joint else (rms(update), rms(weights[e]))
            scale = lr * (max(1e-3, weight_rms) if scaled else 1.0) / max(1.0, update_rms)
            weights[e] = weights[e] * (1 - lr * decay) - scale * update
    return np.stack(weights)


def test_one_step_of_a_vector_by_hand():
    # First step: G² is its own mean, so U = sign(G), of RMS 1. RMS(W) = √12.5 = 3.5355339.
    weight, _ = run(
        torch.tensor([3.0, -4.0]).double(), [torch.tensor([1.0, -2.0]).double()], lr=0.1
    )
    assert weight.tolist() == pytest.approx([2.6464466094, -3.6464466094], abs=1e-10)


@pytest.mark.usefixtures("way")
def test_one_step_of_a_factored_matrix_by_hand():
    # Mean squares: rows 2.5, 12.5; columns 5, 10; all 7.5. U² = G²·7.5 / (row·column)
    # = [[.6, 1.2], [1.08, .96]], mean .96: not clipped. W = 0 is scaled by epsilon2 = 1e-3.
    grad = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).double()
    weight, optimizer = run(torch.zeros(2, 2).double(), [grad], lr=1.0, factored_min_dim=2)
    assert (weight.detach() * -1e3).flatten().tolist() == pytest.approx(
        [0.7745966692, 1.0954451150, 1.0392304845, -0.9797958971], abs=1e-9
    )
    state = optimizer.state[weight]
    assert state["row"].tolist() == pytest.approx([2.5, 12.5])
    assert state["column"].tolist() == pytest.approx([5.0, 10.0])
    assert state["step"].item() == 1


@pytest.mark.usefixtures("way")
def test_second_step_and_clipping_by_hand():
    # t = 1: β2 = 1 − 2^−0.8 = .4256508, G² = 4 after 1: mean 2.7230475, U = 1.2119993,
    # clipped to 1. W = 2, then 2 − 0.1·2 = 1.8, then 1.8 − 0.1·1.8 = 1.62.
    grads = [torch.tensor([1.0]).double(), torch.tensor([2.0]).double()]
    weight, optimizer = run(torch.tensor([2.0]).double(), grads, lr=0.1)
    assert weight.item() == pytest.approx(1.62, abs=1e-12)
    assert optimizer.state[weight]["moment"].item() == pytest.approx(2.7230475325, abs=1e-9)
    # Twice the threshold lets U pass: 1.8 − 0.1·1.8·1.2119993.
    weight, _ = run(torch.tensor([2.0]).double(), grads, lr=0.1, clip_threshold=2.0)
    assert weight.item() == pytest.approx(1.5818401182, abs=1e-9)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("shape", "factored"), [((11,), False), ((3, 9), False), ((6, 9), True), ((), False)]
)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"scale_by_parameter": False}])
def test_plain_parameters_match_the_reference(shape, factored, options):
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 5)
    weight, optimizer = run(start, grads, factored_min_dim=5, **options)
    scaled, decay = options.get("scale_by_parameter", True), options.get("weight_decay", 0.0)
    want = reference([start], [g[None] for g in grads], 0.02, 5, scaled=scaled, decay=decay)
    np.testing.assert_allclose(weight.detach().numpy(), want[0], rtol=1e-12, atol=1e-15)
    assert ("row" in optimizer.state[weight]) == factored


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", ["per-expert", "joint"])
@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 4, 9), (3, 7), (9, 6, 8)])
@pytest.mark.parametrize("chunk_bytes", [1, 8 << 20])
def test_stacks_match_the_reference(mode, shape, chunk_bytes, monkeypatch):
    monkeypatch.setattr(adafactor_math, "_SCRATCH_BYTES_CPU", chunk_bytes)
    sizes = torch.arange(1.0, shape[0] + 1).double().view(-1, *[1] * (len(shape) - 1))
    start = gradients(shape, 1, seed=1)[0] * sizes
    grads = [g * sizes.flip(0) for g in gradients(shape, 5)]
    options = {"weight_decay": 0.3, "factored_min_dim": 5, "expert_statistics": mode}
    weight, optimizer = run(start, grads, expert=True, **options)
    want = reference(start, grads, 0.02, 5, joint=mode == "joint", decay=0.3)
    np.testing.assert_allclose(weight.detach().numpy(), want, rtol=1e-12, atol=1e-15)
    if "row" in optimizer.state[weight]:
        assert optimizer.state[weight]["row"].shape == shape[:2]
        assert optimizer.state[weight]["column"].shape == (shape[0], shape[2])


def test_the_modes_differ():
    start = gradients((2, 4, 4), 1)[0] * torch.tensor([1.0, 10.0]).double().view(2, 1, 1)
    grads = gradients((2, 4, 4), 2)
    per_expert, _ = run(start, grads, expert=True)
    joint, _ = run(start, grads, expert=True, expert_statistics="joint")
    assert (per_expert - joint).abs().max() > 1e-3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(5, 257, 131), (4, 33), (3, 64, 1030)])
@pytest.mark.parametrize("chunk_bytes", [1, 300_000, 8 << 20])
def test_each_expert_is_a_parameter_of_its_own_to_the_bit(shape, chunk_bytes, monkeypatch):
    """Also: how the stack is cut into chunks changes nothing."""
    monkeypatch.setattr(adafactor_math, "_SCRATCH_BYTES_CPU", chunk_bytes)
    start = gradients(shape, 1, torch.float32, seed=1)[0]
    grads = gradients(shape, 4, torch.float32)
    stack, optimizer = run(start, grads, expert=True, weight_decay=0.1)
    for e in range(shape[0]):
        alone, other = run(start[e], [g[e] for g in grads], weight_decay=0.1)
        assert torch.equal(stack[e], alone)
        for name in set(other.state[alone]) - {"step"}:
            assert torch.equal(optimizer.state[stack][name][e], other.state[alone][name])


def test_joint_is_the_same_in_chunks(monkeypatch):
    start, grads = gradients((5, 130, 140), 1, seed=1)[0], gradients((5, 130, 140), 3)
    whole, _ = run(start, grads, expert=True, expert_statistics="joint")
    monkeypatch.setattr(adafactor_math, "_SCRATCH_BYTES_CPU", 2 * 130 * 140 * 8)
    chunked, _ = run(start, grads, expert=True, expert_statistics="joint")
    assert torch.equal(whole, chunked)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (150, 130), (7,)])
def test_agrees_with_hugging_face(shape, scaled):
    """Their Adafactor factors every matrix, so ours is told to; the rest is the same algorithm."""
    transformers = pytest.importorskip("transformers")
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 5)
    ours, _ = run(start, grads, factored_min_dim=1, scale_by_parameter=scaled)
    theirs = nn.Parameter(start.clone())
    optimizer = transformers.Adafactor(
        [theirs], lr=0.02, scale_parameter=scaled, relative_step=False, warmup_init=False
    )
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_keep_at_least_single_precision_through_a_round_trip(dtype):
    """A run that saves and loads continues to the bit, also when parameters are bfloat16."""
    shape = (2, 130, 140)
    start, grads = gradients(shape, 1, dtype, seed=1)[0], gradients(shape, 5, dtype)
    straight, _ = run(start, grads, expert=True)
    half, optimizer = run(start, grads[:3], expert=True)
    resumed = parameter(half.detach(), expert=True)
    fresh = Adafactor([resumed], lr=123.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wide = torch.promote_types(dtype, torch.float32)
    assert {name: value.dtype for name, value in fresh.state[resumed].items()} == {
        "step": torch.float32,
        "row": wide,
        "column": wide,
    }
    for grad in grads[3:]:
        resumed.grad = grad.clone()
        fresh.step()
    assert torch.equal(resumed, straight)


def test_distributed_checkpoint_state_dict_round_trip():
    def build():
        module = nn.Module()
        module.wide = parameter(gradients((130, 140), 1, seed=1)[0])
        module.scale = parameter(gradients((8,), 1, seed=2)[0])
        return module, Adafactor(module.parameters(), lr=0.02)

    def advance(module, optimizer, steps):
        for step in steps:
            module.wide.grad = gradients((130, 140), 6)[step]
            module.scale.grad = gradients((8,), 6)[step]
            optimizer.step()

    module, optimizer = build()
    advance(module, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
    assert set(saved["state"]["wide"]) == {"step", "row", "column"}
    resumed, fresh = build()
    resumed.load_state_dict(module.state_dict())
    set_optimizer_state_dict(resumed, fresh, saved)
    for pair in ((module, optimizer), (resumed, fresh)):
        advance(*pair, range(3, 6))
    assert torch.equal(module.wide, resumed.wide)
    assert torch.equal(module.scale, resumed.scale)


@pytest.mark.usefixtures("way")
def test_learning_rate_zero_changes_statistics_only():
    start, grads = gradients((4, 5), 1, seed=1)[0], gradients((4, 5), 2)
    weight, optimizer = run(start, grads, lr=0.0, weight_decay=0.1)
    assert torch.equal(weight.detach(), start)
    assert optimizer.state[weight]["moment"].min() > 0


@pytest.mark.usefixtures("way")
def test_zero_gradients_move_nothing():
    start = gradients((130, 140), 1, torch.float32)[0]
    weight, _ = run(start, [torch.zeros_like(start)] * 2)
    assert torch.equal(weight.detach(), start)


def test_parameters_without_gradient_are_passed_over():
    used, unused = parameter(torch.ones(3)), parameter(torch.ones(3))
    optimizer = Adafactor([used, unused], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.state[unused]
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.usefixtures("way")
def test_gradients_in_another_memory_order():
    grad = gradients((140, 130), 1)[0]
    start = gradients((130, 140), 1, seed=1)[0]
    assert torch.equal(run(start, [grad.t()])[0], run(start, [grad.t().contiguous()])[0])


def test_the_closure_is_called_with_gradients():
    weight = parameter(torch.ones(3))
    optimizer = Adafactor([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert [optimizer.step(closure), optimizer.step(closure)] == pytest.approx([3.0, 2.43])


def test_unknown_expert_statistics():
    with pytest.raises(UserError, match="'global'"):
        Adafactor([parameter(torch.ones(2))], lr=0.1, expert_statistics="global")
