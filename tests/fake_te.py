"""A Transformer Engine without a GPU: its names, signatures and habits, as far as we use them.

Signatures are those of release 2.20 (tests/gpu compares them where the real one is installed).
Habits that an adapter can get wrong are kept, and enforced: FP8 wants aligned sizes and runs a
module once in a region, scales follow at the end of a region, recomputation needs TE's own
checkpoint, which tells modules from functions, and every module has a pickle for extra state.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megaswitch.layers.fp8 import E4M3, E5M2, rounded, scale_of


@dataclass
class DelayedScaling:
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True


class Float8CurrentScaling:
    pass


class Float8BlockScaling:
    pass


class MXFP8BlockScaling:
    pass


@dataclass
class _State:
    recipe: Any = None
    group: Any = None
    regions: int = 0
    recomputing: bool = False
    modules: list[Any] = field(default_factory=list)  # of this region, in order


STATE = _State()


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Any = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    before = STATE.recipe, STATE.modules
    STATE.recipe, STATE.modules = (recipe if enabled else None), []
    STATE.group = amax_reduction_group
    STATE.regions += 1
    try:
        yield
    finally:
        learns = isinstance(STATE.recipe, DelayedScaling) and torch.is_grad_enabled()
        for module in STATE.modules if learns else ():
            module.fp8_meta["scaling_fwd"].update(STATE.recipe, E4M3)
        STATE.recipe, STATE.modules = before


class _Meta:
    """Scales and history of some tensors."""

    def __init__(self, length: int, tensors: int) -> None:
        self.amax_history = torch.zeros(length, tensors)
        self.scale = torch.ones(tensors)

    def update(self, recipe: DelayedScaling, kind: torch.dtype) -> None:
        largest = self.amax_history.amax(0)
        scale = scale_of(largest, kind, recipe.margin)
        self.scale.copy_(torch.where(scale > 0, scale, self.scale))
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0.0


class _Base(nn.Module):
    def __init__(self, gemms: int, params_dtype: torch.dtype | None, device: Any) -> None:
        super().__init__()
        self.num_gemms_ = gemms
        self.params_dtype, self.device = params_dtype, device
        self.fp8_meta: dict[str, Any] = {}
        self._old: Tensor | None = None

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        if STATE.recipe is None or self.fp8_meta:
            return
        length = getattr(STATE.recipe, "amax_history_len", 1)
        self.fp8_meta["scaling_fwd"] = _Meta(length, 3 * num_gemms)
        self.fp8_meta["scaling_bwd"] = _Meta(length, 2 * num_gemms)

    def get_extra_state(self) -> Tensor:
        content = pickle.dumps({k: m.scale for k, m in self.fp8_meta.items()})
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise RuntimeError("TE refuses to load a pickle")

    def prepare(self, inp: Tensor) -> None:
        self.recipe = STATE.recipe
        self.init_fp8_metadata(self.num_gemms_)
        if self.recipe is None or STATE.recomputing:
            return
        assert self not in STATE.modules, "a module may run once in a region"
        self.first = not STATE.modules
        STATE.modules.append(self)
        self._old = self.fp8_meta["scaling_fwd"].scale.clone()

    def quantize(self, key: str, place: int, x: Tensor) -> Tensor:
        if self.recipe is None or not x.numel():
            return x
        kind = E4M3 if key == "scaling_fwd" else E5M2
        if not isinstance(self.recipe, DelayedScaling):
            return rounded(x, scale_of(x.abs().amax().float()[None], kind), kind)
        meta = self.fp8_meta[key]
        if not STATE.recomputing:
            meta.amax_history[0, place] = max(meta.amax_history[0, place], x.abs().max().float())
        scale = meta.scale
        if STATE.recomputing and key == "scaling_fwd":
            assert self._old is not None
            scale = self._old
        return rounded(x, scale[place], kind)

    def multiply(self, inp: Tensor, weight: Tensor, gemm: int, last: bool) -> Tensor:
        assert inp.shape[-1] == weight.shape[-1]
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        else:
            dtype = inp.dtype
        with torch.autocast("cpu", enabled=False):
            return _GEMM.apply(inp.to(dtype), weight.to(dtype), self, gemm, last)


class _GEMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, module: _Base, gemm: int, last: bool) -> Tensor:
        x = module.quantize("scaling_fwd", 3 * gemm, x)
        w = module.quantize("scaling_fwd", 3 * gemm + 1, w)
        ctx.save_for_backward(x, w)
        ctx.module, ctx.gemm, ctx.last = module, gemm, last
        ctx.recipe = module.recipe
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        module = ctx.module
        grad = module.quantize("scaling_bwd", 2 * ctx.gemm, grad)
        if ctx.last and isinstance(ctx.recipe, DelayedScaling):
            module.fp8_meta["scaling_bwd"].update(ctx.recipe, E5M2)
        return grad @ w, grad.t() @ x, None, None, None


def _check(rows: int, features: int) -> None:
    if STATE.recipe is not None and (rows % 8 or features % 16):
        raise ValueError(f"FP8 execution requires aligned sizes, and these are {rows}, {features}")


class Linear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        **others: Any,
    ) -> None:
        super().__init__(1, params_dtype, device)
        assert not bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Tensor:
        _check(inp.shape[:-1].numel(), inp.shape[-1])
        _check(8, len(self.weight))
        self.prepare(inp)
        return self.multiply(inp, self.weight, 0, True)


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        **others: Any,
    ) -> None:
        super().__init__(num_gemms, params_dtype, device)
        assert not bias
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
            self.register_parameter(f"weight{index}", weight)

    def forward(
        self, inp: Tensor, m_splits: Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor:
        assert m_splits.device.type == "cpu"
        assert m_splits.dtype == torch.int64
        assert int(m_splits.sum()) == len(inp)
        if STATE.recipe is not None and (m_splits % 16).any():
            raise ValueError("FP8 execution requires splits that are multiples of 16")
        self.prepare(inp)
        parts = inp.split(m_splits.tolist())
        return torch.cat(
            [
                # The backward pass reaches the first GEMM last.
                self.multiply(part, getattr(self, f"weight{index}"), index, index == 0)
                for index, part in enumerate(parts)
            ]
        )


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    holds = not isinstance(function, nn.Module) or any(
        isinstance(m, _Base) for m in function.modules()
    )
    assert holds, "TE would not take this for a function with modules of its own"
    assert kwargs.pop("use_reentrant", True) is False
    recipe = STATE.recipe

    @contextmanager
    def again() -> Iterator[None]:
        before = STATE.recipe
        STATE.recomputing, STATE.recipe = True, recipe
        try:
            yield
        finally:
            STATE.recomputing, STATE.recipe = False, before

    return torch_checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs
    )


def _available(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


def _unavailable(return_reason: bool = False) -> Any:
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution."
    return (False, reason) if return_reason else False


def install(patch: pytest.MonkeyPatch) -> None:
    """Let `import transformer_engine` find this."""
    package = types.ModuleType("transformer_engine")
    pytorch = types.ModuleType("transformer_engine.pytorch")
    common = types.ModuleType("transformer_engine.common")
    recipe = types.ModuleType("transformer_engine.common.recipe")
    for thing in (Linear, GroupedLinear, autocast, checkpoint):
        setattr(pytorch, thing.__name__, thing)
    pytorch.is_fp8_available = pytorch.is_fp8_block_scaling_available = _available
    pytorch.is_mxfp8_available = _unavailable
    for thing in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling):
        setattr(recipe, thing.__name__, thing)
    package.pytorch, package.common, common.recipe = pytorch, common, recipe
    for module in (package, pytorch, common, recipe):
        patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(sys.modules[__name__], "STATE", _State())
