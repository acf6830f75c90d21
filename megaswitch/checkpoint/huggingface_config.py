"""Hugging Face's `config.json` for our model, both ways.

Whatever decides a forward pass in evaluation is carried over exactly or refused. What acts in
training alone is carried where HF has a field for it; `init_scale`, `expert_dropout`,
`exploration` but for jitter, `aux_loss_reduction` and `aux_loss_padding` have none and come back as
our defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from megaswitch.config import ModelConfig, MoEConfig, RunConfig
from megaswitch.log import ConfigError, UserError
from megaswitch.rules import check

# HF has no way to say "no limit"; no row is as long as this.
_UNLIMITED = 2**31 - 1

# Our field to HF's, for those that differ in nothing but the name.
_SHAPE = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_kv": "d_kv",
    "d_ff": "d_ff",
    "num_heads": "num_heads",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
}
_OTHER = {
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_max_distance": ("relative_attention_max_distance", 128),
    "norm_epsilon": ("layer_norm_epsilon", 1e-6),
    "dropout": ("dropout_rate", 0.1),
}
_MOE = {
    "num_experts": ("num_experts", 8),
    "hf_capacity": ("expert_capacity", 64),
    "jitter": ("router_jitter_noise", 0.01),
    "aux_loss_weight": ("router_aux_loss_coef", 0.001),
    "z_loss_weight": ("router_z_loss_coef", 0.001),
}


def config_from_hf(hf_config_dict: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from the contents of HF's `config.json`.

    Raises:
        UserError: the model is of another kind, or does something that ours cannot.
    """
    given = dict(hf_config_dict)
    kind = given.get("model_type")
    if kind == "umt5":
        raise UserError(
            "model_type='umt5' cannot be converted: each of its layers has relative positions of "
            "its own, and ours share those of the first, as T5's and mT5's do"
        )
    if kind not in ("t5", "mt5", "switch_transformers"):
        raise UserError(
            f"model_type={kind!r} cannot be converted; it must be 't5', 'mt5' or "
            "'switch_transformers'"
        )
    dense = kind != "switch_transformers"
    sparse = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")
    required = [name for name in _SHAPE.values() if not dense or name != "num_decoder_layers"]
    required += [] if dense else ["num_experts", "expert_capacity", *sparse]
    # HF would fill these from class defaults that describe no published model.
    if absent := [name for name in required if name not in given]:
        raise UserError(f"the HF configuration lacks {', '.join(absent)}; add them to config.json")
    if given.get("num_decoder_layers") is None:
        given["num_decoder_layers"] = given["num_layers"]
    fields = {ours: given[theirs] for ours, theirs in _SHAPE.items()}
    fields |= {ours: given.get(theirs, default) for ours, (theirs, default) in _OTHER.items()}
    try:
        config = ModelConfig(
            **fields,
            activation=_activation(given),
            tie_embeddings=_tied(given),
            init_scale=1.0,
            moe=MoEConfig() if dense else _moe_from_hf(given),
        )
    except ValidationError as error:
        raise UserError(f"the HF configuration cannot be used: {error}") from None
    if problems := check(RunConfig(model=config)):
        raise ConfigError(problems)
    return config


def reconcile(
    given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Any], list[str]]:
    """`config.json` with what the tensors show to be otherwise, and a sentence on each change.

    HF builds the layers that the configuration names and drops what else the files hold. The
    published `switch-c-2048` says 12 decoder layers, none of them sparse, beside tensors of 15
    sparse ones. Layers that the files lack are not taken for granted: such a model stays refused.

    Args:
        given: the contents of `config.json`.
        shapes: of the tensors.

    Raises:
        UserError: the configuration claims more layers or experts than there are tensors.
    """
    table, notes = dict(given), []
    for key in ("num_layers", "num_decoder_layers", "num_experts"):
        value = table.get(key)
        if isinstance(value, int) and value > len(shapes):
            raise UserError(
                f"config.json says {key}={value}, and the files hold {len(shapes)} tensors; one of "
                "them is damaged or of another model"
            )

    def found(key: str, value: int) -> None:
        if table.get(key) != value:
            notes.append(f"config.json says {key}={table.get(key)}; the tensors make it {value}")
            table[key] = value

    for stack, key in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        pattern = re.compile(rf"{stack}\.block\.(\d{{1,6}})\.(.*\.mlp\.experts\.)?")
        matches = [match for name in shapes if (match := pattern.match(name))]
        layers = len({match[1] for match in matches})
        if key in table and isinstance(table[key], int) and layers > table[key]:
            found(key, layers)
        sparse = sorted({int(match[1]) for match in matches if match[2]})
        step = next((n for n in (1, 2) if sparse == list(range(n - 1, layers, n))), 0)
        if sparse and step and table.get("model_type") == "switch_transformers":
            stated = table.get(f"{stack}_sparse_step")
            if stated is None or stated != step:
                found(f"num_sparse_{stack}_layers", len(sparse))
                found(f"{stack}_sparse_step", step)
    return table, notes


def _tied(given: Mapping[str, Any]) -> bool:
    """Whether logits are scaled by d_model^-½, which here goes with one table for both ends."""
    if given["model_type"] == "mt5":
        return False
    # HF 5 saves every T5 as tied; what was meant is then in `scale_decoder_outputs` alone.
    return given.get("scale_decoder_outputs", given.get("tie_word_embeddings", True))


def _activation(given: Mapping[str, Any]) -> Literal["relu", "gated-gelu"]:
    """Ours for T5's `feed_forward_proj` or Switch's `dense_act_fn`."""
    if given["model_type"] != "switch_transformers":
        usual = "gated-gelu" if given["model_type"] == "mt5" else "relu"
        projection = given.get("feed_forward_proj", usual)
        gated = given.get("is_gated_act", projection.startswith("gated-"))
        # HF means the tanh form where T5 says "gated-gelu".
        implied = "gelu_new" if projection == "gated-gelu" else projection.split("-")[-1]
        function = given.get("dense_act_fn", implied)
    else:
        gated, function = False, given.get("dense_act_fn", "relu")
    if (gated, function) not in ((False, "relu"), (True, "gelu_new")):
        name = f"{'gated ' if gated else ''}{function}"
        raise UserError(
            f"activation {name} cannot be expressed; it must be relu (T5 and Switch) or gated "
            "gelu_new (T5 v1.1, feed_forward_proj='gated-gelu')"
        )
    return "gated-gelu" if gated else "relu"


def _moe_from_hf(given: Mapping[str, Any]) -> MoEConfig:
    if given.get("router_bias", False):
        raise UserError(
            "router_bias=true cannot be expressed: our router has no bias, as the paper's"
        )
    if (dtype := given.get("router_dtype", "float32")) != "float32":
        raise UserError(
            f"router_dtype={dtype!r} cannot be expressed: our router then rounds in other places; "
            "set router_dtype='float32' to accept a router that computes in float32"
        )
    fields = {ours: given.get(theirs, default) for ours, (theirs, default) in _MOE.items()}
    return MoEConfig(
        **fields,
        encoder_sparse_step=_step_from_hf(given, "encoder", given["num_layers"]),
        decoder_sparse_step=_step_from_hf(given, "decoder", given["num_decoder_layers"]),
        capacity_mode="hf",
    )


def _step_from_hf(
    given: Mapping[str, Any], stack: Literal["encoder", "decoder"], layers: int
) -> int:
    """Our sparse step for the layers that HF makes sparse.

    HF's are i % step == 1, or all if step is 1, or none if it is 0; ours are i % step == step - 1.
    """
    count = given[f"num_sparse_{stack}_layers"]
    # Zero layers wanted gives step = layers in HF, which makes layer 1 sparse all the same.
    step = given.get(f"{stack}_sparse_step", layers // count if count > 0 else layers)
    theirs = [i for i in range(layers) if step > 0 and (step == 1 or i % step == 1)]
    # Ours with a step above 2 never has layer 1, which HF's always has.
    for ours in (0, 1, 2):
        if theirs == [i for i in range(layers) if ours > 0 and i % ours == ours - 1]:
            return ours
    raise UserError(
        f"num_sparse_{stack}_layers={count} of {layers} layers makes HF's {stack} layers {theirs} "
        f"sparse ({stack}_sparse_step={step}: i % {step} == 1); every n-th layer must be, and the "
        "two rules agree only for steps 1 and 2. Such a model cannot be expressed here"
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of HF's `config.json`: `switch_transformers` with experts, else `t5`.

    Raises:
        UserError: HF has no such model.
    """
    refuse_inexpressible(config)
    result: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()}
    result |= {theirs: getattr(config, ours) for ours, (theirs, _) in _OTHER.items()}
    result |= {
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    if not config.moe.num_experts:
        return result | {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "feed_forward_proj": config.activation,
        }
    return result | _moe_to_hf(config)


def _moe_to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe.capacity_mode == "group":
        raise UserError(
            "model.moe.capacity_mode='group' cannot be expressed in HF, whose experts have a fixed "
            "number of slots per row; set it to 'dropless', or to 'hf' and choose hf_capacity"
        )
    result = {theirs: getattr(moe, ours) for ours, (theirs, _) in _MOE.items()}
    if moe.exploration != "jitter":
        result["router_jitter_noise"] = 0.0
    if moe.capacity_mode == "dropless":
        result["expert_capacity"] = _UNLIMITED
    for stack in ("encoder", "decoder"):
        step = getattr(moe, f"{stack}_sparse_step")
        layers = config.num_layers(stack)
        result[f"num_sparse_{stack}_layers"] = layers // step if step else 0
        # HF would compute the step, and get a sparse layer out of a count of 0.
        result[f"{stack}_sparse_step"] = step
    return result | {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "dense_act_fn": "relu",
        "router_bias": False,
        "router_dtype": "float32",
    }


def refuse_inexpressible(config: ModelConfig) -> None:
    """Raise if HF has no module with these parameters."""
    moe = config.moe
    if not moe.num_experts:
        return
    hf = {"router": "switch", "attention": "none", "router_precision": "selective"}
    for key, only in hf.items():
        if (value := getattr(moe, key)) != only:
            raise UserError(f"model.moe.{key}={value!r} is unknown to HF; it must be {only!r}")
    if config.activation != "relu":
        raise UserError(
            f"model.activation={config.activation!r} with model.moe.num_experts={moe.num_experts} "
            "cannot be expressed in HF, which has no gated experts; only relu can"
        )
    for stack in ("encoder", "decoder"):
        step = getattr(moe, f"{stack}_sparse_step")
        if step > 2:
            raise UserError(
                f"model.moe.{stack}_sparse_step={step} cannot be expressed in HF, whose sparse "
                f"layers are i % {step} == 1 and ours i % {step} == {step - 1}; use 0, 1 or 2"
            )
