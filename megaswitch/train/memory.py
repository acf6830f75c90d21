"""Too little memory, said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megaswitch.log import UserError


@contextmanager
def enough_memory(remedy: str, *, alone: bool = True) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or the CPU, into an error that ends with `remedy`.

    Args:
        remedy: what the user can do.
        alone: False if other ranks exchange tensors with this one inside. They wait there for a
            rank that has failed and cannot be told, so that the watchdog must end the job.

    Raises:
        UserError: there was not enough memory inside.
        MemoryError: likewise, but not `alone`.
    """
    try:
        yield
    except RuntimeError as error:
        # A GPU has a class for it, the CPU's allocator only words.
        if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
            raise
        kind = UserError if alone else MemoryError
        raise kind(f"there is not enough memory: {remedy}") from error
