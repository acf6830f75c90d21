"""Hugging Face's names for our model: tensors and configurations, both ways.

Covers `t5` (v1.0 and v1.1) and `switch_transformers`. Tensors keep dtype and orientation; names
change, and experts are one stack [E, …] with us and apart with HF.

Whatever decides a forward pass in evaluation is carried over exactly or refused. What acts in
training alone is carried where HF has a field for it; `init_scale`, `expert_dropout`,
`exploration` but for jitter, `aux_loss_reduction` and `aux_loss_padding` have none and come back as
our defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from megaswitch.config import ModelConfig, MoEConfig, RunConfig
from megaswitch.log import ConfigError, UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import spec_of
from megaswitch.rules import check

_SHARED = "shared.weight"
_HEAD = "lm_head.weight"
_STACK_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Old T5 files hold a table that no T5 ever read.
_JUNK = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
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


# ---------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Entry:
    """One of our parameters: its shape, and HF's name for it, or names if it is one per expert."""

    shape: tuple[int, ...]
    is_expert: bool
    names: tuple[str, ...]


def from_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict from HF's.

    Args:
        state: of `T5ForConditionalGeneration` or `SwitchTransformersForConditionalGeneration`, with
            or without the aliases of tied tables.
        config: what `config_from_hf` made of the model's `config.json`.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or tables disagree that are
            one with us.
    """
    entries = _entries(config)
    tables = _tables(state, config)
    wanted = {name: name for entry in entries.values() for name in entry.names}
    if tables:
        wanted[_SHARED] = tables[0]
    missing = [name for name, source in wanted.items() if source not in state]
    if missing == [_HEAD]:
        raise UserError(
            f"{_HEAD} is missing, but the configuration says that logits are not scaled by "
            "d_model^-½, which here goes with a head of its own; add the tensor, or set "
            "tie_word_embeddings=true if the model was trained with scaled logits"
        )
    known = {*wanted, *_STACK_TABLES, _SHARED, _HEAD} | _JUNK
    _check_names(missing, [name for name in state if name not in known])

    result = {}
    for ours, entry in entries.items():
        parts = [state[wanted[name]] for name in entry.names]
        shape = entry.shape[1:] if entry.is_expert else entry.shape
        for name, part in zip(entry.names, parts, strict=True):
            _check_shape(name, part, shape)
        result[ours] = torch.stack(parts) if entry.is_expert else parts[0]
    return result


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """HF's state dict from ours, without copying: experts are views, repeated tables one tensor.

    Args:
        state: of `SwitchTransformer(config)`.
        config: of that model.

    Raises:
        UserError: HF has no such model, or `state` is not of `config`.
    """
    entries = _entries(config)
    missing = [name for name in entries if name not in state]
    _check_names(missing, [name for name in state if name not in entries])
    result: dict[str, Tensor] = {}
    for ours, entry in entries.items():
        tensor = state[ours]
        _check_shape(ours, tensor, entry.shape)
        parts: Sequence[Tensor] = tensor.unbind(0) if entry.is_expert else (tensor,)
        result.update(zip(entry.names, parts, strict=True))
    if config.moe.num_experts and not config.tie_embeddings:
        # HF's untied Switch reads these two and leaves `shared` unused.
        result.update(dict.fromkeys(_STACK_TABLES, result[_SHARED]))
    return result


def _entries(config: ModelConfig) -> dict[str, _Entry]:
    """Every parameter of `SwitchTransformer(config)`, by our name."""
    _refuse_inexpressible(config)
    with torch.device("meta"):
        model = SwitchTransformer(config)
    ffn = "mlp" if config.moe.num_experts else "DenseReluDense"
    result = {}
    for name, weight in model.named_parameters():
        is_expert = spec_of(weight).is_expert
        names = tuple(_hf_names(name, ffn, len(weight) if is_expert else None))
        result[name] = _Entry(tuple(weight.shape), is_expert, names)
    return result


def _hf_names(name: str, ffn: str, experts: int | None) -> Iterator[str]:
    """HF's name of our parameter `name`, or one for each expert.

    Args:
        ffn: HF's name of the module in a feed-forward layer.
        experts: how many the parameter stacks, or None.
    """
    stack, *path = name.removesuffix(".weight").split(".")
    match path:
        case []:
            yield {"embedding": _SHARED, "head": _HEAD}[stack]
        case ["relative_bias"]:
            yield f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        case ["final_norm"]:
            yield f"{stack}.final_layer_norm.weight"
        case ["layers", index, part, *rest]:
            places = {"self_attention": 0, "cross_attention": 1, "ffn": 1 + (stack == "decoder")}
            prefix = f"{stack}.block.{index}.layer.{places[part.removesuffix('_norm')]}"
            module = {
                "self_attention": "SelfAttention",
                "cross_attention": "EncDecAttention",
                "ffn": ffn,
            }.get(part, "layer_norm")
            match rest:
                case ["router"]:
                    yield f"{prefix}.{module}.router.classifier.weight"
                case ["experts", matrix]:
                    for expert in range(experts or 0):
                        yield f"{prefix}.{module}.experts.expert_{expert}.{matrix}.weight"
                case _:
                    yield ".".join([prefix, module, *rest, "weight"])
        case _:
            raise AssertionError(f"no HF name for {name}")


def _tables(state: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    """Names in `state` of the token embedding, after checking that they agree."""
    names = [name for name in (_SHARED, *_STACK_TABLES) if name in state]
    if config.tie_embeddings and _HEAD in state:
        names.append(_HEAD)
    untied_switch = config.moe.num_experts and not config.tie_embeddings
    if untied_switch and any(name in names for name in _STACK_TABLES):
        names = [name for name in names if name != _SHARED]
    for name in names[1:]:
        if state[name] is not state[names[0]] and not torch.equal(state[name], state[names[0]]):
            raise UserError(
                f"{name} differs from {names[0]}, but they are one table in a model with "
                f"tie_embeddings={config.tie_embeddings}; such a model cannot be expressed here. "
                "If its logits are not scaled by d_model^-½ (T5 v1.1), its config.json must say "
                "tie_word_embeddings=false"
            )
    return names


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(
            f"{name} has shape {list(tensor.shape)}, but the configuration makes it {list(shape)}; "
            "convert with the configuration that the model was trained with"
        )


def _check_names(missing: Sequence[str], unknown: Sequence[str]) -> None:
    problems = [
        f"{what} ({len(names)}): {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("not of this model", unknown))
        if names
    ]
    if problems:
        raise UserError(
            f"the tensors do not make the model of the configuration: {'; '.join(problems)}; "
            "convert a whole model with the configuration that it was trained with"
        )


# ---------------------------------------------------------------- configurations


def config_from_hf(hf_config_dict: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from the contents of HF's `config.json`.

    Raises:
        UserError: the model is of another kind, or does something that ours cannot.
    """
    given = dict(hf_config_dict)
    kind = given.get("model_type")
    if kind not in ("t5", "switch_transformers"):
        raise UserError(
            f"model_type={kind!r} cannot be converted; it must be 't5' or 'switch_transformers'"
        )
    sparse = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")
    required = [name for name in _SHAPE.values() if kind != "t5" or name != "num_decoder_layers"]
    required += ["num_experts", "expert_capacity", *sparse] if kind != "t5" else []
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
            # HF 5 saves every T5 as tied; what was meant is then in `scale_decoder_outputs` alone.
            tie_embeddings=given.get(
                "scale_decoder_outputs", given.get("tie_word_embeddings", True)
            ),
            init_scale=1.0,
            moe=MoEConfig() if kind == "t5" else _moe_from_hf(given),
        )
    except ValidationError as error:
        raise UserError(f"the HF configuration cannot be used: {error}") from None
    if problems := check(RunConfig(model=config)):
        raise ConfigError(problems)
    return config


def _activation(given: Mapping[str, Any]) -> Literal["relu", "gated-gelu"]:
    """Ours for T5's `feed_forward_proj` or Switch's `dense_act_fn`."""
    if given["model_type"] == "t5":
        projection = given.get("feed_forward_proj", "relu")
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
    _refuse_inexpressible(config)
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


def _refuse_inexpressible(config: ModelConfig) -> None:
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
