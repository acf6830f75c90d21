"""NVIDIA's Transformer Engine (TE): FP8 on tensor cores. The only module that imports it.

TE's modules are made on the meta device and kept apart from the model's: a kernel lends them its
weight, as it lies on this rank, for each call. So parameters keep their names, slices and wrappers,
all communication stays ours, and TE's pickled `_extra_state` is in no state dict; what delayed
scaling remembers travels as plain tensors.

TE's grouped GEMM serves FP8 alone: without it, it is a loop of GEMMs that reads its sizes on the
host, where torch has one kernel. TE's norm and fused attention are not used: they round the
residual stream and the relative bias to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaswitch.config import FP8Config
from megaswitch.layers.fp8 import E4M3, E5M2, Factor, scale_of
from megaswitch.layers.kernels import LinearMap, Product, Rows
from megaswitch.layers.parameter import local
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh

_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.20'"
# FP8 GEMMs want rows and features in multiples of this; MXFP8's blocks are twice as long.
_ALIGN, _ALIGN_MXFP8 = 16, 32
# TE's tensors of one GEMM: (input, weight, output) forward, (output's gradient, input's) backward.
_FORWARD, _BACKWARD = 3, 2


def load() -> Any:
    """The package. Its import fails in many ways, few of which are an ImportError.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import transformer_engine.pytorch as te
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"Transformer Engine cannot be imported ({type(error).__name__}: {lines[-1]}); "
            f"install it for torch's CUDA {torch.version.cuda}: {_INSTALL}"
        ) from error
    return te


def missing(fp8: FP8Config, device: str) -> str | None:
    """Why TE cannot run here, or None. It is never imported where there is no CUDA device."""
    if device == "cpu":
        return "it needs a CUDA device and train.device='cpu'; use 'cuda', or backend='torch'"
    if not torch.cuda.is_available():
        build = "no CUDA in it" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        return (
            f"it needs a CUDA device and this machine offers none (torch {torch.__version__} has "
            f"{build}); use backend='torch', which emulates FP8 on any device"
        )
    try:
        te = load()
    except UserError as error:
        return str(error)
    tests = {
        "delayed": te.is_fp8_available,
        "current": te.is_fp8_available,
        "block": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    if fp8.recipe == "none":
        return None
    available, reason = tests[fp8.recipe](return_reason=True)
    if available:
        return None
    major, minor = torch.cuda.get_device_capability()
    return (
        f"train.fp8.recipe={fp8.recipe!r} is not for this chip ({torch.cuda.get_device_name()}, "
        f"compute capability {major}.{minor}, CUDA {torch.version.cuda}): {reason.strip()}. FP8 "
        "needs 8.9, block scaling 9.0 with CUDA 12.9, MXFP8 10.0; use another recipe, or 'none'"
    )


class TEBackend:
    """TE's products for dense maps and, in FP8, for experts.

    Args:
        fp8: the recipe.
        mesh: the ranks. Under delayed scaling TE takes the largest magnitudes over all that have
            the same layers, of each micro-batch; experts in the same place of several ranks share.

    Raises:
        UserError: TE is not installed.
    """

    def __init__(self, fp8: FP8Config, mesh: Mesh) -> None:
        self.te, self.fp8, self.mesh = load(), fp8, mesh
        self.recipe = _recipe(fp8)
        self.group = mesh.stage_group() if fp8.recipe == "delayed" else None
        self.kernels: dict[str, _Engines] = {}
        self._history: dict[str, Tensor] = {}

    def attach(self, maps: Mapping[str, LinearMap]) -> None:
        """See `Backend`.

        Raises:
            UserError: a matrix does not suit FP8.
        """
        for name, module in maps.items():
            weight = module.weight
            stacked = weight.ndim == 3
            if self.recipe is not None:
                _check_alignment(name, local(weight), self.fp8)
            elif stacked:
                continue
            prepare = partial(self._prepare, name)
            kind = _Grouped if stacked else _Dense
            kernel = kind(self.te, local(weight), self.fp8, prepare)
            module.kernel = self.kernels[name] = kernel
            if self.fp8.recipe == "delayed":
                experts = len(local(weight)) if stacked else 1
                shape = (experts, len(Factor), self.fp8.amax_history)
                self._history[name] = torch.zeros(shape, device=self.mesh.device)

    @property
    def recompute(self) -> Callable[..., Any]:
        """TE's own, which keeps scales for the second time."""

        def again(function: Callable[..., Any], *arguments: Any) -> Any:
            # Of a module TE asks whether it holds TE's, and ours lie elsewhere; of a function not.
            call = partial(_call, function)
            return self.te.checkpoint(call, *arguments, use_reentrant=False)

        return again

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """See `Backend`. TE updates scales when a pass ends."""
        if self.recipe is None:
            yield
            return
        with self.te.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=self.group):
            yield

    def finish_step(self, *, keep: bool = True) -> None:
        """See `Backend`. TE has done it, and keeps scales where a magnitude is not finite."""

    def history(self) -> dict[str, Tensor]:
        """See `Backend`; of what has run."""
        for name, tensor in self._history.items():
            for first, engine in self.kernels[name].engines.items():
                forward, backward = (
                    engine.fp8_meta[key].amax_history for key in ("scaling_fwd", "scaling_bwd")
                )
                part = tensor[first : first + forward.shape[1] // _FORWARD]
                part[:, Factor.INPUT] = forward[:, 0::_FORWARD].t()
                part[:, Factor.WEIGHT] = forward[:, 1::_FORWARD].t()
                part[:, Factor.GRADIENT] = backward[:, 0::_BACKWARD].t()
        return self._history

    def _prepare(self, name: str, engine: Any, first: int, experts: int) -> None:
        """Give one of TE's modules, before its first use, what a checkpoint has filled in."""
        history = self._history.get(name)
        if history is not None and (part := history[first : first + experts]).any():
            engine.init_fp8_metadata(num_gemms=experts)
            _fill(engine.fp8_meta, part, self.fp8.margin)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _fill(meta: Mapping[str, Any], history: Tensor, margin: int) -> None:
    """Write [n, 3, H] into TE's tables [H, tensors of n GEMMs], with the scales that follow."""
    for key, step, places in (
        ("scaling_fwd", _FORWARD, {Factor.INPUT: 0, Factor.WEIGHT: 1}),
        ("scaling_bwd", _BACKWARD, {Factor.GRADIENT: 0}),
    ):
        for factor, place in places.items():
            kind = E5M2 if factor == Factor.GRADIENT else E4M3
            scales = scale_of(history[:, factor].amax(1), kind, margin)
            meta[key].amax_history[:, place::step].copy_(history[:, factor].t())
            meta[key].scale[place::step].copy_(torch.where(scales > 0, scales, 1.0))


def _recipe(fp8: FP8Config) -> Any:
    if fp8.recipe == "none":
        return None
    from transformer_engine.common import recipe

    if fp8.recipe == "delayed":
        return recipe.DelayedScaling(margin=fp8.margin, amax_history_len=fp8.amax_history)
    return {
        "current": recipe.Float8CurrentScaling,
        "block": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }[fp8.recipe]()


def _alignment(fp8: FP8Config) -> int:
    return _ALIGN_MXFP8 if fp8.recipe == "mxfp8" else _ALIGN


def _check_alignment(name: str, weight: Tensor, fp8: FP8Config) -> None:
    multiple = _alignment(fp8)
    rows, columns = weight.shape[-2:]
    if rows % multiple or columns % multiple:
        raise UserError(
            f"{name} is {rows} × {columns} on a rank, and FP8 needs multiples of {multiple}; use a "
            f"smaller parallel.tp, other sizes, or train.fp8.keep=['{name}']"
        )


class _Engines:
    """TE's modules of one linear map.

    Args:
        te: the package.
        weight: of the map, on this rank: [out, in] or [E, out, in].
        fp8: the recipe.
        prepare: is called with each module when it is made, its first expert and how many it has.

    Attributes:
        engines: the modules by their first expert.
    """

    def __init__(
        self, te: Any, weight: Tensor, fp8: FP8Config, prepare: Callable[[Any, int, int], None]
    ) -> None:
        self.te, self.prepare = te, prepare
        self.shape, self.dtype = weight.shape[-2:], weight.dtype
        self.multiple = 1 if fp8.recipe == "none" else _alignment(fp8)
        self.engines: dict[int, Any] = {}

    def engine(self, names: Sequence[str], first: int, kind: Any, *sizes: int) -> Any:
        """The module for the experts from `first` on, without weights."""
        if first not in self.engines:
            outputs, inputs = self.shape
            made = kind(*sizes, inputs, outputs, bias=False, params_dtype=self.dtype, device="meta")
            for name in names:
                delattr(made, name)
            self.prepare(made, first, len(names))
            self.engines[first] = made
        return self.engines[first]


@contextmanager
def _lent(engine: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module has these weights; it must not keep what FSDP gathered for a while."""
    for name, weight in weights.items():
        setattr(engine, name, weight)
    try:
        yield
    finally:
        for name in weights:
            delattr(engine, name)


class _Dense(_Engines):
    """A `Kernel` of a dense map."""

    def __call__(
        self, x: Tensor, weight: Tensor, product: Product, rows: Rows | None = None
    ) -> Tensor:
        """See `Kernel`."""
        engine = self.engine(("weight",), 0, self.te.Linear)
        flat = x.flatten(0, -2)
        missing = -len(flat) % self.multiple
        with _lent(engine, {"weight": weight}):
            y = engine(F.pad(flat, (0, 0, 0, missing)) if missing else flat)
        return y[: len(flat)].view(*x.shape[:-1], -1)


class _Grouped(_Engines):
    """A `Kernel` of a stack of experts."""

    def __call__(
        self, x: Tensor, weight: Tensor, product: Product, rows: Rows | None = None
    ) -> Tensor:
        """See `Kernel`."""
        assert rows is not None
        weights = {f"weight{index}": matrix for index, matrix in enumerate(weight.unbind(0))}
        engine = self.engine(tuple(weights), rows.first, self.te.GroupedLinear, len(weights))
        place, splits = padded_places(rows, len(x), self.multiple)
        padded = x.new_zeros(sum(splits) + 1, x.shape[1]).index_copy(0, place, x)
        with _lent(engine, weights):
            y = engine(padded[:-1], torch.tensor(splits))
        return F.pad(y, (0, 0, 0, 1)).index_select(0, place)


def padded_places(rows: Rows, number: int, multiple: int) -> tuple[Tensor, list[int]]:
    """Where rows go if each expert is to have a multiple of rows.

    Args:
        rows: which experts have which rows.
        number: of rows; those behind the last expert's all go to one place more.
        multiple: of each expert's rows.

    Returns:
        [number] places, and the rows of each expert; these are read by the host, as TE wants them.
    """
    ends = rows.ends.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    sizes = (counts + multiple - 1) // multiple * multiple
    shift = sizes.cumsum(0) - sizes - (ends - counts)
    expert = rows.expert(number)
    splits = sizes.tolist()
    place = torch.arange(number, device=ends.device) + F.pad(shift, (0, 1))[expert]
    return torch.where(expert < len(counts), place, sum(splits)), splits
