"""Activations that are made again in the backward pass instead of being kept.

`recompute` keeps a block's inputs alone. `recompute_cheap` also keeps what its matrix products
with weights give: what is made again is norms, attention's scores and softmax, activations, dropout
and the way of tokens to experts and back. Attention's two products without weights are made again,
as their factors and results grow with the square of the length.

Noise is counted, not drawn from a state, so there is none to stash.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megaswitch.layers.linear import grouped_product

# Products of rows with a weight, of one map and of a stack. `mm.out` cannot be among them: what is
# kept of an operation is its result, and who calls it so looks at the memory that it gave.
_KEPT: list[Any] = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    grouped_product._opoverload,
]


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_KEPT)
    return contexts


recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
recompute_cheap: Callable[..., Any] = partial(recompute, context_fn=_contexts)
