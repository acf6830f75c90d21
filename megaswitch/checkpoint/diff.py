"""How two checkpoints differ, tensor by tensor, read in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaswitch.checkpoint.safetensors_file import DTYPES, ITEM_BYTES
from megaswitch.checkpoint.tensor_files import StoredTensor, windows
from megaswitch.checkpoint.windows import Buffer, Reader, window_region
from megaswitch.log import UserError

_WINDOW_BYTES = 4 << 20

Kind = Literal["equal", "values", "dtype", "shape", "missing", "extra"]


@dataclass
class TensorDiff:
    """What distinguishes a tensor of one checkpoint from that of another.

    Attributes:
        name: of the tensor.
        kind: "missing" in the other checkpoint, "extra" in it, of another "shape" or "dtype"
            there, of other "values", or bit for bit "equal".
        shapes: here and there; None where it is missing.
        dtypes: likewise.
        count: elements compared.
        equal: elements that are equal, bit for bit if the types are the same.
        max_abs: greatest difference of two finite numbers.
        max_relative: greatest ratio of such a difference to the larger of the two numbers.
        not_finite: pairs that are not equal and not both finite.
    """

    name: str
    kind: Kind
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    count: int = 0
    equal: int = 0
    max_abs: float = 0.0
    max_relative: float = 0.0
    not_finite: int = 0

    def add(self, here: Tensor, there: Tensor) -> None:
        """Compare two pieces."""
        same = self.dtypes[0] == self.dtypes[1]
        a, b = here.double(), there.double()
        alike = _bits(here) == _bits(there) if same else a == b
        self.count += here.numel()
        self.equal += int(alike.sum())
        if bool(alike.all()):
            return
        a, b = a[~alike], b[~alike]
        finite = a.isfinite() & b.isfinite()
        self.not_finite += int((~finite).sum())
        a, b = a[finite], b[finite]
        if a.numel():
            difference = (a - b).abs()
            larger = torch.maximum(a.abs(), b.abs()).clamp_min(torch.finfo(torch.float64).tiny)
            self.max_abs = max(self.max_abs, difference.max().item())
            self.max_relative = max(self.max_relative, (difference / larger).max().item())


def compare(
    here: Mapping[str, StoredTensor], there: Mapping[str, StoredTensor]
) -> Iterator[TensorDiff]:
    """Compare all tensors of two checkpoints, in the order of their names.

    Raises:
        UserError: a tensor has a type that no checkpoint of ours has.
    """
    reader, buffers = Reader(_WINDOW_BYTES), (Buffer(2 * _WINDOW_BYTES), Buffer(2 * _WINDOW_BYTES))
    try:
        for name in sorted(here.keys() | there.keys()):
            yield _compare(name, here.get(name), there.get(name), reader, buffers)
    finally:
        reader.close()


def _compare(
    name: str,
    here: StoredTensor | None,
    there: StoredTensor | None,
    reader: Reader,
    buffers: tuple[Buffer, Buffer],
) -> TensorDiff:
    shapes = here.shape if here else None, there.shape if there else None
    dtypes = here.dtype if here else None, there.dtype if there else None
    if here is None or there is None:
        return TensorDiff(name, "extra" if here is None else "missing", shapes, dtypes)
    if here.shape != there.shape:
        return TensorDiff(name, "shape", shapes, dtypes)
    for dtype in (here.dtype, there.dtype):
        if dtype not in DTYPES:
            raise UserError(
                f"{name} is of type {dtype}, which cannot be compared; leave --diff out"
            )
    diff = TensorDiff(name, "equal" if here.dtype == there.dtype else "dtype", shapes, dtypes)
    item = max(ITEM_BYTES[here.dtype], ITEM_BYTES[there.dtype])
    for index in windows(here.shape, item, _WINDOW_BYTES):
        offsets, sizes = window_region(index, here.shape)
        pieces = []
        for tensor, buffer in zip((here, there), buffers, strict=True):
            bits = buffer.array(sizes, ITEM_BYTES[tensor.dtype])
            reader.fill(bits, tensor, offsets)
            pieces.append(torch.from_numpy(bits).view(DTYPES[tensor.dtype]))
        diff.add(*pieces)
    if diff.kind == "equal" and diff.equal < diff.count:
        diff.kind = "values"
    return diff


def _bits(values: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(kinds[values.element_size()])
