"""A rank's weights: the global parameters, and the block of each that lies here.

Modules hold parameters as torch wants them (plain tensors, or DTensors under tensor, expert or
sharded data parallelism). Optimizers see plain local blocks of the same memory; checkpoints see
where a block lies in the global tensor. This table ties the three together, by global name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from megaswitch.parallel.mesh import Axis
from megaswitch.parallel.shard import ShardSpec, declare_spec


@dataclass(frozen=True)
class Block:
    """Where this rank's slice lies in a global tensor.

    Attributes:
        shape: of the global tensor.
        offsets: of the slice, per dimension.
        sizes: of the slice, per dimension; a slice may be empty.
        axes: per dimension, the axes (of more than one rank) whose ranks divide it.
        counts: True on exactly one of the ranks that hold the same slice.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: tuple[tuple[Axis, ...], ...]
    counts: bool = True

    @classmethod
    def whole(cls, tensor: Tensor, *, counts: bool = True) -> Block:
        """The block of a rank that holds all of `tensor`."""
        shape = tuple(tensor.shape)
        return cls(shape, (0,) * len(shape), shape, ((),) * len(shape), counts)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the block in the global tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    @property
    def is_whole(self) -> bool:
        """True if no dimension is divided."""
        return not any(self.axes)


@dataclass(frozen=True)
class Weight:
    """One parameter of this rank's part of the model.

    Attributes:
        name: in the whole model.
        parameter: as its module holds it; a DTensor if it is sliced.
        local: this rank's block of it, sharing its memory; `parameter` itself if that is plain.
            It carries the parameter's `ShardSpec`, and `Block` as `block`.
        spec: what its layer declared.
        block: where `local` lies in the global tensor.
    """

    name: str
    parameter: nn.Parameter
    local: nn.Parameter
    spec: ShardSpec
    block: Block


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def sharded_dim(placement: Placement) -> int | None:
    """The dimension that `placement` divides; None if each rank has all."""
    # FSDP2 over a dimension that tp divides too gives `_StridedShard`, which is no `Shard`.
    return getattr(placement, "dim", None)


def weight(
    name: str, parameter: nn.Parameter, spec: ShardSpec, axes: Iterable[Axis], *, counts: bool
) -> Weight:
    """The table's entry for `parameter`.

    Args:
        name: in the whole model.
        parameter: plain, or a DTensor.
        spec: what its layer declared; attached again, since wrapping drops it.
        axes: of the parameter's mesh, in its order, if it is a DTensor.
        counts: whether a rank of this place counts it where it is not sliced.
    """
    declare_spec(parameter, spec)
    data = parameter.data
    if not isinstance(data, DTensor):
        block = Block.whole(data, counts=counts)
        parameter.block = block  # type: ignore[attr-defined]
        return Weight(name, parameter, parameter, spec, block)
    dims: list[list[Axis]] = [[] for _ in data.shape]
    for axis, placement in zip(axes, data.placements, strict=True):
        dim = sharded_dim(placement)
        if dim is not None:
            if axis.size > 1:
                dims[dim].append(axis)
        elif axis.rank != 0:
            counts = False
    local = nn.Parameter(data.to_local(), requires_grad=parameter.requires_grad)
    chunks = data.__create_chunk_list__()
    offsets = tuple(chunks[0].offsets) if chunks else (0,) * data.ndim
    block = Block(
        tuple(data.shape), offsets, tuple(local.shape), tuple(tuple(a) for a in dims), counts
    )
    local.block = block  # type: ignore[attr-defined]
    declare_spec(local, spec)
    return Weight(name, parameter, local, spec, block)


def part_at(data: DTensor, coordinate: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the part of `data` that a rank elsewhere in its mesh has.

    Args:
        data: this rank's part of a tensor.
        coordinate: of the other rank, per axis of the mesh.
    """
    sizes, offsets = _compute_local_shape_and_global_offset(
        data.shape, data.device_mesh.shape, list(coordinate), data.placements
    )
    return tuple(offsets), tuple(sizes)


def block_of(parameter: nn.Parameter) -> Block:
    """The block that `parameter`, a `Weight.local`, is; the whole of it where nobody said."""
    block = getattr(parameter, "block", None)
    return block if isinstance(block, Block) else Block.whole(parameter)
