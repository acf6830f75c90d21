"""The arrays of a T5X checkpoint by their keys: a msgpack file, and a folder for most arrays.

Leaves of the tree are arrays packed by flax (extension type 1: shape, type and bytes) or
TensorStore specifications, of which only the last part of the path is believed. Optimizer states
are passed over. Source: `t5x/checkpoints.py` and `flax/serialization.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megaswitch.checkpoint.zarr_array import ZarrArray
from megaswitch.log import UserError
from megaswitch.storage import member, read_small

_MAX_BYTES = 1 << 29  # arrays of any size have folders of their own
_MAX_DEPTH = 32
_NDARRAY = 1  # flax's extension type
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Array(Protocol):
    """What is read of an array, wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    def read(self, index: Sequence[slice]) -> Tensor:
        """The part that slices, one for each dimension, cut out."""


@dataclass(frozen=True)
class _Inline:
    """An array in the msgpack file itself."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, index: Sequence[slice]) -> Tensor:
        return self.tensor[tuple(index)]


def t5x_arrays(folder: Path) -> dict[str, Array]:
    """The model's arrays by keys such as "encoder/layers_0/mlp/wi/kernel".

    Args:
        folder: `checkpoint_N`, with the file `checkpoint`.

    Raises:
        UserError: it is no T5X checkpoint, or damaged.
    """
    path = member(folder, "checkpoint")
    if not path.is_file():
        raise UserError(
            f"{folder} has no file named checkpoint; give the folder checkpoint_N of a T5X run. "
            "Checkpoints of Orbax have another layout: restore them in T5X and save them with "
            "its own checkpointer"
        )
    content = _unpacked(path)
    state = content.get("optimizer", content) if isinstance(content, dict) else None
    tree = state.get("target") if isinstance(state, dict) else None
    if not isinstance(tree, dict):
        raise _damaged(path, "it has no tree optimizer/target of a model's arrays")
    arrays = {key: _array(folder, path, key, leaf) for key, leaf in _leaves(path, tree)}
    if not arrays:
        raise _damaged(path, "its tree of arrays is empty")
    return arrays


def _unpacked(path: Path) -> Any:
    try:
        import msgpack
    except ImportError:
        raise UserError('T5X checkpoints need msgpack: pip install "megaswitch[t5x]"') from None
    text = read_small(path, _MAX_BYTES)
    try:
        return msgpack.unpackb(text, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack raises anything from ValueError to StackError
        raise _damaged(path, f"it is no msgpack ({error!r:.200})") from error


def _leaves(path: Path, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if prefix.count("/") > _MAX_DEPTH:
        raise _damaged(path, "its tree is absurdly deep")
    for name, value in tree.items():
        is_leaf = not isinstance(value, dict) or "kvstore" in value or _CHUNKED in value
        if is_leaf:
            yield f"{prefix}{name}", value
        else:
            yield from _leaves(path, value, f"{prefix}{name}/")


def _array(folder: Path, path: Path, key: str, leaf: Any) -> Array:
    if isinstance(leaf, dict) and "kvstore" in leaf:
        store = leaf["kvstore"]
        place = store.get("path") if isinstance(store, dict) else None
        if leaf.get("driver") != "zarr" or not isinstance(place, str):
            raise _damaged(path, f"{key} is stored by {str(leaf.get('driver'))[:40]}, not zarr")
        # Whoever wrote it had the folder elsewhere.
        return ZarrArray(member(folder, place.rstrip("/").rpartition("/")[2]))
    if isinstance(leaf, dict):
        raise _damaged(path, f"{key} is an array of more than {_MAX_BYTES} bytes within the file")
    if getattr(leaf, "code", None) != _NDARRAY:
        raise _damaged(path, f"{key} is no array of numbers")
    return _Inline(_ndarray(path, key, leaf.data))


def _ndarray(path: Path, key: str, data: bytes) -> Tensor:
    import msgpack

    try:
        shape, dtype, values = msgpack.unpackb(data, raw=False)
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
        sound = all(type(n) is int and n >= 0 for n in shape) and isinstance(values, bytes)
        if not sound or len(values) != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"{list(shape)} of {dtype} in {len(values)} bytes")
    except Exception as error:  # msgpack raises anything
        raise _damaged(path, f"{key} is no array of floats ({error!r:.200})") from error
    if not values:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(bytearray(values), dtype=_DTYPES[dtype]).view(tuple(shape))


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged or no checkpoint of T5X: {what}; copy it again")
