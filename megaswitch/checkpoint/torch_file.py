"""Old `.bin` files of Hugging Face: a zip of raw tensors beside a pickle that only names them.

The pickle is looked through before torch reads it, by torch's own restricted reader and with the
tensors mapped rather than loaded. Only what builds dense tensors of floats passes; torch's list
also has `bytearray`, for one, with which a file of a few bytes can ask for any amount of memory.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaswitch.checkpoint.streams import Source
from megaswitch.log import UserError
from megaswitch.storage import is_local

_MAX_PICKLE = 64 << 20
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch DoubleStorage",
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_bin(path: Path) -> dict[str, Source]:
    """The tensors of a file, mapped: memory holds what is being read.

    Raises:
        UserError: it is no such file, holds anything but tensors, or claims more than it has.
    """
    if not is_local(path):
        raise UserError(
            f"{path} can only be read from a local folder; copy it there, or save the model as "
            "safetensors"
        )
    _check_pickle(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes torch say
        raise _damaged(path, str(error).split("\n")[0][:200]) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no table of tensors")
    sources = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _damaged(path, f"{str(name)[:80]!r} is no tensor")
        # Strides can make a tensor of any size out of one number.
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise _damaged(path, f"{name} is no dense tensor")
        if tensor.dtype not in _FLOATS or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise _damaged(path, f"{name} is of type {tensor.dtype} and {tensor.nbytes} bytes")
        sources[name] = Source.of(name, tensor.detach())
    return sources


def _check_pickle(path: Path) -> None:
    """Refuse whatever a file of tensors has no need for; nothing of it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise _damaged(path, "its records are compressed, which torch's never are")
            pickles = [r for r in records if r.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
                raise _damaged(path, "it has no list of tensors, or one of absurd size")
            text = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read ({error}): it is damaged, or older than torch 1.6. In the "
            "latter case load it where it came from and save it as safetensors"
        ) from error
    try:
        for operation, argument, _ in pickletools.genops(text):
            called = operation.name in ("GLOBAL", "INST") and argument not in _ALLOWED
            if called or operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                what = argument or operation.name
                raise UserError(
                    f"{path} would call {what} when loaded, and files of tensors have no need for "
                    "that; it is malicious or no model. Get the model as safetensors"
                )
    except UserError:
        raise
    except Exception as error:  # pickletools says anything about damage
        raise _damaged(path, f"its list of tensors is no pickle ({error})") from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged or no file of tensors: {what}; copy it again, or get the model as "
        "safetensors"
    )
