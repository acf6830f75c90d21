"""What routers do at random in training (Table 11), and how precisely they compute (Table 2)."""

import pytest
import torch

from megaswitch.config import MoEConfig
from megaswitch.layers.noise import Noise
from megaswitch.model.groups import Draws, group_tokens
from megaswitch.model.routers import ROUTERS
from tests.unit.model.router_checks import close, identity_router, layer, tiny_model

EXPLORATIONS = ["argmax", "sample", "input-dropout", "jitter"]


def draws_for(shape, noise=None, **changes):
    tokens = slice(0, shape[0] * shape[1])
    return Draws(noise, "site", torch.Size(shape), tokens, 1, **changes)


def route(logits, exploration, *, noise=True, **moe):
    """Route logits [B, L, E], a group for each row, by a router whose input is its logits."""
    router = identity_router(logits.shape[-1], training=noise, exploration=exploration, **moe)
    source = Noise(1, 2, torch.arange(len(logits))) if noise else None
    groups = group_tokens(torch.ones(logits.shape[:2]) > 0, 1)
    return router(logits, groups, draws_for(logits.shape[:2], source))


@pytest.mark.parametrize(
    ("router", "usual"),
    [("switch", "jitter"), ("ntlb", "jitter"), ("top-2", "argmax"), ("expert-choice", "argmax")],
)
def test_mesh_tf_perturbs_top_1_routing_alone(router, usual):
    assert MoEConfig(num_experts=4, router=router).exploration == usual
    assert MoEConfig(num_experts=4, router=router, exploration="jitter").exploration == "jitter"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampled_experts_follow_the_softmax(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    tokens = 40_000
    routing = route(
        logits.expand(40, tokens // 40, 4), "sample", temperature=temperature,
        capacity_mode="dropless",
    )  # fmt: skip
    share = torch.bincount(routing.expert.flatten(), minlength=4) / tokens
    expected = torch.softmax(logits / temperature, -1)
    deviation = (expected * (1 - expected) / tokens).sqrt()
    assert ((share - expected).abs() < 4 * deviation).all()
    # The gate is the expert's own probability, whatever the temperature.
    close(routing.gate, torch.softmax(logits, -1)[routing.expert])


def test_the_balance_loss_counts_sampled_experts():
    logits = torch.zeros(1, 64, 4, dtype=torch.float64)
    routing = route(logits, "sample", capacity_mode="dropless")
    assert len(routing.expert.unique()) == 4
    share = torch.bincount(routing.expert[0], minlength=4) / 64
    close(routing.aux_loss, 4 * (share * 0.25).sum())


def test_input_dropout_zeroes_a_tenth_and_scales_the_rest():
    x = torch.ones(8, 500, 4, dtype=torch.float64)
    router = identity_router(4, training=True, exploration="input-dropout")
    logits = router._logits(x, draws_for((8, 500), Noise(1, 2, torch.arange(8))))
    assert set(logits.unique().tolist()) == {0.0, torch.tensor(1.0).double().div(0.9).item()} or (
        logits[logits > 0].sub(1 / 0.9).abs().max() < 1e-7
    )
    assert (logits == 0).double().mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_training_alone_explores(exploration):
    logits = torch.randn(4, 50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = route(logits, "argmax", jitter=0.5)
    loud = route(logits, exploration, jitter=0.5)
    quiet = route(logits, exploration, noise=False, jitter=0.5)
    assert torch.equal(plain.expert, loud.expert) == (exploration == "argmax")
    assert torch.equal(plain.expert, quiet.expert)
    assert torch.equal(loud.expert, route(logits, exploration, jitter=0.5).expert)


@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_exploration_does_not_depend_on_how_a_batch_is_cut(exploration):
    moe = {"exploration": exploration, "jitter": 0.5, "capacity_mode": "dropless"}
    model = tiny_model(moe=moe).train()
    tokens = torch.arange(20).view(4, 5) % 19
    whole = model(tokens, tokens, noise=Noise(0, 3, torch.arange(4))).logits
    parts = [
        model(tokens[r : r + 1], tokens[r : r + 1], noise=Noise(0, 3, torch.tensor([r]))).logits
        for r in range(4)
    ]
    close(whole, torch.cat(parts).detach(), 1e-10)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert-choice"])
def test_evaluation_of_a_row_depends_on_that_row(name):
    model = tiny_model(moe={"router": name, "rounds": 2, "group_size": 5})
    tokens = torch.arange(20).view(4, 5) % 19
    whole = model(tokens, tokens).logits
    close(whole[2:3], model(tokens[2:3], tokens[2:3]).logits.detach(), 1e-10)


def test_evaluation_draws_by_layer_and_place():
    cpu = torch.device("cpu")
    draws = draws_for((3, 8)).uniform(".second", 1, cpu).view(3, 8)
    assert torch.equal(draws[0], draws[1])
    assert len(draws[0].unique()) == 8
    assert torch.equal(draws[:, 5:], draws_for((3, 3), first=5).uniform(".second", 1, cpu)[..., 0])
    wide = draws_for((3, 8)).uniform(".x", 4, cpu)
    assert torch.equal(wide[:, 5:], draws_for((3, 3), first=5).uniform(".x", 4, cpu))


# ---------------------------------------------------------------- precision


def precise(precision, x, **moe):
    """Route x [1, S, 32] among 64 experts by a router with weights of order one."""
    ffn = layer(num_experts=64, d_model=32, router_precision=precision, **moe).float()
    return ffn.router(x, group_tokens(torch.ones(x.shape[:2]) > 0, 1), None)


@pytest.mark.parametrize("router", ["switch", "ntlb"])
def test_a_bf16_router_sends_tokens_elsewhere(router):
    moe = {"router": router, "rounds": 2, "capacity_mode": "hf", "hf_capacity": 2000}
    x = torch.randn(1, 2000, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = precise("selective", x.double(), **moe)
    selective, bf16 = precise("selective", x, **moe), precise("bf16", x, **moe)
    assert selective.gate.dtype == torch.float32
    assert bf16.gate.dtype == bf16.aux_loss.dtype == torch.bfloat16
    assert torch.equal(selective.expert, exact.expert)
    assert (bf16.expert != exact.expert).sum() > 10


def test_a_bf16_router_cannot_tell_a_small_imbalance():
    # A load of 28, 24, 24 and 24 %, and sure of it: the loss is 4 · Σ f² = 1.0048. The next number
    # above 1 in bf16 is 1.0078.
    experts = torch.tensor([0] * 28 + [1] * 24 + [2] * 24 + [3] * 24)
    logits = 50 * torch.nn.functional.one_hot(experts, 4).float()[None]
    losses = {}
    for precision in ("selective", "bf16"):
        router = identity_router(4, router_precision=precision)
        groups = group_tokens(torch.ones(1, 100) > 0, 1)
        losses[precision] = router(logits, groups, None).aux_loss.item()
    assert losses["selective"] == pytest.approx(1.0048, abs=1e-5)
    assert abs(losses["bf16"] - 1.0048) > 2e-3


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_layer_in_fp32_ignores_autocast(router):
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.bool)
    outputs = {}
    for precision in ("selective", "fp32"):
        ffn = layer(num_experts=3, router=router, router_precision=precision, rounds=2).float()
        plain, _ = ffn.eval()(x, mask, 1, None)
        with torch.autocast("cpu", torch.bfloat16):
            cast, _ = ffn(x, mask, 1, None)
        outputs[precision] = plain, cast
    plain, cast = outputs["fp32"]
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    plain, cast = outputs["selective"]
    assert not torch.equal(plain, cast.float())
