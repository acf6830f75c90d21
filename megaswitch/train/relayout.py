"""What `megaswitch reshard` is to do: from a checkpoint, or a preset, to the files of a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megaswitch.checkpoint.contents import FP8, MODEL, stored_keys
from megaswitch.checkpoint.integrity import check_sizes
from megaswitch.checkpoint.manager import (
    find_checkpoint,
    read_config,
    read_state,
    tensor_files,
)
from megaswitch.checkpoint.placement import Piece, place_pieces, tensor_names
from megaswitch.checkpoint.reshard import Work
from megaswitch.checkpoint.subset import Subset, take_subset
from megaswitch.checkpoint.tensor_files import StoredTensor, read_headers
from megaswitch.config import RunConfig, relaid, to_toml
from megaswitch.log import UserError, info
from megaswitch.model.count import meta_model
from megaswitch.train.placement import fresh_states, placements

Kind = Literal["fp32", "bf16", "fp16"]
_WORDS: Mapping[Kind, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Changes:
    """What becomes of a checkpoint beside its layout.

    Attributes:
        optimizer: whether the optimizer's states are kept.
        kind: type of the weights; None: as stored. The optimizer's states keep theirs.
        subset: of the model.
    """

    optimizer: bool = True
    kind: Kind | None = None
    subset: Subset = field(default_factory=Subset)


def plan_work(
    path: Path, overrides: Sequence[str], ranks: int | None, changes: Changes
) -> tuple[Work, RunConfig]:
    """What is to be done to a checkpoint; only its headers and small files are read.

    Args:
        path: a checkpoint, or a run folder, whose newest is taken.
        overrides: the layout, as `config.relaid` takes it.
        ranks: of the layout; None: the least number.
        changes: to the content.

    Returns:
        the work, and the configuration of the result.

    Raises:
        UserError: the checkpoint is damaged, or the layout does not fit.
    """
    path = find_checkpoint(path)
    check_sizes(path, read_state(path)["files"])
    before = read_config(path)
    smaller = replace(before, model=changes.subset.of(before.model))
    config, ranks = relaid(smaller, overrides, ranks)
    stored = read_headers(tensor_files(path))
    _check_model(path, before, stored)
    wanted = take_subset(stored, before.model, changes.subset)
    keys = stored_keys(wanted) if changes.optimizer else {}
    held = placements(config, ranks)
    wanted = {name: wanted[name] for name in tensor_names(held, keys)}
    dtypes = {
        name: _WORDS[changes.kind] if changes.kind and name.startswith(MODEL) else tensor.dtype
        for name, tensor in wanted.items()
    }
    files = place_pieces(held, keys, dtypes, ranks)
    if changes.optimizer and any(name.startswith(FP8) for name in stored):
        info("left out: the magnitudes of FP8's delayed scaling, which training finds anew")
    return Work(path, stored, wanted, files, config.parallel.tp, to_toml(config)), config


def plan_fresh(
    config: RunConfig, overrides: Sequence[str], ranks: int | None, changes: Changes
) -> tuple[list[list[Piece]], RunConfig]:
    """The files of a checkpoint that a run with this configuration would have, in some layout."""
    smaller = replace(config, model=changes.subset.of(config.model))
    config, ranks = relaid(smaller, overrides, ranks)
    held = placements(config, ranks)
    keys = fresh_states(config) if changes.optimizer else {}
    dtypes = dict.fromkeys(tensor_names(held, keys), "F32")
    if changes.kind:
        dtypes |= {f"{MODEL}{name}": _WORDS[changes.kind] for name in held}
    return place_pieces(held, keys, dtypes, ranks), config


def _check_model(path: Path, config: RunConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors that are not those of the configuration, before anything is made of them."""
    for name, parameter in meta_model(config.model).named_parameters():
        tensor = stored.get(f"{MODEL}{name}")
        if tensor is None or tensor.shape != tuple(parameter.shape):
            has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise UserError(
                f"checkpoint {path} does not fit its own config.toml: {name} must have shape "
                f"{list(parameter.shape)} and {has}; its files do not belong together"
            )
