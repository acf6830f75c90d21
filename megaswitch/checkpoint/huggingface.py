"""Hugging Face's names for the tensors of our model, both ways.

Covers `t5` (v1.0, v1.1 and what shares their shape) and `switch_transformers`. Tensors keep dtype
and orientation; names change, and experts are one stack [E, …] with us and apart with HF.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaswitch.checkpoint.huggingface_config import refuse_inexpressible
from megaswitch.config import ModelConfig
from megaswitch.log import UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import spec_of

_SHARED = "shared.weight"
_HEAD = "lm_head.weight"
_STACK_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Old T5 files hold a table that no T5 ever read.
_JUNK = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


@dataclass(frozen=True)
class Names:
    """HF's names of one of our parameters.

    Attributes:
        shape: of our parameter.
        is_expert: whether HF has one tensor for each expert, and `names` is one for each.
        names: else all of them hold the same values.
    """

    shape: tuple[int, ...]
    is_expert: bool
    names: tuple[str, ...]

    @property
    def shape_of_each(self) -> tuple[int, ...]:
        """Of HF's tensors."""
        return self.shape[1:] if self.is_expert else self.shape


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
    result = {}
    for ours, entry in names_to_read({n: t.shape for n, t in state.items()}, config).items():
        parts = [state[name] for name in entry.names]
        if not entry.is_expert:
            for name, part in zip(entry.names[1:], parts[1:], strict=True):
                if part is not parts[0] and not torch.equal(part, parts[0]):
                    raise tables_differ(name, entry.names[0], config)
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
    result: dict[str, Tensor] = {}
    for ours, entry in names_to_write({n: t.shape for n, t in state.items()}, config).items():
        tensor = state[ours]
        parts = tensor.unbind(0) if entry.is_expert else (tensor,) * len(entry.names)
        result.update(zip(entry.names, parts, strict=True))
    return result


def names_to_read(shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> dict[str, Names]:
    """Where each of our parameters is among HF's tensors; several names must hold the same.

    Args:
        shapes: of HF's tensors.
        config: what `config_from_hf` made of the model's `config.json`.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    entries = _entries(config)
    tables = _tables(shapes, config)
    if tables:
        entries["embedding.weight"] = replace(entries["embedding.weight"], names=tuple(tables))
    wanted = [name for entry in entries.values() for name in entry.names]
    missing = [name for name in wanted if name not in shapes]
    if missing == [_HEAD]:
        raise UserError(
            f"{_HEAD} is missing, but the configuration says that logits are not scaled by "
            "d_model^-½, which here goes with a head of its own; add the tensor, or set "
            "tie_word_embeddings=true if the model was trained with scaled logits"
        )
    known = {*wanted, *_STACK_TABLES, _SHARED, _HEAD} | _JUNK
    _check_names(missing, [name for name in shapes if name not in known])
    for entry in entries.values():
        for name in entry.names:
            _check_shape(name, shapes[name], entry.shape_of_each)
    return entries


def names_to_write(shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> dict[str, Names]:
    """What each of our parameters becomes with HF.

    Args:
        shapes: of our parameters.
        config: of the model.

    Raises:
        UserError: HF has no such model, or a tensor is missing, left over or of another shape.
    """
    entries = _entries(config)
    missing = [name for name in entries if name not in shapes]
    _check_names(missing, [name for name in shapes if name not in entries])
    for name, entry in entries.items():
        _check_shape(name, shapes[name], entry.shape)
    if config.moe.num_experts and not config.tie_embeddings:
        # HF's untied Switch reads these two and leaves `shared` unused.
        table = entries["embedding.weight"]
        entries["embedding.weight"] = replace(table, names=(*table.names, *_STACK_TABLES))
    return entries


def _entries(config: ModelConfig) -> dict[str, Names]:
    """Every parameter of `SwitchTransformer(config)`, by our name."""
    refuse_inexpressible(config)
    with torch.device("meta"):
        model = SwitchTransformer(config)
    ffn = "mlp" if config.moe.num_experts else "DenseReluDense"
    result = {}
    for name, weight in model.named_parameters():
        is_expert = spec_of(weight).is_expert
        names = tuple(_hf_names(name, ffn, len(weight) if is_expert else None))
        result[name] = Names(tuple(weight.shape), is_expert, names)
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


def _tables(held: Mapping[str, object], config: ModelConfig) -> list[str]:
    """Names of the token embedding among those held; all must have the same values."""
    names = [name for name in (_SHARED, *_STACK_TABLES) if name in held]
    if config.tie_embeddings and _HEAD in held:
        names.append(_HEAD)
    untied_switch = config.moe.num_experts and not config.tie_embeddings
    if untied_switch and any(name in names for name in _STACK_TABLES):
        names = [name for name in names if name != _SHARED]
    return names


def tables_differ(name: str, first: str, config: ModelConfig) -> UserError:
    """The refusal of tables that are one with us and not with this model."""
    return UserError(
        f"{name} differs from {first}, but they are one table in a model with "
        f"tie_embeddings={config.tie_embeddings}; such a model cannot be expressed here. "
        "If its logits are not scaled by d_model^-½ (T5 v1.1), its config.json must say "
        "tie_word_embeddings=false"
    )


def _check_shape(name: str, given: Sequence[int], shape: Sequence[int]) -> None:
    if tuple(given) != tuple(shape):
        raise UserError(
            f"{name} has shape {list(given)}, but the configuration makes it {list(shape)}; "
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
