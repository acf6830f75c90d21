"""The router: literal tables, random inputs against plain loops, hostile inputs, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.config import MoEConfig
from megaswitch.layers.noise import Noise
from megaswitch.model.moe import SwitchFFN, group_tokens, into_groups
from megaswitch.model.router import SwitchRouter, expert_capacity
from tests.unit.model.router_checks import (
    CHECKS,
    close,
    config,
    identity_router,
    layer,
    oracle,
    route_table,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check):
    check()


# ---------------------------------------------------------------- literal tables


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "minimum", "slots"),
    [
        (1024, 8, 1.0, 4, 128),
        (1024, 8, 1.25, 4, 160),
        (1024, 8, 2.0, 4, 256),
        (1000, 128, 1.25, 4, 9),  # 9.77 rounds down
        (10, 4, 1.25, 0, 3),  # 3.125
        (1824, 128, 1.25, 4, 17),  # 17.8, the decoder group of switch-base-128
        (8192, 128, 1.25, 4, 80),
        (4096, 64, 4.0, 2, 256),
        (2048, 2048, 1.0, 2, 2),  # the minimum binds
        (64, 32, 1.0, 4, 4),
        (64, 32, 1.0, 0, 2),
        (8, 32, 1.0, 0, 0),
        (16, 1, 1.25, 4, 16),  # the group binds
        (16, 4, 8.0, 0, 16),
        (3, 1, 2.0, 4, 4),  # the minimum wins over the group, as in Mesh-TF
    ],
)
def test_capacity(tokens, experts, factor, minimum, slots):
    assert expert_capacity(tokens, experts, factor, minimum) == slots


@pytest.mark.parametrize(
    ("slots", "kept"),
    [
        (1, [True, True, False, False, True, False]),
        (2, [True, True, True, False, True, False]),
        (3, [True, True, True, True, True, False]),
        (4, [True, True, True, True, True, True]),
    ],
)
@pytest.mark.parametrize("mode", ["group", "hf"])
def test_kept_tokens_by_number_of_slots(mode, slots, kept):
    choice = {"hf_capacity": slots} if mode == "hf" else {"eval_capacity_factor": slots / 2}
    assert route_table([True] * 6, capacity_mode=mode, **choice).kept.tolist() == [kept]


@pytest.mark.parametrize("mask", [[True] * 6, [True, False, False, True, True, True]])
def test_dropless_keeps_all_but_padding(mask):
    assert route_table(mask, capacity_mode="dropless").kept.tolist() == [mask]


@pytest.mark.parametrize(
    ("probabilities", "aux"),
    [
        ([[1 / 3, 1 / 3, 1 / 3]] * 6, 1.0),  # ties all go to expert 0, P is even
        ([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]] * 2, 1.0),  # even load
        ([[0.9, 0.05, 0.05]] * 6, 2.7),  # collapsed: E · P of the one expert
        ([[0.98, 0.01, 0.01]] * 6, 2.94),
        ([[0.6, 0.4, 0.0]] * 3 + [[0.2, 0.8, 0.0]] * 3, 1.5),
    ],
)
def test_balance(probabilities, aux):
    logits = torch.tensor(probabilities, dtype=torch.float64).log().clamp(min=-1e3)
    routing = identity_router(3)(logits[None], group_tokens(torch.ones(1, 6) > 0, 1), None)
    close(routing.aux_loss, aux)


def test_a_ragged_last_group_has_its_own_capacity_and_weight():
    # Rows of three tokens, all to expert 0 of two: C = 3 for the group of six, 1 for that of three.
    logits = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand(3, 3, 2)
    router = identity_router(2, eval_capacity_factor=1.0, min_capacity=0)
    groups = group_tokens(torch.ones(3, 3, dtype=torch.bool), 2)
    assert groups.sizes == (6, 3)
    routing = router(into_groups(logits, 2), groups, None)
    assert routing.kept.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    close(routing.aux_loss, 1.8)


def test_hf_capacity_is_per_row():
    logits = torch.tensor([[[2.0, 1.0]] * 3, [[2.0, 1.0]] * 3])
    router = identity_router(2, capacity_mode="hf", hf_capacity=2)
    routing = router(logits, group_tokens(torch.ones(2, 3, dtype=torch.bool), 1), None)
    assert routing.kept.tolist() == [[True, True, False]] * 2


# ---------------------------------------------------------------- random inputs, plain loops


@st.composite
def cases(draw):
    moe = {
        "num_experts": draw(st.integers(1, 6)),
        "capacity_mode": draw(st.sampled_from(["group", "hf", "dropless"])),
        "train_capacity_factor": draw(st.sampled_from([0.3, 1.0, 1.25, 2.0])),
        "eval_capacity_factor": draw(st.sampled_from([0.5, 1.5, 9.0])),
        "min_capacity": draw(st.integers(0, 3)),
        "hf_capacity": draw(st.integers(1, 3)),
        "aux_loss_padding": draw(st.sampled_from(["scaled", "excluded"])),
    }
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.integers(-3, 4, (rows, length, moe["num_experts"])) / 2.0  # ties are common
    if draw(st.booleans()):
        logits = rng.normal(0.0, 3.0, logits.shape)
    mask = rng.random((rows, length)) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return moe, logits, mask, draw(st.integers(1, 4)), draw(st.booleans())


@settings(max_examples=200, deadline=None, database=None)
@given(cases())
def test_router_equals_plain_loops(case):
    moe, logits, mask, rows_per_group, training = case
    expert, gate, kept, aux, z = oracle(logits, mask, rows_per_group, MoEConfig(**moe), training)
    router = identity_router(**moe, training=training)
    grouped = into_groups(torch.from_numpy(logits), rows_per_group)
    routing = router(grouped, group_tokens(torch.from_numpy(mask), rows_per_group), None)

    def by_row(tensor):
        return tensor.flatten()[: mask.size].view(mask.shape)

    assert by_row(routing.expert).tolist() == expert.tolist()
    assert by_row(routing.kept).tolist() == kept.tolist()
    assert not routing.kept.flatten()[mask.size :].any()
    close(by_row(routing.gate), gate)
    close(routing.aux_loss, aux)
    close(routing.z_loss, z)


# ---------------------------------------------------------------- hostile inputs


def one_row(ffn, x, mask=None):
    """Output, routing, and gradients of a Switch layer on x [S, d] as one row."""
    x = x.clone().requires_grad_()
    mask = torch.ones(1, len(x), dtype=torch.bool) if mask is None else mask
    y, routing = ffn(x[None], mask, 1, None)
    (y.sum() + routing.aux_loss + routing.z_loss).backward()
    assert y.isfinite().all()
    assert routing.aux_loss.isfinite()
    assert routing.z_loss.isfinite()
    for tensor in (x, *ffn.parameters()):
        assert tensor.grad.isfinite().all()
    return y[0], routing, x.grad


@pytest.mark.parametrize("mode", ["group", "hf", "dropless"])
def test_all_tokens_to_one_expert(mode):
    ffn = layer(num_experts=3, capacity_mode=mode, hf_capacity=2).eval()
    x = torch.rand(6, 4, dtype=torch.float64)
    with torch.no_grad():
        ffn.router.weight[:] = torch.tensor([[0.0], [5.0], [0.0]])
    y, routing, _ = one_row(ffn, x)
    assert routing.expert.unique().tolist() == [1]
    kept = {"group": 4, "hf": 2, "dropless": 6}[mode]  # floor(6 · 2.0 / 3), 2 slots, all
    assert routing.kept.tolist() == [[True] * kept + [False] * (6 - kept)]
    assert y[kept:].eq(0).all()
    for name, weight in ffn.experts.named_parameters():
        assert weight.grad[1].ne(0).any(), name
        assert weight.grad[[0, 2]].eq(0).all(), name


@pytest.mark.parametrize("padding", ["scaled", "excluded"])
def test_nothing_but_padding(padding):
    ffn = layer(aux_loss_padding=padding)
    y, routing, x_grad = one_row(ffn, torch.rand(6, 4).double(), torch.zeros(1, 6) > 0)
    assert not routing.kept.any()
    assert y.eq(0).all()
    assert x_grad.eq(0).all()
    assert routing.aux_loss == 0
    assert routing.z_loss == 0


def test_capacity_zero_drops_everything():
    ffn = layer(num_experts=8, eval_capacity_factor=1.0, min_capacity=0).eval()
    y, routing, _ = one_row(ffn, torch.rand(6, 4).double())  # floor(6 / 8) slots
    assert not routing.kept.any()
    assert y.eq(0).all()


def test_one_expert_takes_everything_with_gate_one():
    y, routing, _ = one_row(layer(num_experts=1).eval(), torch.rand(6, 4).double())
    assert routing.kept.all()
    assert routing.gate.eq(1).all()
    close(routing.aux_loss, 1.0)
    assert y.ne(0).any(1).all()


def test_more_experts_than_tokens():
    ffn = layer(num_experts=50, min_capacity=1).eval()
    _, routing, _ = one_row(ffn, torch.rand(3, 4).double())
    seen = set()
    for expert, kept in zip(routing.expert[0].tolist(), routing.kept[0].tolist(), strict=True):
        assert kept == (expert not in seen)
        seen.add(expert)


@pytest.mark.parametrize("logits", [[[0.0, 0.0, 0.0]], [[-1.0, 2.0, 2.0]], [[3.0, 1.0, 3.0]]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_lowest_index(logits, dtype):
    x = torch.tensor(logits, dtype=dtype).expand(1, 40, 3)
    routing = identity_router(3)(x, group_tokens(torch.ones(1, 40) > 0, 1), None)
    assert routing.expert.unique().item() == logits[0].index(max(logits[0]))


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(size, dtype):
    x = (torch.eye(4, dtype=dtype) * size)[None].requires_grad_()
    router = identity_router(4)
    routing = router(x, group_tokens(torch.ones(1, 4) > 0, 1), None)
    assert routing.expert.tolist() == [[0, 1, 2, 3] if size > 0 else [1, 0, 0, 0]]
    losses = routing.aux_loss + routing.z_loss + routing.gate.sum()
    losses.backward()
    assert losses.isfinite()
    assert x.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


# ---------------------------------------------------------------- precision


def random_route(dtype, *, autocast=False):
    router = SwitchRouter(config(16, num_experts=8)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    x = torch.randn(1, 64, 16, generator=generator).bfloat16().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return router(x, group_tokens(torch.ones(1, 64) > 0, 1), None)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_computation(dtype, computed):
    routing = random_route(dtype)
    for name in ("gate", "probabilities", "aux_loss", "z_loss"):
        assert getattr(routing, name).dtype == computed, name


def test_autocast_leaves_the_router_alone():
    plain, autocast = random_route(torch.float32), random_route(torch.float32, autocast=True)
    for name in ("gate", "probabilities", "aux_loss", "z_loss", "expert"):
        assert torch.equal(getattr(plain, name), getattr(autocast, name)), name


def test_a_bf16_layer_returns_bf16():
    ffn = SwitchFFN(config(8, num_experts=2), "site").bfloat16()
    torch.nn.init.normal_(ffn.router.weight)
    for weight in ffn.experts.parameters():
        torch.nn.init.normal_(weight)
    y, routing = ffn(torch.randn(1, 6, 8).bfloat16(), torch.ones(1, 6) > 0, 1, None)
    assert y.dtype == torch.bfloat16
    assert routing.gate.dtype == torch.float32


# ---------------------------------------------------------------- gradients


def separated(ffn, tokens, *, margin=0.3, seed=0):
    """Inputs [1, tokens, 4] whose two best probabilities differ by `margin` at least."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50 * tokens, 4, dtype=torch.float64, generator=generator)
    best = torch.softmax(x @ ffn.router.weight.T, -1).topk(2).values
    x = x[best[:, 0] - best[:, 1] > margin][:tokens]
    assert len(x) == tokens
    return x[None].detach()


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("mode", ["group", "hf", "dropless"])
@pytest.mark.parametrize("padding", ["scaled", "excluded"])
def test_gradients_equal_finite_differences(activation, mode, padding):
    ffn = layer(
        activation=activation, capacity_mode=mode, aux_loss_padding=padding, hf_capacity=2,
        eval_capacity_factor=1.0,
    ).eval()  # fmt: skip
    x = separated(ffn, 8)
    mask = torch.tensor([[True] * 5 + [False] + [True] * 2])
    names, weights = zip(*ffn.named_parameters(), strict=True)

    def outputs(x, *weights):
        state = dict(zip(names, weights, strict=True))
        y, routing = torch.func.functional_call(ffn, state, (x, mask, 1, None))
        return y, routing.aux_loss, routing.z_loss

    _, routing = ffn(x, mask, 1, None)
    assert bool((routing.kept != mask).any()) == (mode != "dropless")
    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(), *weights))


def test_gate_alone_teaches_the_router():
    ffn = layer(capacity_mode="dropless")
    y, _ = ffn(separated(ffn, 6), torch.ones(1, 6) > 0, 1, None)
    y.square().sum().backward()
    assert ffn.router.weight.grad.ne(0).all()


@pytest.mark.parametrize("padding", ["scaled", "excluded"])
def test_aux_loss_gradient_flows_through_probabilities_only(padding):
    router = identity_router(3, aux_loss_padding=padding)
    logits = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True, False]])
    groups = group_tokens(mask, 1)
    router(logits, groups, None).aux_loss.backward()

    x = logits.detach().clone().requires_grad_()
    p = torch.softmax(x, -1)
    counted = torch.ones(1, 6) > 0 if padding == "scaled" else mask
    weight = counted.double() / counted.sum()
    share = 4 / 6 if padding == "scaled" else 1.0
    f = (torch.nn.functional.one_hot(p.argmax(-1), 3) * weight[..., None]).sum((0, 1))
    (3 * share * (f * (p * weight[..., None]).sum((0, 1))).sum()).backward()
    close(logits.grad, x.grad)


def test_dropped_and_padding_tokens_touch_nothing():
    ffn = layer(num_experts=2, eval_capacity_factor=1.0).eval()
    x = separated(ffn, 8, seed=3)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 2] = False

    def run(x):
        ffn.zero_grad()
        x = x.clone().requires_grad_()
        y, routing = ffn(x, mask, 1, None)
        y.sum().backward()
        return y, routing.kept, x.grad, [weight.grad for weight in ffn.parameters()]

    y, kept, x_grad, grads = run(x)
    assert bool((~kept & mask).any())
    assert y[~kept].eq(0).all()
    assert x_grad[~kept].eq(0).all()
    assert x_grad[kept].ne(0).any(-1).all()
    longer = torch.where(kept[..., None], x, 3 * x)  # same experts, other values
    y_longer, kept_longer, _, grads_longer = run(longer)
    assert torch.equal(kept, kept_longer)
    assert torch.equal(y, y_longer)
    for grad, other in zip(grads, grads_longer, strict=True):
        assert torch.equal(grad, other)


# ---------------------------------------------------------------- training and evaluation


def test_capacity_factor_of_training_and_evaluation():
    logits = torch.tensor([[[1.0, 0.0]] * 8])
    groups = group_tokens(torch.ones(1, 8) > 0, 1)
    router = identity_router(2, train_capacity_factor=0.5, eval_capacity_factor=1.0, min_capacity=0)
    assert router.train()(logits, groups, None).kept.sum() == 2
    assert router.eval()(logits, groups, None).kept.sum() == 4


@pytest.mark.parametrize(("jitter", "differs"), [(0.5, True), (0.0, False)])
def test_jitter_needs_noise_and_a_rate(jitter, differs):
    ffn = layer(jitter=jitter, capacity_mode="dropless")
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 5, dtype=torch.bool)
    plain, again = (ffn(x, mask, 2, None)[1].probabilities for _ in range(2))
    assert torch.equal(plain, again)
    noise = Noise(0, 0, torch.arange(2))
    first, second = (ffn(x, mask, 2, noise)[1].probabilities for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, plain) != differs


def test_jitter_factors_stay_in_range_and_fill_it():
    eps = 0.25
    seen = []
    router_input = torch.ones(2, 64, 4, dtype=torch.float64)
    ffn = layer(num_experts=4, jitter=eps)
    with torch.no_grad():
        ffn.router.weight.copy_(torch.eye(4))
    ffn.router.register_forward_pre_hook(lambda module, args: seen.append(args))
    ffn(router_input, torch.ones(2, 64) > 0, 2, Noise(0, 0, torch.arange(2)))
    ((x, _, draws),) = seen
    factors = ffn.router._jitter_factors(x, draws)
    assert factors.shape == (1, 128, 4)
    assert 1 - eps <= factors.min() < 1 - 0.95 * eps
    assert 1 + 0.95 * eps < factors.max() < 1 + eps
