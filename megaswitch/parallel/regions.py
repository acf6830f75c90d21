"""Names for the parts of a training step, for a profiler to see. Without one they cost a test.

The innermost name counts. What the backward pass does belongs to the part whose forward pass it
undoes, which a profiler knows by autograd's numbers; see `megaswitch.train.profile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

PREFIX = "megaswitch: "

P = ParamSpec("P")
R = TypeVar("R")

# Of the process: autograd works in threads of its own.
_watched = False


@contextmanager
def watched() -> Iterator[None]:
    """Inside, parts tell their names."""
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before


def region(name: str) -> AbstractContextManager[object]:
    """A context whose content is the part `name`."""
    return record_function(PREFIX + name) if _watched else nullcontext()


def named(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that is the part `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _watched:
                return function(*args, **kwargs)
            with record_function(PREFIX + name):
                return function(*args, **kwargs)

        return call

    return decorate
