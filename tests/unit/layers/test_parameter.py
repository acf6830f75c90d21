"""Initial values: the paper's distributions, from streams that depend on (seed, name, expert)."""

import math

import pytest
import torch

from megaswitch.config import ModelConfig, MoEConfig
from megaswitch.layers.parameter import Init, scaled, stable_hash
from megaswitch.model.switch_transformer import SwitchTransformer

D_MODEL, D_KV, D_FF, HEADS, VOCAB, BUCKETS = 48, 10, 80, 6, 300, 32
SCALE = 0.1


def model(*, experts=4, seed=0, dtype=torch.float32, **changes):
    shape = {
        "vocab_size": VOCAB, "d_model": D_MODEL, "d_kv": D_KV, "d_ff": D_FF, "num_heads": HEADS,
        "num_encoder_layers": 2, "num_decoder_layers": 2, "relative_buckets": BUCKETS,
        "tie_embeddings": False, "activation": "gated-gelu", "init_scale": SCALE,
    }  # fmt: skip
    config = ModelConfig(**shape | changes, moe=MoEConfig(num_experts=experts))
    return SwitchTransformer(config).to(dtype).initialize(seed)


def deviation(end_of_name):
    """The σ that the paper and Mesh-TF give a parameter, and whether it is truncated at 2σ."""
    inner = HEADS * D_KV
    return {
        "router.weight": ((SCALE / D_MODEL) ** 0.5, True),
        "wi_0.weight": ((SCALE / D_MODEL) ** 0.5, True),
        "wi_1.weight": ((SCALE / D_MODEL) ** 0.5, True),
        "wo.weight": ((SCALE / D_FF) ** 0.5, True),
        "head.weight": ((SCALE / D_MODEL) ** 0.5, True),
        "q.weight": ((D_MODEL * D_KV) ** -0.5, False),
        "k.weight": (D_MODEL**-0.5, False),
        "v.weight": (D_MODEL**-0.5, False),
        "o.weight": (inner**-0.5, False),
        "embedding.weight": (1.0, False),
        "relative_bias.weight": (D_MODEL**-0.5, False),
    }[end_of_name]


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_every_parameter_of_a_model_has_its_distribution(scale):
    for name, weight in model(init_scale=scale).named_parameters():
        if "norm" in name:
            assert weight.eq(1).all(), name
            continue
        sigma, truncated = deviation(".".join(name.split(".")[-2:]))
        if truncated:
            sigma *= (scale / SCALE) ** 0.5
            assert weight.abs().max() <= 2 * sigma * (1 + 1e-6), name
        # ±2σ truncation leaves 0.8796 of the deviation.
        expected = 0.8796 * sigma if truncated else sigma
        values = weight.detach().double().flatten()
        error = 5 * expected / (2 * len(values)) ** 0.5
        assert abs(values.std().item() - expected) < error, name
        assert abs(values.mean().item()) < 5 * expected / len(values) ** 0.5, name


def test_a_dense_relu_model_is_scaled_too():
    dense = model(experts=0, activation="relu")
    wi, wo = dense.encoder.layers["0"].ffn.wi.weight, dense.encoder.layers["0"].ffn.wo.weight
    assert wi.std().item() == pytest.approx(0.8796 * (SCALE / D_MODEL) ** 0.5, rel=0.05)
    assert wo.std().item() == pytest.approx(0.8796 * (SCALE / D_FF) ** 0.5, rel=0.05)


def test_truncated_normal_has_the_shape_of_a_normal_inside_two_sigma():
    drawn = torch.empty(200_000)
    scaled(0.1, 10).fill_(drawn, torch.Generator().manual_seed(0))
    within = [(drawn.abs() < k * 0.1).double().mean().item() for k in (0.5, 1.0, 1.5, 2.0)]
    # erf(k/√2) / erf(√2); clamping instead of resampling would pile 5% up at 2σ.
    expected = [math.erf(k / 2**0.5) / math.erf(2**0.5) for k in (0.5, 1.0, 1.5, 2.0)]
    assert within == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("kind", "value"), [("constant", 0.25), ("normal", 3.0)])
def test_fill_overwrites_in_place(kind, value):
    tensor = torch.full((1000,), float("nan"))
    Init(kind, value).fill_(tensor, torch.Generator().manual_seed(0))
    assert tensor.isfinite().all()
    if kind == "constant":
        assert tensor.eq(value).all()
    else:
        assert tensor.std().item() == pytest.approx(value, rel=0.1)


def test_an_expert_is_the_same_whatever_the_number_of_experts():
    few, many = model(experts=2), model(experts=7)
    others = dict(many.named_parameters())
    for name, weight in few.named_parameters():
        if "experts" in name:
            assert torch.equal(weight, others[name][:2]), name
        elif "router" not in name:
            assert torch.equal(weight, others[name]), name


def test_experts_layers_and_parameters_differ():
    made = model()
    drawn = []
    for name, weight in made.named_parameters():
        if "norm" not in name:
            drawn += list(weight) if "experts" in name else [weight]
    starts = [weight.detach().flatten()[:8] / weight.std() for weight in drawn]
    for i, start in enumerate(starts):
        for other in starts[:i]:
            assert not torch.allclose(start, other, rtol=1e-3, atol=1e-3)


def test_a_seed_gives_the_same_model_and_another_seed_another():
    first, again, other = model(), model(), model(seed=1)
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == ("norm" in name), name


def test_a_part_of_the_stack_starts_as_the_whole():
    shallow, deep = model(num_encoder_layers=1), model(num_encoder_layers=5)
    others = dict(deep.named_parameters())
    for name, weight in shallow.named_parameters():
        assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_only_rounds(dtype):
    reference = model().parameters()
    for a, b in zip(reference, model(dtype=dtype).parameters(), strict=True):
        assert torch.equal(a.to(dtype), b)


def test_torchs_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = model()
    state = torch.get_rng_state()
    assert torch.equal(before, state)
    made.initialize(1)
    assert torch.equal(before, torch.get_rng_state())


def test_stable_hash_is_fixed():
    # Changing it would change every model that a seed stands for.
    assert stable_hash(0, "embedding.weight", 0) == 3155594986720529417
    assert 0 <= stable_hash("anything") < 2**63
    assert stable_hash("a", "b") != stable_hash("ab")
