from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from megaswitch.checkpoint.huggingface import from_hf, to_hf
from megaswitch.checkpoint.huggingface_config import config_from_hf, config_to_hf
from megaswitch.config import ModelConfig, MoEConfig, model_config
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.presets import PRESETS

ALIASES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
TINY: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 14,
    "num_heads": 2,
    "num_encoder_layers": 4,
    "num_decoder_layers": 2,
    "dropout": 0.1,
    "init_scale": 1.0,
}
EXPERTS = MoEConfig(num_experts=3, capacity_mode="hf", hf_capacity=5, aux_loss_weight=0.02)
MODELS = {
    "t5": ModelConfig(**TINY),
    "t5-v1.1": ModelConfig(**TINY, activation="gated-gelu", tie_embeddings=False),
    "switch": ModelConfig(**TINY, moe=EXPERTS),
    "switch-untied": ModelConfig(**TINY, tie_embeddings=False, moe=EXPERTS),
    "switch-all-sparse": ModelConfig(
        **TINY,
        moe=dataclasses.replace(EXPERTS, encoder_sparse_step=1, decoder_sparse_step=1),
    ),
    "switch-dense-decoder": ModelConfig(
        **TINY, moe=dataclasses.replace(EXPERTS, decoder_sparse_step=0)
    ),
}


def with_moe(config: ModelConfig, **moe: Any) -> ModelConfig:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))


def logits(model: Any, config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    encoder, decoder = (
        torch.randint(0, config.vocab_size, (2, length), generator=generator) for length in (11, 6)
    )
    with torch.no_grad():
        if isinstance(model, SwitchTransformer):
            return model(encoder, decoder).logits
        return model(input_ids=encoder, decoder_input_ids=decoder).logits


def hf_table(kind: str, **changes: Any) -> dict[str, Any]:
    """A complete `config.json` of HF, with `changes`; None removes a key."""
    table = config_to_hf(MODELS[kind]) | changes
    return {key: value for key, value in table.items() if value is not None}


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("preset", ["t5-base", "t5-v1_1-base", "switch-base-8"])
def test_presets_have_the_names_and_shapes_of_the_hf_class(preset: str) -> None:
    config = model_config(preset)
    if config.moe.num_experts:
        config = with_moe(config, capacity_mode="dropless")
    with torch.device("meta"):
        ours = SwitchTransformer(config)
        table = config_to_hf(config)
        hf_config = AutoConfig.for_model(**table)
        hf = AutoModelForSeq2SeqLM.from_config(hf_config)
    theirs = {name: tuple(weight.shape) for name, weight in hf.state_dict().items()}
    exported = to_hf(ours.state_dict(), config)
    shapes = {name: tuple(weight.shape) for name, weight in exported.items()}
    aliases = ALIASES - {"lm_head.weight"} if not config.tie_embeddings else ALIASES
    assert shapes == {name: shape for name, shape in theirs.items() if name not in aliases}
    # All four are one table in HF when tied, as ours is.
    assert hf.shared.weight is hf.encoder.embed_tokens.weight is hf.decoder.embed_tokens.weight
    if config.tie_embeddings:
        assert hf.lm_head.weight is hf.shared.weight
    assert hf_config.architectures == [type(hf).__name__]

    imported = from_hf(exported, config)
    assert {name: weight.shape for name, weight in imported.items()} == {
        name: weight.shape for name, weight in ours.state_dict().items()
    }
    count = sum(weight.numel() for weight in imported.values())
    published = {"t5-base": 222_903_552, "t5-v1_1-base": 247_577_856, "switch-base-8": 619_339_008}
    assert count == published[preset]


@pytest.mark.parametrize("kind", MODELS)
def test_hf_loads_what_we_export(kind: str, tmp_path: Path) -> None:
    config = MODELS[kind]
    ours = SwitchTransformer(config).initialize(0).eval()
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    # safetensors wants no tensor twice; HF's untied Switch wants its table three times.
    state = {name: weight.clone() for name, weight in to_hf(ours.state_dict(), config).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})

    hf, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert not set(report["missing_keys"]) - ALIASES
    torch.testing.assert_close(logits(hf.eval(), config), logits(ours, config))


@pytest.mark.parametrize("kind", MODELS)
def test_we_load_what_hf_saves_again(kind: str, tmp_path: Path) -> None:
    config = MODELS[kind]
    state = to_hf(SwitchTransformer(config).initialize(0).state_dict(), config)
    hf_config = AutoConfig.for_model(**config_to_hf(config))
    kinds = {
        "t5": T5ForConditionalGeneration,
        "switch_transformers": SwitchTransformersForConditionalGeneration,
    }
    hf = kinds[hf_config.model_type](hf_config).eval()
    if not config.tie_embeddings:
        hf.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])
    hf.load_state_dict(state, strict=False)
    hf.save_pretrained(tmp_path)  # writes v1.1 as tied, but unscaled

    imported = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert imported == config
    ours = SwitchTransformer(imported).eval()
    ours.load_state_dict(from_hf(load_file(tmp_path / "model.safetensors"), imported))
    torch.testing.assert_close(logits(ours, config), logits(hf, config))


def test_aliases_of_old_files_and_a_table_that_nobody_reads_are_accepted() -> None:
    config = MODELS["t5"]
    ours = SwitchTransformer(config).initialize(0).state_dict()
    state = to_hf(ours, config)
    state |= {name: state["shared.weight"].clone() for name in ALIASES}
    junk = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state[junk] = torch.zeros(32, 2)
    imported = from_hf(state, config)
    assert imported.keys() == ours.keys()
    del state["shared.weight"]
    assert torch.equal(from_hf(state, config)["embedding.weight"], ours["embedding.weight"])


def test_an_untied_switch_takes_the_tables_that_hf_reads() -> None:
    config = MODELS["switch-untied"]
    ours = SwitchTransformer(config).initialize(0).state_dict()
    state = to_hf(ours, config)
    state["shared.weight"] = torch.zeros_like(state["shared.weight"])  # HF never looks at it
    assert torch.equal(from_hf(state, config)["embedding.weight"], ours["embedding.weight"])


def changed(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    state = dict(state)
    match what:
        case "router gone":
            del state["encoder.block.1.layer.1.mlp.router.classifier.weight"]
        case "expert too many":
            extra = "encoder.block.1.layer.1.mlp.experts.expert_{}.wi.weight"
            state[extra.format(3)] = state[extra.format(2)]
        case "router bias":
            state["encoder.block.1.layer.1.mlp.router.classifier.bias"] = torch.zeros(3)
        case "expert of another shape":
            state["encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight"] = torch.zeros(12, 14)
        case "embedding of another size":
            state["shared.weight"] = torch.zeros(40, 12)
        case "tables differ":
            state["decoder.embed_tokens.weight"] = state["shared.weight"] + 1
        case "head differs":
            state["lm_head.weight"] = state["shared.weight"] + 1
        case "table gone":
            del state["shared.weight"]
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("router gone", r"missing \(1\): encoder.block.1.layer.1.mlp.router.classifier"),
        (
            "expert too many",
            r"not of this model \(1\): encoder.block.1.layer.1.mlp.experts.expert_3",
        ),
        (
            "router bias",
            r"not of this model \(1\): encoder.block.1.layer.1.mlp.router.classifier.bias",
        ),
        (
            "expert of another shape",
            r"expert_1.wi.weight has shape \[12, 14\].* makes it \[14, 12\]",
        ),
        ("embedding of another size", r"shared.weight has shape \[40, 12\].* makes it \[37, 12\]"),
        ("tables differ", "decoder.embed_tokens.weight differs from shared.weight"),
        ("head differs", "lm_head.weight differs from shared.weight.*tie_word_embeddings=false"),
        ("table gone", r"missing \(1\): shared.weight"),
    ],
)
def test_a_state_that_is_not_the_models_is_refused(what: str, message: str) -> None:
    config = MODELS["switch"]
    state = to_hf(SwitchTransformer(config).initialize(0).state_dict(), config)
    with pytest.raises(UserError, match=message):
        from_hf(changed(state, what), config)


def test_a_missing_head_is_explained() -> None:
    config = MODELS["t5-v1.1"]
    state = to_hf(SwitchTransformer(config).initialize(0).state_dict(), config)
    del state["lm_head.weight"]
    with pytest.raises(UserError, match=r"lm_head.weight is missing.*not scaled"):
        from_hf(state, config)


def test_export_refuses_a_state_of_another_model() -> None:
    state = SwitchTransformer(MODELS["switch"]).initialize(0).state_dict()
    with pytest.raises(UserError, match=r"missing \(1\): head.weight"):
        to_hf(state, MODELS["switch-untied"])
    with pytest.raises(UserError, match=r"missing \(2\): .*; not of this model \(3\): .*router"):
        to_hf(state, with_moe(MODELS["switch"], decoder_sparse_step=0))
    state["embedding.weight"] = state["embedding.weight"].T
    with pytest.raises(UserError, match=r"embedding.weight has shape \[12, 37\]"):
        to_hf(state, MODELS["switch"])


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("kind", MODELS)
def test_configurations_survive_a_round_trip(kind: str) -> None:
    table = config_to_hf(MODELS[kind])
    assert config_from_hf(table) == MODELS[kind]
    assert config_from_hf(json.loads(json.dumps(table))) == MODELS[kind]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_exported_or_refused_by_name(preset: str) -> None:
    config = model_config(preset)
    if not config.moe.num_experts:
        expected = dataclasses.replace(config, preset=None, moe=MoEConfig(), init_scale=1.0)
        gated_and_tied = config.activation == "gated-gelu" and config.tie_embeddings
        assert config_from_hf(config_to_hf(config)) == expected
        assert gated_and_tied == (preset in ("t5-base-paper", "t5-large-paper"))
        return
    with pytest.raises(UserError, match=r"gated experts|capacity_mode='group'|top-2"):
        config_to_hf(config)
    dropless = with_moe(config, capacity_mode="dropless", router="switch")
    if config.activation != "relu":
        with pytest.raises(UserError, match="no gated experts"):
            config_to_hf(dropless)
        with pytest.raises(UserError, match="no gated experts"):
            to_hf({}, dropless)
        return
    imported = config_from_hf(config_to_hf(dropless))
    assert imported.moe.capacity_mode == "hf"
    assert imported.moe.hf_capacity > 10**6
    for stack in ("encoder", "decoder"):
        layers = range(config.num_layers(stack))
        assert [imported.is_sparse(stack, i) for i in layers] == [
            config.is_sparse(stack, i) for i in layers
        ]


def test_hf_defaults_of_training_and_capacity_are_imported() -> None:
    config = config_from_hf(SwitchTransformersConfig(num_layers=6, num_decoder_layers=6).to_dict())
    assert config.moe == MoEConfig(
        num_experts=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        capacity_mode="hf",
        hf_capacity=64,
        jitter=0.01,
        aux_loss_weight=0.001,  # a tenth of the paper's
        z_loss_weight=0.001,  # not in the paper
    )
    assert config.dropout == 0.1


def test_hf_fields_hold_what_ours_hold() -> None:
    moe = dataclasses.replace(EXPERTS, jitter=0.05, z_loss_weight=0.003)
    config = ModelConfig(**TINY, relative_buckets=8, relative_max_distance=20, moe=moe)
    hf = SwitchTransformersConfig.from_dict(config_to_hf(config))
    assert (hf.num_experts, hf.expert_capacity) == (3, 5)
    assert (hf.router_jitter_noise, hf.router_aux_loss_coef) == (0.05, 0.02)
    assert hf.router_z_loss_coef == 0.003
    assert (hf.encoder_sparse_step, hf.decoder_sparse_step) == (2, 2)
    assert (hf.num_layers, hf.num_decoder_layers) == (4, 2)
    assert (hf.relative_attention_num_buckets, hf.relative_attention_max_distance) == (8, 20)
    assert hf.decoder_start_token_id == hf.pad_token_id == 0


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"tie_word_embeddings": None}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),  # saved by HF 5
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
    ],
)
def test_scaling_of_logits_decides_what_is_tied(changes: dict[str, Any], tied: bool) -> None:
    assert config_from_hf(hf_table("t5", **changes)).tie_embeddings == tied


def test_files_older_than_some_t5_fields_are_read() -> None:
    table = hf_table(
        "t5", feed_forward_proj=None, relative_attention_max_distance=None, num_decoder_layers=None
    )
    config = config_from_hf(table)
    assert (config.activation, config.relative_max_distance) == ("relu", 128)
    assert config.num_decoder_layers == config.num_encoder_layers == 4


@pytest.mark.parametrize("layers", range(1, 13))
def test_sparse_layers_are_those_of_hf_or_refused(layers: int) -> None:
    """HF's own rule is read off HF's own models, for every count of sparse layers."""
    for count in range(layers + 2):
        hf_config = SwitchTransformersConfig(
            vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_heads=1, num_experts=1,
            num_layers=layers, num_sparse_encoder_layers=count,
            num_decoder_layers=1, num_sparse_decoder_layers=1,
        )  # fmt: skip
        with torch.device("meta"):
            hf = SwitchTransformersForConditionalGeneration(hf_config)
        sparse = [i for i, block in enumerate(hf.encoder.block) if block.layer[1].is_sparse]
        table = hf_config.to_dict()
        if count % 2:
            del table["encoder_sparse_step"], table["decoder_sparse_step"]  # as written by hand
        ours = [[], *(list(range(step - 1, layers, step)) for step in range(1, layers + 1))]
        if sparse in ours:
            config = config_from_hf(table)
            assert [i for i in range(layers) if config.is_sparse("encoder", i)] == sparse
        else:
            message = f"num_sparse_encoder_layers={count} of {layers} .*layers {sparse} sparse"
            with pytest.raises(UserError, match=message.replace("[", r"\[")):
                config_from_hf(table)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t5", {"model_type": "umt5"}, "model_type='umt5' cannot be converted: each of its layers"),
        ("t5", {"model_type": "longt5"}, "model_type='longt5' cannot be converted; it must be"),
        ("t5", {"model_type": None}, "model_type=None"),
        ("t5", {"d_ff": None}, "lacks d_ff"),
        ("switch", {"num_experts": None, "num_decoder_layers": None},
         "lacks num_decoder_layers, num_experts"),
        ("t5", {"d_model": "wide"}, "d_model"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "activation gated silu"),
        ("t5", {"feed_forward_proj": "gelu"}, "activation gelu cannot"),
        # The exact GELU is not the tanh form.
        ("t5-v1.1", {"dense_act_fn": "gelu", "is_gated_act": True}, "activation gated gelu cannot"),
        ("switch", {"dense_act_fn": "gelu_new"}, "activation gelu_new cannot"),
        ("switch", {"router_bias": True}, "router_bias=true"),
        ("switch", {"router_dtype": "bfloat16"}, "router_dtype='bfloat16'.*router_dtype='float32'"),
        ("t5", {"relative_attention_num_buckets": 30}, "relative_buckets=30"),
        ("switch", {"encoder_sparse_step": 3}, r"layers \[1\] sparse \(encoder_sparse_step=3"),
        ("switch", {"encoder_sparse_step": 0, "decoder_sparse_step": 0}, "both sparse steps are 0"),
    ],
)  # fmt: skip
def test_hf_models_that_ours_cannot_be_are_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        config_from_hf(hf_table(kind, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_moe(MODELS["switch"], capacity_mode="group"), "capacity_mode='group'.*'dropless'"),
        (with_moe(MODELS["switch"], encoder_sparse_step=4), "encoder_sparse_step=4.*use 0, 1 or 2"),
        (dataclasses.replace(MODELS["switch"], activation="gated-gelu"), "no gated experts"),
    ],
)
def test_our_models_that_hf_cannot_be_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_to_hf(config)


def test_t5_config_of_hf_accepts_ours() -> None:
    hf = T5Config.from_dict(config_to_hf(MODELS["t5-v1.1"]))
    assert (hf.is_gated_act, hf.dense_act_fn, hf.scale_decoder_outputs) == (True, "gelu_new", False)
    assert T5Config.from_dict(config_to_hf(MODELS["t5"])).scale_decoder_outputs
