"""Low-rank adapters: nothing at the start, merged as unmerged, alone in the gradient."""

import pytest
import torch

from megaswitch.config import LoRAConfig, ModelConfig, MoEConfig
from megaswitch.model.adapters import merge_adapters
from megaswitch.model.switch_transformer import SwitchTransformer

PLAIN = ModelConfig(
    vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2, activation="gated-gelu", moe=MoEConfig(num_experts=4),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(lora=None):
    from dataclasses import replace

    config = replace(PLAIN, lora=lora) if lora else PLAIN
    return SwitchTransformer(config).initialize(3).eval()


def logits(model):
    tokens = torch.arange(3, 51).view(2, 24)
    return model(tokens, tokens[:, :8]).logits


def test_zero_at_the_start_and_merged_as_unmerged():
    plain, model = build(), build(LoRAConfig(rank=3, targets=["*"]))
    assert torch.equal(logits(model), logits(plain))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(0, 0.3, generator=draw)
    adapted = logits(model)
    assert (adapted - logits(plain)).abs().max() > 1e-2
    merge_adapters(model)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.allclose(logits(model), adapted, rtol=0, atol=1e-12)


def test_patterns_choose_the_maps():
    model = build(LoRAConfig(rank=2, targets=["*attention.q", "*.experts.*"]))
    adapted = {n.rpartition(".adapter.")[0] for n, _ in model.named_parameters() if "adapter" in n}
    kinds = {".".join(name.split(".")[3:]) for name in adapted}
    assert kinds == {
        *("self_attention.q", "cross_attention.q"),
        *("ffn.experts.wi_0", "ffn.experts.wi_1", "ffn.experts.wo"),
    }
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "adapter" in n}
    assert shapes["encoder.layers.1.ffn.experts.wo.adapter.a"] == (4, 2, 32)
    assert shapes["encoder.layers.1.ffn.experts.wo.adapter.b"] == (4, 16, 2)


def test_alpha_scales_the_term():
    outputs = []
    for alpha in (2.0, 4.0):
        model = build(LoRAConfig(rank=2, alpha=alpha, targets=["decoder*attention.o"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("adapter.b"):
                    parameter.fill_(1e-6)
        outputs.append(logits(model) - logits(build()))
    assert torch.allclose(outputs[1], 2 * outputs[0], rtol=1e-3, atol=1e-9)
