"""Too little memory, said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megaswitch.log import UserError


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or the CPU, into an error that ends with `remedy`.

    Raises:
        UserError: there was not enough memory inside.
    """
    try:
        yield
    except RuntimeError as error:
        # A GPU has a class for it, the CPU's allocator only words.
        if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
            raise
        raise UserError(f"there is not enough memory: {remedy}") from error
