"""A checkpoint of a model that is made from another checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.checkpoint.chunks import Chunk
from megaswitch.checkpoint.conversion import Options, write_checkpoint
from megaswitch.checkpoint.manager import find_checkpoint, read_config, verify
from megaswitch.checkpoint.safetensors_file import DTYPES
from megaswitch.checkpoint.streams import Source, Target
from megaswitch.checkpoint.tensor_files import StoredTensor, read_chunks, read_headers
from megaswitch.config import ModelConfig, ParallelConfig, RunConfig
from megaswitch.log import UserError
from megaswitch.rules import check_groups, check_model
from megaswitch.rules_moe import check_moe


@dataclass(frozen=True)
class Original:
    """The checkpoint that a model is made from.

    Attributes:
        path: of it.
        config: that it was written under.
        stored: its tensors by name.
    """

    path: Path
    config: RunConfig
    stored: dict[str, StoredTensor]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            UserError: it is not there, or of no type that weights have.
        """
        tensor = self.stored.get(name)
        if tensor is None or tensor.dtype not in DTYPES:
            raise UserError(
                f"checkpoint {self.path} has no readable tensor {name}; use another checkpoint"
            )
        return DTYPES[tensor.dtype]

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor, or one of its experts without the first dimension, as stored.

        Raises:
            UserError: it is not there, or its file is damaged.
        """
        dtype = self.dtype(name)
        shape = self.stored[name].shape
        offsets = [0] * len(shape)
        sizes = list(shape)
        if expert is not None:
            sizes[0], offsets[0] = 1, expert
        part = torch.empty(sizes, dtype=dtype)
        read_chunks(self.path, self.stored, [Chunk(name, shape, tuple(offsets), part)])
        return part if expert is None else part[0]


def make_model(
    source: Path,
    target: Path,
    change: Callable[[Path, RunConfig], ModelConfig],
    make: Callable[[Original, ModelConfig], Sequence[Target]],
) -> None:
    """Write a checkpoint at step 0, with the tokenizer of the one it is made from.

    Args:
        source: the checkpoint that it is made from, or a run folder, whose newest is taken.
        target: of the new checkpoint; must not exist.
        change: from that checkpoint's path and configuration to the new model; may refuse them.
        make: the new model's parameters; made one after the other, so that memory holds a matrix
            or two.

    Raises:
        UserError: `target` exists or cannot be written, and then is not there; `source` is refused
            or damaged; or no model may be as the new one.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another name, or remove it first")
    path = find_checkpoint(source)
    config = read_config(path)
    model = replace(change(path, config), preset=None)
    new = replace(config, model=model)
    found = (*check_model(model), *check_moe(new), *check_groups(new))
    # How many rows are computed at a time is for whoever runs the model to say.
    if problems := [problem for problem in found if "micro_batch" not in problem]:
        raise UserError("\n".join(problems))
    verify(path)
    stored = read_headers(sorted(path.glob("*.safetensors")))
    targets = make(Original(path, config, stored), model)
    file = path / "tokenizer.model"
    tokenizer = file.read_bytes() if file.is_file() else None
    # It is loaded under any layout; that of another model may not even fit.
    run = replace(config, parallel=ParallelConfig())
    write_checkpoint(target, model, targets, Options(), tokenizer, run=run)


def made(name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> Source:
    """A tensor that is computed when it is written."""

    def read() -> Iterator[Tensor]:
        yield make()

    return Source(name, tuple(shape), dtype, read)
