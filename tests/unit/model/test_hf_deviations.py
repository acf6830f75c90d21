"""Where HF 5.23 departs from the paper: what HF gives, and that ours follows the paper.

The comparisons with HF are there so that a release of HF that mends something is noticed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

from megaswitch.config import ModelConfig, MoEConfig
from megaswitch.layers.noise import Noise
from megaswitch.model.moe import SwitchFFN, group_tokens, into_groups
from megaswitch.model.router import Routing
from megaswitch.model.switch_transformer import SwitchTransformer
from tests.unit.model import hf_reference as ref

EXPERTS = 4


def layers(**moe: Any) -> tuple[SwitchTransformersSparseMLP, SwitchFFN]:
    """HF's and our Switch layer of one shape; both route a unit vector e to expert e."""
    shape = {"d_model": EXPERTS, "d_ff": 6, "num_heads": 1, "d_kv": 4}
    capacity = moe.get("hf_capacity", 4)
    hf = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(**shape, num_experts=EXPERTS, expert_capacity=capacity)
    )
    config = ModelConfig(**shape, moe=MoEConfig(num_experts=EXPERTS, min_capacity=0, **moe))
    ours = SwitchFFN(config, "layer")
    # With other draws, experts this small may give zero to a token that they took.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        hf.router.classifier.weight.copy_(10 * torch.eye(EXPERTS))
        ours.router.weight.copy_(10 * torch.eye(EXPERTS))
        for expert in range(EXPERTS):
            for name in ("wi", "wo"):
                matrix = ours.experts.get_submodule(name).weight[expert]
                nn.init.normal_(matrix, generator=generator)
                hf.experts[f"expert_{expert}"].get_submodule(name).weight.copy_(matrix)
    return hf.eval(), ours.eval()


def tokens_for(experts: list[list[int]]) -> Tensor:
    """[B, L, EXPERTS] inputs that ask for these experts."""
    return torch.eye(EXPERTS)[torch.tensor(experts)]


def hf_kept(hf: SwitchTransformersSparseMLP, x: Tensor) -> Tensor:
    return hf.router(x)[0].sum(-1).bool()


def paper_aux(logits: Tensor) -> Tensor:
    """Equations 4-6 over one group of logits [T, E], as written."""
    probabilities = logits.softmax(-1)
    choices = probabilities.argmax(-1)
    experts = range(logits.shape[-1])
    f = torch.stack([(choices == e).to(logits.dtype).mean() for e in experts])
    return len(f) * (f * probabilities.mean(0)).sum()


# ---------------------------------------------------------------- capacity


def test_hf_gives_slots_to_rows_and_we_to_groups() -> None:
    crowded, spread = [0] * 8, [1, 2, 3, 1, 2, 3, 1, 2]
    x = tokens_for([crowded, spread])
    hf, ours = layers(group_size=16, eval_capacity_factor=2.0)
    mask = torch.ones(2, 8, dtype=torch.bool)

    assert hf_kept(hf, x).tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    # Both rows together have 16 · 2 / 4 = 8 slots an expert, of which the second row wants none.
    y, routing = ours(x, mask, 2, None)
    assert routing.kept.all()
    assert y[0].abs().sum(-1).gt(0).all()
    # Routed row by row the slots are HF's 4, and so is the output.
    y, routing = ours(x, mask, 1, None)
    assert torch.equal(routing.kept, hf_kept(hf, x))
    torch.testing.assert_close(y, hf(x))


def test_hf_slots_do_not_grow_with_the_row() -> None:
    hf, ours = layers(eval_capacity_factor=2.0)
    x = tokens_for([[0] * 16])
    assert hf_kept(hf, x).sum() == 4
    assert ours(x, torch.ones(1, 16, dtype=torch.bool), 1, None)[1].kept.sum() == 8


def test_hf_gives_slots_to_padding_and_we_do_not() -> None:
    hf, ours = layers(eval_capacity_factor=2.0)
    x = tokens_for([[0] * 8])
    mask = torch.tensor([[False] * 4 + [True] * 4])
    assert hf_kept(hf, x).tolist() == [[True] * 4 + [False] * 4]
    assert torch.equal(ours(x, mask, 1, None)[1].kept, mask)
    _, as_hf = layers(capacity_mode="hf", hf_capacity=4)
    assert torch.equal(as_hf(x, mask, 1, None)[1].kept, ~mask)


def test_hf_ignores_its_option_to_ignore_padding() -> None:
    batch = ref.make_batch("left")
    plain, _ = ref.run_hf(ref.switch(expert_capacity=2), batch)
    asked, _ = ref.run_hf(ref.switch(expert_capacity=2, router_ignore_padding_tokens=True), batch)
    assert torch.equal(plain.logits, asked.logits)


# ---------------------------------------------------------------- losses


def collapsing_encoder() -> Any:
    """HF's Switch whose four sparse encoder layers send every token to experts 0, 1, 2, 3."""
    hf = ref.switch(layers=(8, 1), step=2, decoder_sparse_step=0)
    with torch.no_grad():
        hf.shared.weight[:, 0] = 100.0  # a direction that all tokens have in common
        for expert, block in enumerate(hf.encoder.block[1::2]):
            block.layer[1].layer_norm.weight.fill_(1.0)
            classifier = block.layer[1].mlp.router.classifier.weight
            classifier.zero_()
            classifier[expert, 0] = 50.0
    return hf


def test_hf_pools_the_aux_loss_over_layers_and_misses_their_collapse() -> None:
    hf = collapsing_encoder()
    batch = ref.make_batch("none")
    _, output = ref.run_hf(hf, batch, output_router_logits=True)
    choices = [logits.argmax(-1).unique().tolist() for logits in output.encoder_router_logits]
    assert choices == [[0], [1], [2], [3]]
    assert output.encoder_aux_loss.item() == pytest.approx(1.0)  # as if perfectly even

    for reduction, expected in (("sum", 4.0 * EXPERTS), ("mean", EXPERTS)):
        ours = ref.ours_like(hf, aux_loss_reduction=reduction)
        aux = ref.run_ours(ours, batch)[1].aux_loss
        assert aux.item() == pytest.approx(expected)  # as uneven as can be, in every layer


@pytest.mark.parametrize("rows_per_group", [1, 3])
def test_our_aux_loss_is_the_papers_for_each_layer_and_group(
    rows_per_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = ref.double(ref.switch(layers=(4, 2)), monkeypatch)
    batch = ref.make_batch("none")
    _, output = ref.run_hf(hf, batch, output_router_logits=True)
    per_layer = []
    for logits in (*output.encoder_router_logits, *output.decoder_router_logits):
        groups = logits.detach().split(rows_per_group)
        per_layer.append(torch.stack([paper_aux(g.flatten(0, 1)) for g in groups]).mean())

    moe = {"capacity_mode": "dropless", "group_size": rows_per_group * batch.encoder.shape[1]}
    for reduction, expected in (("sum", sum(per_layer)), ("mean", sum(per_layer) / 3)):
        ours = ref.ours_like(hf, **moe, aux_loss_reduction=reduction)
        actual = ref.run_ours(ours, batch)[1]
        assert ref.error(actual.aux_loss, expected) < 1e-12
    # HF's two layers of the encoder are one pool; its decoder has one layer, and row by row agrees.
    encoder = (per_layer[0] + per_layer[1]) / 2
    assert (output.encoder_aux_loss - encoder).abs() > 1e-2
    if rows_per_group == 1:
        assert ref.error(output.decoder_aux_loss.detach(), per_layer[2]) < 1e-6


def test_router_z_loss_agrees_where_pooling_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = ref.double(ref.switch(layers=(4, 2)), monkeypatch)
    batch = ref.make_batch("none")
    _, output = ref.run_hf(hf, batch, output_router_logits=True)
    actual = ref.run_ours(ref.ours_like(hf), batch)[1].z_loss
    assert ref.error(actual, (2 * output.encoder_z_loss + output.decoder_z_loss).detach()) < 1e-12


def test_hf_has_no_aux_loss_where_every_layer_is_sparse() -> None:
    hf = ref.switch(layers=(2, 2), step=1)  # the placement of Switch-C
    batch = ref.make_batch("none")
    _, output = ref.run_hf(hf, batch, output_router_logits=True)
    assert (output.encoder_aux_loss, output.decoder_aux_loss) == (0, 0)
    assert (output.encoder_z_loss, output.decoder_z_loss) == (0, 0)
    ours = ref.run_ours(ref.ours_like(hf), batch)[1]
    assert ours.aux_loss > 4 * 0.9
    assert ours.z_loss > 0


def test_hf_has_no_aux_loss_unless_each_call_asks() -> None:
    hf = ref.switch(output_router_logits=True)  # in the configuration it is ignored
    batch = ref.make_batch("none")
    silent, output = ref.run_hf(hf, batch)
    assert output.encoder_aux_loss is None
    asked, _ = ref.run_hf(hf, batch, output_router_logits=True)
    assert asked.loss > silent.loss
    assert ref.run_ours(ref.ours_like(hf), batch)[1].aux_loss > 0


# ---------------------------------------------------------------- router


def test_our_jitter_reaches_the_router_alone() -> None:
    jitter = 0.1
    ours = ref.ours_like(ref.switch(), jitter=jitter).train()
    layer = ours.encoder.layers["1"].ffn
    seen: dict[str, tuple[Any, ...]] = {}
    result: list[Routing] = []
    for name in ("router", "experts"):
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs})
        )
    layer.router.register_forward_hook(lambda _, __, output: result.append(output))
    layer.register_forward_pre_hook(lambda _, inputs: seen.update(layer=inputs))
    batch = ref.make_batch("none")
    ours(batch.encoder, batch.decoder, noise=Noise(7, 0, torch.arange(3)))

    x = seen["layer"][0]
    gathered, dispatch, *_ = seen["experts"]
    assert torch.equal(gathered, x.flatten(0, 1)[dispatch.order])
    grouped, _, draws = seen["router"]
    factors = layer.router._jitter_factors(grouped, draws)
    assert 1 - jitter <= factors.min() < 1 - jitter / 2
    assert 1 + jitter / 2 < factors.max() <= 1 + jitter
    jittered = (into_groups(x, 1) * factors) @ layer.router.weight.T
    torch.testing.assert_close(result[0].probabilities, jittered.softmax(-1))

    seen.clear()
    ours.eval()(batch.encoder, batch.decoder)
    assert seen["router"][2].noise is None


@pytest.mark.parametrize(("dtype", "leaks"), [(torch.float32, True), (torch.bfloat16, False)])
def test_hf_jitter_leaks_into_the_experts_in_fp32(dtype: torch.dtype, leaks: bool) -> None:
    hf = ref.switch(router_jitter_noise=0.1).to(dtype).train()
    layer = hf.encoder.block[1].layer[1]
    normed, entered = [], []
    layer.layer_norm.register_forward_hook(lambda _, __, y: normed.append(y.clone()))
    layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].clone()))
    ref.run_hf(hf, ref.make_batch("none"))
    assert torch.equal(normed[0].flatten(0, 1), entered[0]) != leaks


def test_hf_chooses_after_rounding_to_bf16_and_we_before() -> None:
    hf, ours = layers(capacity_mode="dropless")
    x = torch.tensor([[[0.0, 0.0, 0.0, 1 / 4096]]], dtype=torch.bfloat16)
    chosen, _, logits = hf.to(torch.bfloat16).router(x)
    assert logits.argmax().item() == 3
    assert chosen.argmax().item() == 0  # all four probabilities round to the same number
    routing = ours.router(x, group_tokens(torch.ones(1, 1, dtype=torch.bool), 1), None)
    assert routing.expert.item() == 3
    assert routing.gate.dtype == torch.float32


def test_hf_starts_routers_at_deviation_one_and_we_as_the_paper() -> None:
    shape = {"vocab_size": 8, "d_model": 64, "d_ff": 256, "num_heads": 1}
    hf_config = SwitchTransformersConfig(**shape, num_layers=2, num_decoder_layers=1,
                                         num_experts=64, num_sparse_encoder_layers=1)  # fmt: skip
    hf = SwitchTransformersForConditionalGeneration(hf_config).encoder.block[1].layer[1].mlp
    assert hf.router.classifier.weight.std().item() == pytest.approx(1.0, rel=0.1)
    # As if an expert's hidden size were d_model: too large by √(d_ff / d_model).
    assert hf.experts.expert_0.wo.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)

    config = ModelConfig(**shape, num_encoder_layers=2, num_decoder_layers=2, init_scale=0.1,
                         moe=MoEConfig(num_experts=64))  # fmt: skip
    ours = SwitchTransformer(config).initialize(0).encoder.layers["1"].ffn
    cut = 0.8796  # deviation of a unit normal cut at ±2
    router, wo = ours.router.weight.std().item(), ours.experts.wo.weight.std().item()
    assert router == pytest.approx(cut * (0.1 / 64) ** 0.5, rel=0.1)
    assert wo == pytest.approx(cut * (0.1 / 256) ** 0.5, rel=0.1)


def test_hf_gives_no_gradient_to_experts_without_tokens_and_we_give_zero() -> None:
    # An optimizer skips None: no decay, no moments. A stack of experts is updated as one.
    hf, ours = layers(capacity_mode="dropless")
    x = tokens_for([[0, 1, 2, 0]])
    hf(x).sum().backward()
    ours(x, torch.ones(1, 4, dtype=torch.bool), 1, None)[0].sum().backward()
    assert hf.experts.expert_3.wi.weight.grad is None
    assert ours.experts.wi.weight.grad[3].count_nonzero() == 0
    assert ours.experts.wi.weight.grad[0].count_nonzero() > 0


def test_hf_unties_three_tables_where_the_released_models_share_one() -> None:
    hf = SwitchTransformersConfig(
        **ref.SHAPE, num_layers=1, num_decoder_layers=1, tie_word_embeddings=False
    )
    names = dict(SwitchTransformersForConditionalGeneration(hf).named_parameters())
    assert {"shared.weight", "lm_head.weight", *ref.STACK_TABLES} <= names.keys()
    ours = SwitchTransformer(ModelConfig(d_model=8, vocab_size=9, tie_embeddings=False))
    tables = [name for name, weight in ours.named_parameters() if weight.shape == (9, 8)]
    assert tables == ["embedding.weight", "head.weight"]
