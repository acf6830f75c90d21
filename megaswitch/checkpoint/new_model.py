"""A checkpoint of a model that is made from another checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.checkpoint.chunks import Chunk
from megaswitch.checkpoint.conversion import Options, write_checkpoint
from megaswitch.checkpoint.safetensors_file import DTYPES
from megaswitch.checkpoint.streams import Source, Target
from megaswitch.checkpoint.tensor_files import StoredTensor, read_chunks
from megaswitch.config import ModelConfig, ParallelConfig, RunConfig
from megaswitch.log import UserError


def write_model(
    target: Path, source: Path, config: RunConfig, model: ModelConfig, targets: Sequence[Target]
) -> None:
    """Write a checkpoint at step 0, with the tokenizer of the one it is made from.

    Args:
        target: of the new checkpoint; must not exist.
        source: the checkpoint that it is made from.
        config: that `source` was written under.
        model: the new one.
        targets: its parameters; made one after the other, so that memory holds a matrix or two.

    Raises:
        UserError: `target` exists or cannot be written; it then is not there.
    """
    file = source / "tokenizer.model"
    tokenizer = file.read_bytes() if file.is_file() else None
    # It is loaded under any layout; that of another model may not even fit.
    run = replace(config, parallel=ParallelConfig())
    model = replace(model, preset=None)
    write_checkpoint(target, model, targets, Options(), tokenizer, run=run)


def refuse_existing(target: Path) -> None:
    """Refuse, before any work, to write over something.

    Raises:
        UserError: `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another name, or remove it first")


def made(name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> Source:
    """A tensor that is computed when it is written."""

    def read() -> Iterator[Tensor]:
        yield make()

    return Source(name, tuple(shape), dtype, read)


def stored_dtype(path: Path, stored: dict[str, StoredTensor], name: str) -> torch.dtype:
    """Type of a tensor of a checkpoint.

    Raises:
        UserError: it is not there, or of no type that weights have.
    """
    tensor = stored.get(name)
    if tensor is None or tensor.dtype not in DTYPES:
        raise UserError(f"checkpoint {path} has no readable tensor {name}; use another checkpoint")
    return DTYPES[tensor.dtype]


def read_part(
    path: Path, stored: dict[str, StoredTensor], name: str, expert: int | None = None
) -> Tensor:
    """A tensor of a checkpoint, or one of its experts without the first dimension, as stored.

    Raises:
        UserError: it is not there, or its file is damaged.
    """
    dtype = stored_dtype(path, stored, name)
    shape = stored[name].shape
    offsets = [0] * len(shape)
    sizes = list(shape)
    if expert is not None:
        sizes[0], offsets[0] = 1, expert
    part = torch.empty(sizes, dtype=dtype)
    read_chunks(path, stored, [Chunk(name, shape, tuple(offsets), part)])
    return part if expert is None else part[0]
