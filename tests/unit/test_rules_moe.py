"""Routers, exploration and Switch attention: what goes together, and what Hugging Face can say."""

import pytest

from megaswitch.checkpoint.huggingface import to_hf
from megaswitch.checkpoint.huggingface_config import config_from_hf, config_to_hf
from megaswitch.config import ModelConfig, MoEConfig, from_toml, load_config, to_toml
from megaswitch.log import ConfigError, UserError
from megaswitch.model.switch_transformer import SwitchTransformer

EIGHT = "--model.moe.num_experts=8"


def moe(*options: str) -> list[str]:
    return [EIGHT, *(f"--model.moe.{option}" for option in options)]


def problems(*options: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, moe(*options))
    return caught.value.problems


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["router=ntlb", "rounds=9"], ["rounds=9", "num_experts=8", "use 2 … 8"]),
        (["router=ntlb", "capacity_mode=dropless"], ["slot left", "use router='switch'"]),
        (["router=ntlb", "num_experts=1"], ["'ntlb'", "second expert", "num_experts=1"]),
        (["router=top-2", "num_experts=1"], ["'top-2'", "second expert", "num_experts=1"]),
        (["router=expert-choice", "capacity_mode=dropless"], ["'dropless'", "use capacity_mode"]),
        (["router=expert-choice", "capacity_mode=hf"], ["'hf'", "use capacity_mode='group'"]),
        (["router=top-2", "exploration=sample"], ["'sample'", "'top-2'", "use jitter"]),
        (["router=ntlb", "exploration=sample"], ["'sample'", "'ntlb'", "use jitter"]),
        (["router_precision=fp32"], ["train.precision='fp32'", "use 'selective'"]),
        (
            ["router=top-2", "train_second_policy=all", "eval_second_policy=none",
             "second_threshold=0.3"],
            ["second_threshold=0.3 would be ignored", "remove it"],
        ),
        (
            ["attention=linear", "feed_forward=false", "expert_dropout=0.4"],
            ["expert_dropout=0.4 would be ignored", "without hidden units"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, words):
    (problem,) = problems(*options)
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("dead", "others"),
    [
        ("jitter=0.1", ["exploration=sample"]),
        ("jitter=0.1", ["router=top-2"]),
        ("jitter=0.1", ["router=expert-choice"]),
        ("temperature=0.5", []),
        ("temperature=0.5", ["exploration=input-dropout"]),
        ("input_dropout=0.2", ["exploration=jitter"]),
        ("train_second_policy=all", []),
        ("eval_second_policy=all", ["router=ntlb"]),
        ("second_threshold=0.3", ["router=ntlb"]),
        ("rounds=3", ["router=top-2"]),
        ("aux_loss_weight=0.1", ["router=expert-choice"]),
        ("feed_forward=true", []),
    ],
)
def test_dead_keys_are_refused(dead, others):
    (problem,) = problems(*others, dead)
    assert problem.startswith(f"model.moe.{dead.split('=')[0]}=")
    assert "would be ignored" in problem


LIVE = [
    ["router=top-2", "train_second_policy=threshold", "second_threshold=0.3"],
    ["router=top-2", "exploration=jitter", "jitter=0.02"],
    ["router=top-2", "capacity_mode=dropless"],
    ["router=ntlb", "rounds=8", "jitter=0.0"],
    ["router=expert-choice", "train_capacity_factor=2.0"],
    ["exploration=sample", "temperature=0.5"],
    ["exploration=input-dropout", "input_dropout=0.2"],
    ["router_precision=bf16"],
    ["attention=linear", "feed_forward=false"],
    ["attention=ffn", "feed_forward=false", "expert_dropout=0.4"],
    ["attention=linear", "expert_dropout=0.4"],
]


@pytest.mark.parametrize("options", LIVE, ids=" ".join)
def test_what_goes_together_survives_a_round_trip(options):
    config = load_config(None, moe(*options))
    assert from_toml(to_toml(config)) == config


def test_a_layer_in_fp32_needs_a_run_in_bf16():
    config = load_config(None, [*moe("router_precision=fp32"), "--train.precision=bf16"])
    assert config.model.moe.router_precision == "fp32"


# ---------------------------------------------------------------- Hugging Face

SHAPE = {"vocab_size": 19, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_heads": 2,
         "num_encoder_layers": 2, "num_decoder_layers": 2}  # fmt: skip


def hf_model(**options) -> ModelConfig:
    return ModelConfig(
        **SHAPE, moe=MoEConfig(num_experts=3, capacity_mode="hf", hf_capacity=5, **options)
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"router": "top-2"}, r"model\.moe\.router='top-2'"),
        ({"router": "ntlb", "rounds": 2}, r"model\.moe\.router='ntlb'"),
        ({"attention": "linear"}, r"model\.moe\.attention='linear'"),
        ({"attention": "ffn", "feed_forward": False}, r"model\.moe\.attention='ffn'"),
        ({"router_precision": "bf16"}, r"model\.moe\.router_precision='bf16'"),
    ],
)
def test_hf_refuses_what_it_has_no_module_for(options, named):
    config = hf_model(**options)
    with pytest.raises(UserError, match=named):
        config_to_hf(config)
    with pytest.raises(UserError, match=named):
        to_hf(SwitchTransformer(config).state_dict(), config)


@pytest.mark.parametrize("exploration", ["argmax", "sample", "input-dropout"])
def test_exploration_acts_in_training_alone_and_hf_gets_no_jitter(exploration):
    table = config_to_hf(hf_model(exploration=exploration))
    assert table["router_jitter_noise"] == 0.0
    assert config_from_hf(table).moe.jitter == 0.0
    assert config_to_hf(hf_model(jitter=0.03))["router_jitter_noise"] == 0.03


def test_hf_in_bf16_is_refused():
    table = config_to_hf(hf_model()) | {"router_dtype": "bfloat16"}
    with pytest.raises(UserError, match="router_dtype='bfloat16'"):
        config_from_hf(table)
