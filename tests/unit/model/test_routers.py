"""Every router of `ROUTERS`: literal tables, random inputs against plain loops, hostile inputs."""

import inspect
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.config import MoEConfig
from megaswitch.layers.noise import Noise
from megaswitch.model.groups import Draws
from megaswitch.model.moe import group_tokens, into_groups
from megaswitch.model.router import Routing
from megaswitch.model.routers import ROUTERS
from tests.unit.model.other_router_checks import CHECKS, route
from tests.unit.model.router_checks import close, identity_router, layer
from tests.unit.model.router_oracle import plan

NAMES = list(ROUTERS)
MODES = {
    "switch": ["group", "hf", "dropless"],
    "top-2": ["group", "hf", "dropless"],
    "ntlb": ["group", "hf"],
    "expert-choice": ["group"],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(check):
    check()


def test_the_table_is_what_the_configuration_offers_and_the_tests_know():
    assert set(get_args(get_type_hints(MoEConfig)["router"])) == set(NAMES) == set(MODES)
    assert not any(inspect.isabstract(router) for router in ROUTERS.values())


# ---------------------------------------------------------------- random inputs, plain loops


@st.composite
def cases(draw, name):
    policies = st.sampled_from(["all", "none", "threshold", "random"])
    num_experts = draw(st.integers(2, 6))
    moe = {
        "router": name,
        "num_experts": num_experts,
        "capacity_mode": draw(st.sampled_from(MODES[name])),
        "train_capacity_factor": draw(st.sampled_from([0.3, 1.0, 1.25, 2.0])),
        "eval_capacity_factor": draw(st.sampled_from([0.5, 1.5, 9.0])),
        "min_capacity": draw(st.integers(0, 3)),
        "hf_capacity": draw(st.integers(1, 3)),
        "aux_loss_padding": draw(st.sampled_from(["scaled", "excluded"])),
        "train_second_policy": draw(policies),
        "eval_second_policy": draw(policies),
        "second_threshold": draw(st.sampled_from([0.1, 0.2, 0.4])),
        "rounds": draw(st.integers(2, num_experts)),
    }
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0.0, 3.0, (rows, length, num_experts))
    if draw(st.booleans()):
        logits = rng.integers(-3, 4, logits.shape) / 2.0  # ties are common
    mask = rng.random((rows, length)) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return moe, logits, mask, draw(st.integers(1, 4)), draw(st.booleans())


def table(routing: Routing, shape: tuple[int, int], num_experts: int) -> np.ndarray:
    """[B, L, E], what each expert's output is multiplied by in a token's result."""
    tokens = shape[0] * shape[1]
    expert, gate, kept = (
        routing.by_token(t, tokens).view(tokens, -1)
        for t in (routing.expert, routing.gate, routing.kept)
    )
    weight = torch.where(kept & (expert >= 0), gate, 0.0)
    sums = torch.zeros(tokens, num_experts, dtype=weight.dtype)
    sums.scatter_add_(1, expert.clamp(min=0), weight)
    return sums.view(*shape, num_experts).detach().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_a_router_equals_plain_loops(name):
    @settings(max_examples=80, deadline=None, database=None)
    @given(cases(name))
    def compare(case):
        moe, logits, mask, rows, training = case
        noise = Noise(3, 5, torch.arange(len(mask))) if training else None
        router = identity_router(**moe, training=training, exploration="argmax")
        draws = Draws(noise, "site", torch.Size(mask.shape), slice(0, mask.size), rows)
        grouped = into_groups(torch.from_numpy(logits), rows)
        groups = group_tokens(torch.from_numpy(mask), rows)
        routing = router(grouped, groups, draws)
        uniform = draws.uniform(".second", 1, torch.device("cpu")).flatten()[: mask.size]
        expected = plan(
            name, logits, mask, rows, MoEConfig(**moe), training, uniform.view(mask.shape).numpy()
        )
        close(table(routing, mask.shape, moe["num_experts"]), expected.sums(moe["num_experts"]))
        close(routing.aux_loss, expected.aux)
        close(routing.z_loss, expected.z)
        asked = routing.by_token(routing.expert, mask.size).view(mask.size, -1)
        wanted = [[one.expert for one in place] for row in expected.asked for place in row]
        assert [[e for e in row if e >= 0] for row in asked.tolist()] == wanted

    compare()


@pytest.mark.parametrize("name", NAMES)
def test_no_expert_takes_more_than_its_slots(name):
    logits = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(0)) * 3
    routing = route(logits, name, train_capacity_factor=0.7)
    assert routing.slots == 3 * 7
    for group in range(3):
        taken = routing.expert[group][routing.kept[group]]
        assert torch.bincount(taken, minlength=4).max() == 7


# ---------------------------------------------------------------- the layer around them


def one_row(ffn, x, mask=None):
    """Output, routing, and gradients of a Switch layer on x [S, d] as one row."""
    x = x.clone().requires_grad_()
    mask = torch.ones(1, len(x), dtype=torch.bool) if mask is None else mask
    y, routing = ffn(x[None], mask, 1, None)
    (y.sum() + routing.aux_loss + routing.z_loss).backward()
    for tensor in (
        y,
        routing.aux_loss,
        routing.z_loss,
        x.grad,
        *(p.grad for p in ffn.parameters()),
    ):
        assert tensor.isfinite().all()
    return y[0], routing, x.grad


def random_rows(tokens, d_model=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, d_model, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_gets_the_sum_of_its_experts_times_their_gates(name, activation):
    ffn = layer(num_experts=5, router=name, activation=activation, eval_capacity_factor=0.8).eval()
    x, mask = random_rows(24).view(4, 6, 4), torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    y, routing = ffn(x, mask, 3, None)  # the last group is ragged
    weights = torch.from_numpy(table(routing, (4, 6), 5))
    assert 0 < (weights != 0).sum() < 24
    experts = ffn.experts
    for row, place in np.ndindex(4, 6):
        token, expected = x[row, place], torch.zeros(4, dtype=torch.float64)
        for e in range(5):
            if activation == "relu":
                hidden = torch.relu(experts.wi.weight[e] @ token)
            else:
                gate = torch.nn.functional.gelu(experts.wi_0.weight[e] @ token, approximate="tanh")
                hidden = gate * (experts.wi_1.weight[e] @ token)
            expected += weights[row, place, e] * (experts.wo.weight[e] @ hidden)
        close(y[row, place], expected.detach())


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_alike(name):
    ffn = layer(num_experts=3, router=name, eval_second_policy="all", rounds=2).eval()
    y, routing, _ = one_row(ffn, torch.ones(6, 4, dtype=torch.float64))
    # Four slots each: floor(6 · 2.0 / 3). Two tokens are too many for the first choice.
    taken = torch.bincount(routing.expert[routing.kept], minlength=3).tolist()
    first = int(routing.probabilities[0, 0].argmax())
    assert taken[first] == 4
    assert sorted(taken) == {
        "switch": [0, 0, 4], "top-2": [0, 4, 4], "ntlb": [0, 2, 4], "expert-choice": [4, 4, 4]
    }[name]  # fmt: skip
    assert y[:4].ne(0).all()
    assert bool(y[4:].ne(0).any()) == (name == "ntlb")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["scaled", "excluded"])
def test_nothing_but_padding(name, padding):
    ffn = layer(router=name, aux_loss_padding=padding, train_second_policy="all", rounds=2)
    y, routing, x_grad = one_row(ffn, random_rows(6), torch.zeros(1, 6) > 0)
    assert not routing.kept.any()
    assert y.eq(0).all()
    assert x_grad.eq(0).all()
    assert routing.aux_loss == 0
    assert routing.z_loss == 0


@pytest.mark.parametrize("name", NAMES)
def test_capacity_zero_drops_everything(name):
    ffn = layer(num_experts=8, router=name, eval_capacity_factor=1.0, min_capacity=0).eval()
    y, routing, _ = one_row(ffn, random_rows(6))  # floor(6 / 8) slots
    assert not routing.kept.any()
    assert y.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_more_experts_than_tokens(name):
    ffn = layer(num_experts=50, router=name, min_capacity=1, eval_second_policy="all").eval()
    _, routing, _ = one_row(ffn, random_rows(3))
    taken = torch.bincount(routing.expert[routing.kept], minlength=50)
    assert taken.max() == 1


@pytest.mark.parametrize("name", NAMES)
def test_garbage_in_padding_reaches_nothing(name):
    ffn = layer(router=name, eval_capacity_factor=1.0).eval()
    x, mask = random_rows(8), torch.ones(1, 8, dtype=torch.bool)
    mask[0, 2], mask[0, 7] = False, False
    clean, routing, _ = one_row(ffn, x, mask)
    x[2], x[7] = 1e6, -1e6
    spoilt, other, _ = one_row(ffn, x, mask)
    assert torch.equal(clean[mask[0]], spoilt[mask[0]])
    assert clean[2].eq(0).all()
    assert spoilt[2].eq(0).all()
    assert torch.equal(routing.kept, other.kept) or name == "expert-choice"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(name, size, dtype):
    x = (torch.eye(4, dtype=dtype) * size)[None].requires_grad_()
    router = identity_router(4, router=name, eval_second_policy="all")
    routing = router(x, group_tokens(torch.ones(1, 4) > 0, 1), None)
    (routing.aux_loss + routing.z_loss + routing.gate.sum()).backward()
    assert x.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()
    columns = routing.by_token(routing.expert, 4).view(4, -1)
    for asked in columns.tolist():  # nobody asks an expert twice
        assert len({e for e in asked if e >= 0}) == len([e for e in asked if e >= 0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name):
    ffn = layer(router=name, eval_capacity_factor=1.0, eval_second_policy="threshold").eval()
    x = random_rows(8, seed=4)[None]
    mask = torch.tensor([[True] * 5 + [False] + [True] * 2])
    names, weights = zip(*ffn.named_parameters(), strict=True)

    def outputs(x, *weights):
        state = dict(zip(names, weights, strict=True))
        y, routing = torch.func.functional_call(ffn, state, (x, mask, 1, None))
        return y, routing.aux_loss, routing.z_loss

    ranked = ffn.router(x, group_tokens(mask, 1), None).probabilities.sort(-1).values
    assert ranked.diff(dim=-1).min() > 1e-4  # no choice flips within the differences
    weights = [weight.detach().clone().requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(), *weights))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "expert-choice"])
def test_a_row_alone_and_in_a_batch_without_limits(name):
    ffn = layer(router=name).eval()
    x, mask = random_rows(20).view(4, 5, 4), torch.ones(4, 5, dtype=torch.bool)
    whole, _ = ffn(x, mask, None, None)
    for row in range(4):
        alone, _ = ffn(x[row : row + 1], mask[:1], None, None)
        close(whole[row : row + 1], alone.detach())
    later, _ = ffn(x[:, 2:], mask[:, 2:], None, None, first=2)  # as decoding goes on
    close(whole[:, 2:], later.detach())
