"""Checkpoints of T5X as published for Switch, T5 v1.1 and mT5, in, array by array.

Flax keeps kernels [in, out] and we [out, in], so matrices are transposed; experts are stacked on
the first axis with both. Layers are apart (`encoder/layers_0/…`: T5X's minimal models and
Flaxformer's Switch) or scanned (`encoder/encoder/…`: T5X's scalable ones), which puts them on axis
1 of one array and keeps heads on an axis of their own.

A checkpoint of T5X has no configuration. The shapes tell all but what follows T5's conventions
(relative distances up to 128, ε = 1e-6, tanh GELU where FFNs are gated) and the routing groups,
which come from the preset of that shape if there is one, and else are our defaults. Source:
`t5x/examples/t5/network.py`, `t5x/examples/scalable_t5/network.py`, `flaxformer/architectures/moe`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.conversion import Converted, Options, read_tokenizer, write_checkpoint
from megaswitch.checkpoint.streams import Source, Target
from megaswitch.checkpoint.t5x_file import Array, t5x_arrays
from megaswitch.checkpoint.tensor_files import windows
from megaswitch.config import ModelConfig, MoEConfig, RunConfig, model_config
from megaswitch.log import ConfigError, UserError
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import spec_of
from megaswitch.presets import PRESETS
from megaswitch.rules import check

_MAX_LAYERS, _MAX_EXPERTS = 1_000, 1_000_000
_SHAPE = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_encoder_layers"),
    *("num_decoder_layers", "activation", "tie_embeddings", "relative_buckets"),
)
_SPARSE = ("num_experts", "encoder_sparse_step", "decoder_sparse_step")
_MODULES = {
    "encoder.self_attention": "attention",
    "decoder.self_attention": "self_attention",
    "decoder.cross_attention": "encoder_decoder_attention",
    "encoder.self_attention_norm": "pre_attention_layer_norm",
    "decoder.self_attention_norm": "pre_self_attention_layer_norm",
    "decoder.cross_attention_norm": "pre_cross_attention_layer_norm",
    "encoder.ffn_norm": "pre_mlp_layer_norm",
    "decoder.ffn_norm": "pre_mlp_layer_norm",
}
_STACKS = ("encoder", "decoder")
_KERNELS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def import_t5x(source: Path, destination: Path, options: Options) -> Converted:
    """Write a checkpoint of a T5X model.

    Args:
        source: the folder `checkpoint_N`.
        destination: a folder that does not exist yet.
        options: how.

    Raises:
        UserError: our model cannot be that one, or an array is damaged; nothing is written then.
    """
    arrays = t5x_arrays(source)
    model, notes = _config(arrays)
    tokenizer = None
    if options.tokenizer:
        tokenizer = read_tokenizer(options.tokenizer, model.vocab_size)
    else:
        notes.append(
            "T5X keeps the tokenizer elsewhere; give its SentencePiece model by --tokenizer for "
            "commands that read or write text"
        )
    return write_checkpoint(destination, model, _targets(arrays, model), options, tokenizer, notes)


def _targets(arrays: Mapping[str, Array], model: ModelConfig) -> list[Target]:
    with torch.device("meta"):
        network = SwitchTransformer(model)
    left = set(arrays)
    targets = []
    for name, weight in network.named_parameters():
        is_expert = spec_of(weight).is_expert
        view = _view(arrays, name)
        left.discard(view.key)
        shape = tuple(weight.shape)
        if is_expert:
            if view.array.shape[0] != len(weight):
                raise _misfit(view, shape)
            sources = [view.source(shape[1:], expert) for expert in range(len(weight))]
        else:
            sources = [view.source(shape)]
        targets.append(Target(name, sources, stacked=is_expert))
    if left:
        shown = ", ".join(sorted(left)[:5])
        raise UserError(
            f"the checkpoint has {len(left)} arrays that our model has no place for ({shown}); "
            "only T5 v1.0 and v1.1, mT5 and Switch models can be converted"
        )
    return targets


@dataclass(frozen=True)
class _View:
    """A part of one of T5X's arrays that is one of our parameters.

    Attributes:
        key: T5X's.
        array: the whole of it.
        layer: index on axis 1, where layers are scanned.
        kernel: whether it is a matrix to be transposed.
        heads: which pair of axes are heads and their size, where they are apart: the last two of
            query, key and value, the first two of out.
    """

    key: str
    array: Array
    layer: int | None
    kernel: bool
    heads: str | None

    def source(self, shape: tuple[int, ...], expert: int | None = None) -> Source:
        """As a source of our parameter, or of one of its experts, which has this shape."""
        if self._matrix_shape(expert) != (shape[::-1] if self.kernel else shape):
            raise _misfit(self, shape)

        def read() -> Iterator[Tensor]:
            if not self.kernel and self.layer is None:
                for index in windows(shape, self.array.dtype.itemsize):
                    yield self.array.read([*index, *(slice(None),) * (len(shape) - len(index))])
                return
            matrix = self._matrix(expert)
            yield matrix.T if self.kernel else matrix

        name = self.key if expert is None else f"{self.key} of expert {expert}"
        return Source(name, shape, self.array.dtype, read)

    def _fixed(self, expert: int | None) -> dict[int, int]:
        """Axes that are at one index."""
        fixed = {} if expert is None else {0: expert}
        if self.layer is not None:
            fixed[1] = self.layer
        return fixed

    def _matrix_shape(self, expert: int | None) -> tuple[int, ...]:
        fixed = self._fixed(expert)
        return self._joined([n for d, n in enumerate(self.array.shape) if d not in fixed])

    def _joined(self, shape: list[int]) -> tuple[int, ...]:
        if len(shape) != 3 or self.heads is None:
            return tuple(shape)
        if self.heads == "out":
            return (shape[0] * shape[1], shape[2])
        return (shape[0], shape[1] * shape[2])

    def _matrix(self, expert: int | None) -> Tensor:
        """[in, out], or what is no matrix as it is."""
        fixed = self._fixed(expert)
        index = [
            slice(fixed[d], fixed[d] + 1) if d in fixed else slice(None)
            for d in range(len(self.array.shape))
        ]
        part = self.array.read(index)
        kept = [n for d, n in enumerate(part.shape) if d not in fixed]
        return part.reshape(self._joined(kept))


def _view(arrays: Mapping[str, Array], name: str) -> _View:
    """Where our parameter `name` is.

    Raises:
        UserError: nowhere.
    """
    stack, *path = name.removesuffix(".weight").split(".")
    layer, kernel, heads = None, True, None
    match path:
        case []:
            key = {"embedding": "token_embedder/embedding", "head": "decoder/logits_dense/kernel"}[
                stack
            ]
            kernel = stack == "head"
        case ["relative_bias"]:
            key = f"{stack}/relpos_bias/rel_embedding"
        case ["final_norm"]:
            key, kernel = f"{stack}/{stack}_norm/scale", False
        case ["layers", index, part, *rest]:
            kernel = not part.endswith("_norm")
            inside = _inside(stack, part, rest)
            key = f"{stack}/layers_{index}/{inside}"
            if key not in arrays and f"{stack}/{stack}/{inside}" in arrays:
                key, layer = f"{stack}/{stack}/{inside}", int(index)
            heads = _KERNELS[rest[0]] if part.endswith("attention") else None
        case _:
            raise AssertionError(f"no place for {name} in T5X")
    if key not in arrays:
        raise UserError(
            f"the checkpoint lacks {key}, which a model with its other arrays has; it is "
            "incomplete or no T5, mT5 or Switch model"
        )
    return _View(key, arrays[key], layer, kernel, heads)


def _inside(stack: str, part: str, rest: list[str]) -> str:
    """T5X's key within a layer."""
    match part, rest:
        case "ffn", ["router"]:
            return "mlp/router/router_weights/w/kernel"
        case "ffn", ["experts", matrix]:
            return f"mlp/expert/{matrix}/kernel"
        case "ffn", [matrix]:
            return f"mlp/{matrix}/kernel"
        case _, [matrix]:
            return f"{_MODULES[f'{stack}.{part}']}/{_KERNELS[matrix]}/kernel"
    return f"{_MODULES[f'{stack}.{part}']}/scale"


def _misfit(view: _View, shape: tuple[int, ...]) -> UserError:
    return UserError(
        f"{view.key} has shape {list(view.array.shape)}, which does not make our {list(shape)}; "
        "the arrays do not belong together"
    )


# ---------------------------------------------------------------- the configuration


def _config(arrays: Mapping[str, Array]) -> tuple[ModelConfig, list[str]]:
    """The model that the arrays' keys and shapes are of, and what a user should know.

    Raises:
        UserError: they are of none of ours.
    """
    if any(f"{stack}/{stack}/relpos_bias/rel_embedding" in arrays for stack in _STACKS):
        raise UserError(
            "each layer of the checkpoint has relative positions of its own, as umT5's, and ours "
            "share those of the first; such a model cannot be converted"
        )
    vocab_size, d_model = _dims(arrays, "token_embedder/embedding", 2)
    heads, buckets = _dims(arrays, "encoder/relpos_bias/rel_embedding", 2)
    layers = {stack: _layers(arrays, stack) for stack in _STACKS}
    query = next((k for k in arrays if k.endswith("/attention/query/kernel")), "")
    out = next((k for k in sorted(arrays) if re.search(r"/mlp/(expert/)?wo/kernel$", k)), "")
    inner = _numel(arrays, query) // (d_model * (layers["encoder"] if _scanned(query) else 1))
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": max(inner // heads, 1),
        "d_ff": arrays[out].shape[1 if "/expert/" in out else 0] if out else 0,
        "num_heads": heads,
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "activation": "gated-gelu" if any("/wi_0/" in k for k in arrays) else "relu",
        "tie_embeddings": "decoder/logits_dense/kernel" not in arrays,
        "relative_buckets": buckets,
    }
    moe = _experts(arrays, layers)
    for name in PRESETS:
        preset = model_config(name)
        if (
            all(getattr(preset, key) == fields[key] for key in _SHAPE)
            and all(
                getattr(preset.moe, key) == moe.get(key, getattr(preset.moe, key))
                for key in _SPARSE
            )
            and bool(moe) == bool(preset.moe.num_experts)
        ):
            return preset, [f"the arrays have the shape of the preset {name}, which says the rest"]
    try:
        config = ModelConfig(**fields, moe=MoEConfig(**moe))
    except ValueError as error:
        raise UserError(f"the arrays make no model of ours: {error}") from None
    problems = [p for p in check(RunConfig(model=config)) if p.startswith("model.")]
    if problems:
        raise ConfigError(problems)
    return config, ["no preset has the shape of the arrays; routing and dropout are the defaults"]


def _dims(arrays: Mapping[str, Array], key: str, count: int) -> tuple[int, ...]:
    shape = arrays[key].shape if key in arrays else ()
    if len(shape) != count or 0 in shape:
        raise UserError(
            f"the checkpoint has {key} of shape {list(shape)}, and a T5 has one of {count} "
            "dimensions; it is incomplete or no T5, mT5 or Switch model"
        )
    return shape


def _numel(arrays: Mapping[str, Array], key: str) -> int:
    result = 1
    for n in arrays[key].shape if key else ():
        result *= n
    return result


def _scanned(key: str) -> bool:
    return key.startswith(("encoder/encoder/", "decoder/decoder/"))


def _layers(arrays: Mapping[str, Array], stack: str) -> int:
    """Layers of a stack; at most a thousand, so that no number in a file makes us build more."""
    norm = f"{stack}/{stack}/pre_mlp_layer_norm/scale"
    if norm in arrays:
        count = _dims(arrays, norm, 2)[1]
    else:
        count = len({m[1] for k in arrays if (m := re.match(rf"{stack}/(layers_\d+)/", k))})
    if not 0 < count <= _MAX_LAYERS:
        raise UserError(
            f"the checkpoint has {count} layers in its {stack}; 1 to {_MAX_LAYERS} can be converted"
        )
    return count


def _experts(arrays: Mapping[str, Array], layers: Mapping[str, int]) -> dict[str, Any]:
    """What of `model.moe` the arrays show; empty for a dense model."""
    result: dict[str, Any] = {}
    counts = {a.shape[0] for k, a in arrays.items() if "/mlp/expert/" in k and a.shape}
    if not counts:
        return {}
    for stack, count in layers.items():
        pattern = re.compile(rf"{stack}/layers_(\d{{1,6}})/mlp/expert/")
        found = {int(match[1]) for key in arrays if (match := pattern.match(key))}
        step = next((n for n in range(1, count + 1) if found == set(range(n - 1, count, n))), 0)
        if found and not step:
            raise UserError(
                f"the {stack}'s sparse layers are {sorted(found)} of {count}; every n-th must be "
                "(n-1, 2n-1, …), or none"
            )
        result[f"{stack}_sparse_step"] = step
    if len(counts) > 1 or max(counts) > _MAX_EXPERTS:
        raise UserError(f"the layers have {sorted(counts)[:5]} experts; all must have as many")
    return result | {"num_experts": counts.pop()}
