"""Activations that are made again in the backward pass instead of being kept.

`recompute` keeps a block's inputs alone. `recompute_cheap` also keeps what its matrix products
with weights give: what is made again is norms, attention's scores and softmax, activations, dropout
and the way of tokens to experts and back. Attention's two products without weights are made again,
as their factors and results grow with the square of the length.

Noise is counted, not drawn from a state, so there is none to stash.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megaswitch.layers.linear import grouped_product

# Products of rows with a weight, of one map and of a stack. `mm.out` cannot be among them: what is
# kept of an operation is its result, and who calls it so looks at the memory that it gave.
_KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._grouped_mm.default,
        grouped_product._opoverload,
    }
)
Results = defaultdict[Any, deque[Tensor]]


class _Products(TorchDispatchMode):
    """Keeps the results of products in the forward pass, or gives them in the same order again.

    torch's own selective checkpointing wants all operations to be the same both times. Those by
    which FSDP gathers weights are not: it does so ahead, or not at all where it still has them.

    Args:
        results: by operation.
        again: whether this is the second time.
    """

    def __init__(self, results: Results, *, again: bool) -> None:
        super().__init__()
        self.results, self.again = results, again

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let what `train.compile` made run inside."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _KEPT:
            return func(*args, **(kwargs or {}))
        if self.again:
            return self.results[func].popleft()
        result = func(*args, **(kwargs or {}))
        # Not the very tensor, which autograd lets refer to all that it was made of.
        self.results[func].append(result.detach())
        return result


def _contexts() -> tuple[_Products, _Products]:
    results: Results = defaultdict(deque)
    return _Products(results, again=False), _Products(results, again=True)


recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
recompute_cheap: Callable[..., Any] = partial(recompute, context_fn=_contexts)
