"""Parameter counts of every preset, to the last digit, on the meta device."""

import pytest
import torch

from megaswitch.config import model_config
from megaswitch.log import ConfigError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import spec_of
from megaswitch.presets import PRESETS

# Computed from the shapes with pencil and paper, and where it has a class, by HF Transformers.
TOTALS = {
    "switch-tiny": 3_280_640,
    "t5-tiny": 1_443_584,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
    "t5-v1_1-xxl": 11_135_332_352,
    "switch-base-2": 279_545_088,
    "switch-base-4": 392_809_728,
    "switch-base-8": 619_339_008,
    "switch-base-16": 1_072_397_568,
    "switch-base-32": 1_978_514_688,
    "switch-base-64": 3_790_748_928,
    "switch-base-128": 7_415_217_408,
    "switch-base-256": 14_664_154_368,
    "moe-base-128": 7_415_217_408,
    "switch-large-128": 26_309_291_008,
    "switch-xxl-128": 394_675_073_024,
    "switch-c-2048": 1_571_327_875_360,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "mswitch-base-128": 7_774_715_136,
    "t5-base-paper": 222_903_552,
    "t5-large-paper": 750_251_008,
    "switch-base-128-paper": 7_415_217_408,
    "switch-large-128-paper": 27_120_888_832,
    "switch-xxl-64-paper": 201_395_253_248,  # not the 395B that Table 9 states
    "switch-c-2048-paper": 1_571_308_972_448,
}

# Parameters of all experts, of all routers, and of one expert.
PARTS = {
    "switch-base-8": (452_984_832, 73_728, 4_718_592),
    "switch-base-16": (905_969_664, 147_456, 4_718_592),
    "switch-base-32": (1_811_939_328, 294_912, 4_718_592),
    "switch-base-64": (3_623_878_656, 589_824, 4_718_592),
    "switch-base-128": (7_247_757_312, 1_179_648, 4_718_592),
    "switch-base-256": (14_495_514_624, 2_359_296, 4_718_592),
    "switch-large-128": (25_769_803_776, 3_145_728, 8_388_608),
    "switch-xxl-128": (386_547_056_640, 12_582_912, 125_829_120),
    "switch-c-2048": (1_570_347_417_600, 127_795_200, 25_559_040),
    "switch-c-2048-paper": (1_570_347_417_600, 127_795_200, 25_559_040),
}

# Embedding and, where untied, head.
VOCABULARY = {
    "t5-small": 16_449_536,
    "t5-base": 24_674_304,
    "t5-large": 32_899_072,
    "t5-3b": 32_899_072,
    "t5-11b": 32_899_072,
    "t5-v1_1-small": 32_899_072,
    "t5-v1_1-base": 49_348_608,
    "t5-v1_1-large": 65_798_144,
    "t5-v1_1-xl": 131_596_288,
    "t5-v1_1-xxl": 263_192_576,
}

# Group size, capacity factors in training and evaluation, minimum: Flaxformer's gin files.
ROUTING = {
    "switch-base-8": (8192, 1.25, 2.0, 4),
    "switch-base-256": (8192, 1.25, 2.0, 4),
    "switch-large-128": (4096, 1.25, 2.0, 4),
    "switch-xxl-128": (4096, 1.25, 4.0, 2),
    "switch-c-2048": (2048, 1.0, 2.0, 2),
}


def build(preset):
    with torch.device("meta"):
        return SwitchTransformer(model_config(preset))


def test_every_preset_has_a_total():
    assert set(TOTALS) == set(PRESETS)


@pytest.mark.parametrize("preset", TOTALS)
def test_total(preset):
    assert sum(weight.numel() for weight in build(preset).parameters()) == TOTALS[preset]


@pytest.mark.parametrize("preset", PARTS)
def test_experts_and_routers(preset):
    experts = routers = 0
    sizes = set()
    for name, weight in build(preset).named_parameters():
        if spec_of(weight).is_expert:
            experts += weight.numel()
        routers += weight.numel() * ("router" in name)
    model = build(preset)
    for module in model.modules():
        if hasattr(module, "experts"):
            sizes.add(sum(weight[0].numel() for weight in module.experts.parameters()))
    (one,) = sizes
    assert (experts, routers, one) == PARTS[preset]


@pytest.mark.parametrize("preset", VOCABULARY)
def test_vocabulary(preset):
    model = build(preset)
    ends = [model.embedding, *([model.head] if not model.config.tie_embeddings else [])]
    assert sum(end.weight.numel() for end in ends) == VOCABULARY[preset]


@pytest.mark.parametrize("preset", ROUTING)
def test_routing(preset):
    moe = model_config(preset).moe
    found = (
        moe.group_size, moe.train_capacity_factor, moe.eval_capacity_factor, moe.min_capacity
    )  # fmt: skip
    assert found == ROUTING[preset]


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder"),
    [
        ("switch-base-8", [1, 3, 5, 7, 9, 11], [1, 3, 5, 7, 9, 11]),
        ("switch-large-128", list(range(1, 24, 2)), list(range(1, 24, 2))),
        ("switch-c-2048", list(range(15)), list(range(15))),
        ("t5-base", [], []),
    ],
)
def test_placement(preset, encoder, decoder):
    config = model_config(preset)
    for stack, expected in (("encoder", encoder), ("decoder", decoder)):
        sparse = [i for i in range(config.num_layers(stack)) if config.is_sparse(stack, i)]
        assert sparse == expected


def test_released_and_paper_shapes():
    assert model_config("switch-c-2048").num_heads == 30
    assert model_config("switch-c-2048-paper").num_heads == 32
    assert model_config("switch-base-8").activation == "relu"
    assert model_config("switch-xxl-128").activation == "gated-gelu"
    assert model_config("switch-base-128-paper").activation == "gated-gelu"
    assert model_config("switch-base-8").init_scale == 0.1
    assert model_config("t5-base").init_scale == 1.0


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="'switch-base-12' is not a preset; did you mean switch-"):
        model_config("switch-base-12")
