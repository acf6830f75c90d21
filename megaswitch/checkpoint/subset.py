"""A model with some of the experts or layers of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megaswitch.checkpoint.contents import MODEL, STATE, state_dims, stored_keys
from megaswitch.checkpoint.tensor_files import Part, StoredTensor
from megaswitch.config import ModelConfig
from megaswitch.log import UserError
from megaswitch.model.count import meta_model


@dataclass(frozen=True)
class Subset:
    """What is kept, in order; None: all.

    Attributes:
        experts: of every Switch layer.
        encoder: layers.
        decoder: layers.
    """

    experts: Sequence[int] | None = None
    encoder: Sequence[int] | None = None
    decoder: Sequence[int] | None = None

    def of(self, model: ModelConfig) -> ModelConfig:
        """The configuration of a model that has only this.

        Raises:
            UserError: the model lacks some of it.
        """
        experts, encoder, decoder = self.experts, self.encoder, self.decoder
        _check("--experts", experts, model.moe.num_experts, "experts")
        _check("--encoder-layers", encoder, model.num_encoder_layers, "encoder layers")
        _check("--decoder-layers", decoder, model.num_decoder_layers, "decoder layers")
        if experts is not None:
            model = replace(model, moe=replace(model.moe, num_experts=len(experts)))
        if encoder is not None:
            model = replace(model, num_encoder_layers=len(encoder))
        if decoder is not None:
            model = replace(model, num_decoder_layers=len(decoder))
        return model

    def source_of(self, name: str) -> str:
        """The parameter that becomes parameter `name`."""
        for stack, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            prefix = f"{stack}.layers."
            if layers is not None and name.startswith(prefix):
                index, _, rest = name.removeprefix(prefix).partition(".")
                return f"{prefix}{layers[int(index)]}.{rest}"
        return name


def _check(option: str, kept: Sequence[int] | None, count: int, what: str) -> None:
    if kept is not None and (max(kept) >= count or len(set(kept)) < len(kept)):
        raise UserError(
            f"{option} names number {max(kept)} or one twice, and the model has {count} {what}, "
            "counted from 0; name some of these"
        )


def take_subset(
    stored: Mapping[str, StoredTensor], model: ModelConfig, subset: Subset
) -> dict[str, StoredTensor]:
    """The tensors of the smaller model, under their names there, as parts of those stored.

    Args:
        stored: of the whole model's checkpoint.
        model: the whole one.
        subset: what is kept.

    Raises:
        UserError: the layers kept are not dense and sparse in the order that the smaller model is.
    """
    whole = {name: tuple(p.shape) for name, p in meta_model(model).named_parameters()}
    keys = stored_keys(stored)
    taken: dict[str, StoredTensor] = {}
    for name, parameter in meta_model(subset.of(model)).named_parameters():
        source, shape = subset.source_of(name), tuple(parameter.shape)
        # Only the number of experts can tell the two apart.
        divided = [
            dim
            for dim, (a, b) in enumerate(zip(whole.get(source, ()), shape, strict=False))
            if a != b
        ]
        if len(whole.get(source, ())) != len(shape) or (divided and subset.experts is None):
            raise UserError(
                f"the layers kept cannot stand in this order: {name} would come from {source}, "
                "which is no such layer. Dense and Switch layers alternate by model.moe."
                "encoder_sparse_step and decoder_sparse_step; keep layers of the same rhythm"
            )
        tensors = [(f"{MODEL}{source}", f"{MODEL}{name}", divided)]
        for key in keys.get(source, ()):
            marks = state_dims(key, tuple(int(dim in divided) for dim in range(len(shape))))
            dims = [dim for dim, mark in enumerate(marks) if mark]
            tensors.append((f"{STATE}{source}.{key}", f"{STATE}{name}.{key}", dims))
        for old, new, dims in tensors:
            tensor = stored[old]
            for dim in dims:
                tensor = _select(tensor, dim, subset.experts or ())
            taken[new] = tensor if old == new else replace(tensor, name=new)
    return taken


def _select(tensor: StoredTensor, dim: int, kept: Sequence[int]) -> StoredTensor:
    """Some indices of a dimension."""
    parts = []
    for first, begin, length in _runs(kept):
        for part in tensor.parts:
            start = max(part.offsets[dim], begin)
            end = min(part.offsets[dim] + part.shape[dim], begin + length)
            if start < end:
                inner = list(part.inner or (0,) * len(part.shape))
                inner[dim] += start - part.offsets[dim]
                offsets, shape = list(part.offsets), list(part.shape)
                offsets[dim], shape[dim] = first + start - begin, end - start
                stored = part.stored or part.shape
                parts.append(
                    Part(part.file, tuple(offsets), tuple(shape), part.at, stored, tuple(inner))
                )
    extents = list(tensor.shape)
    extents[dim] = len(kept)
    return StoredTensor(tensor.name, tuple(extents), tensor.dtype, parts)


def _runs(kept: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of successive numbers: their place among those kept, the first number, how many."""
    runs: list[tuple[int, int, int]] = []
    for place, number in enumerate(kept):
        if runs and number == sum(runs[-1][1:]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((place, number, 1))
    return runs
