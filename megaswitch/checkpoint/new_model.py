"""A checkpoint of a model that was made from another one's weights: no optimizer, no steps yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.chunks import Chunk, write_chunks
from megaswitch.checkpoint.manager import FORMAT, TrainState
from megaswitch.checkpoint.tensor_files import StoredTensor, read_chunks
from megaswitch.config import ModelConfig, ParallelConfig, RunConfig, to_toml
from megaswitch.files import sha256, sync, write_durably
from megaswitch.log import UserError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_model(
    target: Path,
    source: Path,
    config: RunConfig,
    model: ModelConfig,
    files: Iterable[Sequence[Chunk]],
) -> None:
    """Write a checkpoint folder; it appears under its name once everything is on disk.

    Args:
        target: of the new checkpoint; must not exist.
        source: the checkpoint whose tokenizer it takes along.
        config: that `source` was written under.
        model: the new one.
        files: tensors of each file, at most one part of each tensor; made one after the other, so
            that memory holds the tensors of one.

    Raises:
        UserError: `target` exists, or cannot be written.
    """
    refuse_existing(target)
    aside = target.with_name(f"{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        sums: dict[str, Any] = {}
        for number, chunks in enumerate(files, 1):
            name = f"part-{number:05d}.safetensors"
            sums[name] = write_chunks(aside / name, chunks)
        if (tokenizer := source / "tokenizer.model").is_file():
            shutil.copyfile(tokenizer, aside / tokenizer.name)
            sync(aside / tokenizer.name)
        # It is loaded under any layout; that of another model may not even fit.
        written = replace(config, model=replace(model, preset=None), parallel=ParallelConfig())
        write_durably(aside / "config.toml", to_toml(written))
        for path in aside.iterdir():
            if path.name not in sums:
                sums[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        state = TrainState(step=0, samples=0, fingerprint="")
        content = {"format": FORMAT, "state": asdict(state), "files": sums}
        write_durably(aside / "state.json", json.dumps(content, indent=1))
        sync(aside)
        aside.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{target} could not be written: {error}; free space, or choose another place"
        ) from error


def refuse_existing(target: Path) -> None:
    """Refuse, before any work, to write over something.

    Raises:
        UserError: `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another name, or remove it first")


def read_part(
    path: Path, stored: dict[str, StoredTensor], name: str, expert: int | None = None
) -> Tensor:
    """A tensor of a checkpoint, or one of its experts' [1, …], in its own type.

    Raises:
        UserError: it is not there, or its file is damaged.
    """
    tensor = stored.get(name)
    if tensor is None or tensor.dtype not in _DTYPES:
        raise UserError(f"checkpoint {path} has no readable tensor {name}; use another checkpoint")
    shape, offsets = tensor.shape, [0] * len(tensor.shape)
    sizes = list(shape)
    if expert is not None:
        sizes[0], offsets[0] = 1, expert
    part = torch.empty(sizes, dtype=_DTYPES[tensor.dtype])
    read_chunks(path, stored, [Chunk(name, shape, tuple(offsets), part)])
    return part
