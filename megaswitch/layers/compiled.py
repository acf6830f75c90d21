"""Regions that `train.compile` makes one kernel each: functions of tensors between the products.

They know no module, no layout and no rank, so nothing of these can break a graph or compile it
anew. Row counts are symbols. Products, exchanges and the way of tokens to experts stay outside:
torch's kernels for them are as good, and what a host reads or sends would cut the graph.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

from megaswitch.layers import triton_kernels

P = ParamSpec("P")
R = TypeVar("R")

BACKEND = "inductor"
# Of the process: which kernels run is no matter of one model.
_on = False


def compile_regions(on: bool) -> None:
    """From now on, let regions be compiled when they are first called; or call them as they are."""
    global _on
    _on = on


def regions_are_compiled() -> bool:
    """Whether they are."""
    return _on


def region_to_compile(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of tensors that may be compiled."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _on:
            return function(*args, **kwargs)
        return cast("R", _compiled(function, BACKEND)(*args, **kwargs))

    return call


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, backend=backend)


def missing_compiler(device: str) -> str | None:
    """What torch lacks to compile on a device ("cpu", "cuda" or "auto"), or None."""
    if device != "cpu" and torch.cuda.is_available():
        return triton_kernels.missing()
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}; install one, or name it in CXX"
    return None
