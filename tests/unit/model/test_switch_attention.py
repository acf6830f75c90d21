"""Switch attention against plain loops, and decoding with it."""

import pytest
import torch

from megaswitch.config import ModelConfig, MoEConfig
from megaswitch.layers.noise import Noise
from megaswitch.log import UserError
from megaswitch.model.count import count
from megaswitch.model.routers import ROUTERS
from megaswitch.model.switch_attention import SwitchAttention
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.train.generate import generate
from tests.unit.model.router_checks import close, tiny_model
from tests.unit.model.test_routers import table

KINDS = ["linear", "ffn"]


def attention(kind, *, activation="relu", **moe) -> SwitchAttention:
    """In fp64 with weights of order one: two heads of size 3."""
    moe = {"num_experts": 3, "attention": kind, "min_capacity": 0} | moe
    config = ModelConfig(
        d_model=4, d_ff=5, d_kv=3, num_heads=2, activation=activation, moe=MoEConfig(**moe)
    )
    result = SwitchAttention(config, "encoder.1.self_attention").double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in result.parameters():
            weight.normal_(generator=generator)
    return result


def rows(batch, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 4, dtype=torch.float64, generator=generator)


def hidden(experts, e, token):
    """Of expert e, with any activation."""
    if not experts.gated:
        return torch.relu(experts.wi.weight[e] @ token)
    gate = torch.nn.functional.gelu(experts.wi_0.weight[e] @ token, approximate="tanh")
    return gate * (experts.wi_1.weight[e] @ token)


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize(
    ("kind", "activation"), [("linear", "relu"), ("ffn", "relu"), ("ffn", "gated-gelu")]
)
def test_queries_and_keys_are_those_of_a_tokens_experts(kind, activation, router):
    layer = attention(kind, activation=activation, router=router, rounds=2,
                      eval_capacity_factor=0.8)  # fmt: skip
    x, mask = rows(4, 6), torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    q, memory, routing = layer.project(x, mask, 3, None, 0)
    assert memory.keys is memory.values
    weights = torch.from_numpy(table(routing, (4, 6), 3))
    assert bool((weights == 0).all(-1).any())  # someone found all experts full
    experts = layer.switch.experts
    for row in range(4):
        for place in range(6):
            expected = {"q": torch.zeros(6).double(), "kv": torch.zeros(6).double()}
            for e in range(3):
                token = x[row, place]
                inner = token if kind == "linear" else hidden(experts, e, token)
                for name in expected:
                    matrix = experts.get_submodule(name).weight[e]
                    expected[name] += weights[row, place, e] * (matrix @ inner)
            close(q[row, :, place], (expected["q"] * 3**-0.5).view(2, 3).detach())
            close(memory.keys[row, :, place], expected["kv"].view(2, 3).detach())


def test_what_attention_makes_of_them():
    layer = attention("linear", capacity_mode="dropless")
    x, mask = rows(2, 5), torch.ones(2, 5, dtype=torch.bool)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, memory, _ = layer.project(x, mask, 1, None, 0)
    scores = torch.softmax(q @ memory.keys.transpose(-1, -2) + bias, -1)
    heads = (scores @ memory.keys).transpose(1, 2).flatten(2)
    close(layer.attend(q, memory, bias, None), (heads @ layer.o.weight.T).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(kind):
    layer = attention(kind, activation="gated-gelu", eval_capacity_factor=1.0)
    x, mask = rows(1, 6), torch.ones(1, 6, dtype=torch.bool)
    names, weights = zip(*layer.switch.named_parameters(), strict=True)
    weights = [weight.detach().clone().requires_grad_() for weight in weights]

    def outputs(x, *weights):
        for name, weight in zip(names, weights, strict=True):
            parent, _, leaf = name.rpartition(".")
            module = layer.switch.get_submodule(parent)
            module._parameters.pop(leaf, None)
            setattr(module, leaf, weight)
        q, memory, routing = layer.project(x, mask, 1, None, 0)
        return q, memory.keys, routing.aux_loss

    assert torch.autograd.gradcheck(outputs, (x.requires_grad_(), *weights))


@pytest.mark.parametrize(
    ("moe", "parts"),
    [
        ({}, ["ffn"]),
        ({"attention": "linear", "feed_forward": False}, ["self_attention"]),
        ({"attention": "linear"}, ["self_attention", "ffn"]),
    ],
)
def test_where_experts_are(moe, parts):
    """The three kinds of Table 10."""
    model = tiny_model(moe=moe)
    tokens = torch.arange(1, 11).view(2, 5)
    output = model(tokens, tokens)
    layers = ["encoder.1", "encoder.3", "decoder.1"]
    assert list(output.routing) == [f"{layer}.{part}" for layer in layers for part in parts]
    assert list(output.routing) == model.config.switch_layers()
    block = model.encoder.blocks[1]
    assert hasattr(block.self_attention, "switch") == ("self_attention" in parts)
    assert hasattr(block.ffn, "experts") == ("ffn" in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_checkpointing_change_nothing_they_should_not(kind):
    tokens, noise = torch.arange(1, 11).view(2, 5), Noise(0, 0, torch.arange(2))
    model = tiny_model(dropout=0.2, moe={"attention": kind, "router": "top-2"}).train()
    gradients = []
    for again in (False, True):
        model.set_activation_checkpointing(again)
        model.zero_grad()
        output = model(tokens, tokens, noise=noise)
        (output.logits.square().sum() + output.aux_loss).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        close(first, second)


ROUTED = [
    *({"attention": kind, "feed_forward": False} for kind in KINDS),
    {"attention": "ffn", "router": "ntlb", "rounds": 2},
    {"attention": "linear", "router": "top-2"},
    {"router": "top-2", "eval_second_policy": "threshold"},
]


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"beams": 3}], ids=str)
@pytest.mark.parametrize("moe", ROUTED, ids=str)
def test_decoding_with_a_cache_equals_decoding_without(moe, settings):
    model = tiny_model(3, moe=moe | {"decoder_sparse_step": 1})
    tokens = torch.arange(1, 19).view(3, 6)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 4:] = False
    cached, plain = (
        generate(model, tokens, encoder_mask=mask, max_tokens=9, cache=cache, **settings)
        for cache in (True, False)
    )
    assert torch.equal(cached.tokens, plain.tokens)
    close(cached.scores, plain.scores, 1e-9)
    assert len(cached.tokens.unique()) > 5 or "beams" in settings


def test_experts_that_choose_generate_only_behind_a_dense_decoder():
    tokens = torch.arange(2, 14).view(2, 6)
    with pytest.raises(UserError, match="those not yet written too"):
        generate(tiny_model(moe={"router": "expert-choice"}), tokens)
    model = tiny_model(moe={"router": "expert-choice", "decoder_sparse_step": 0})
    both = generate(model, tokens, max_tokens=5)
    alone = generate(model, tokens[1:], max_tokens=5)
    assert torch.equal(both.tokens[1:, : alone.tokens.shape[1]], alone.tokens)
    close(both.scores[1:], alone.scores, 1e-9)


# ---------------------------------------------------------------- counted


def test_top_2_counts_two_experts():
    base, moe = count(_preset("switch-base-128")), count(_preset("moe-base-128"))
    expert, layers = 4_718_592, 12
    assert moe.total_parameters == base.total_parameters
    assert moe.active_parameters - base.active_parameters == layers * expert
    extra = moe.forward_flops_per_sequence - base.forward_flops_per_sequence
    assert extra == 2 * expert * (512 + 114) * layers // 2


def _preset(name):
    from megaswitch.config import model_config

    return model_config(name)


@pytest.mark.parametrize(("kind", "own"), [("linear", 2 * 8 * 16), ("ffn", 8 * 6 + 2 * 6 * 16)])
def test_switch_attention_counts_one_expert(kind, own):
    """d_model 8, d_ff 6, 4 heads of size 4."""
    shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "d_model": 8, "d_ff": 6, "d_kv": 4}
    moe = {"num_experts": 5, "decoder_sparse_step": 0}
    shape |= {"num_heads": 4, "vocab_size": 19}
    dense, sparse = (
        ModelConfig(**shape, moe=MoEConfig(**moe, **more))
        for more in ({}, {"attention": kind, "feed_forward": False})
    )
    before, after = count(dense), count(sparse)
    router, ffn, projections = 5 * 8, 2 * 8 * 6, 3 * 8 * 16
    # One layer: 5 FFNs and a router became one FFN, q, k and v 5 experts and a router.
    assert after.total_parameters - before.total_parameters == 5 * own - projections - 4 * ffn
    assert after.active_parameters - before.active_parameters == own - projections
    assert router == sum(
        p.numel() for n, p in SwitchTransformer(sparse).named_parameters() if "router" in n
    )
    flops = after.forward_flops_per_sequence - before.forward_flops_per_sequence
    assert flops == 2 * (own - projections) * 512
