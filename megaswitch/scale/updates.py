"""What the optimizer does to a parameter, by rehearsal of one of each shape."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megaswitch.config import RunConfig
from megaswitch.layers.kernels import rehearse
from megaswitch.optim import piles
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.absent import absent_peers
from megaswitch.parallel.mesh import Axis, Mesh
from megaswitch.parallel.shard import declare_spec
from megaswitch.parallel.weights import Block
from megaswitch.scale.recorder import Recorder, Work
from megaswitch.scale.sizes import Sized, parameters


@dataclass(frozen=True)
class Way:
    """How a parameter is updated.

    Attributes:
        divided: ranks hold parts of it.
        piled: with others of its shape, see `optim.piles`.
        joint: its experts share statistics.
        native: by the compiled core of a CPU, see `optim.native_adafactor`.
    """

    divided: bool
    piled: bool
    joint: bool = False
    native: bool = False


# Of the optimizer and the gradient norm: bytes moved by number, operations by piece. A piece is a
# parameter, a pile, or the experts that are updated together; to AdamW all parameters are one.
Updates = dict[Way, Work]

_RANKS = 2


def update_work(config: RunConfig, device: str) -> Updates:
    """Rehearse updates of one parameter of each shape, and of one expert of each stack.

    Args:
        config: of the run.
        device: whose kernels: "cpu" or "cuda".
    """
    shapes = {_like(p): p for p in parameters(config.model)}.values()
    recorder = Recorder({tuple(range(_RANKS)): "dp"})
    item = mock.patch.object(FakeTensor, "item", create=True, return_value=1.0)
    found: Updates = {}
    with absent_peers(_RANKS, 0), rehearse(device), FakeTensorMode(), recorder, item:
        group = dist.group.WORLD
        axis = Axis("dp", 0, _RANKS, group)
        mesh = Mesh(0, _RANKS, torch.device("cpu"), group)
        for divided in (False, True):
            cut = axis if divided else None
            own = [p for p in shapes if len(p.shape) > 1] if divided else shapes
            if config.optim.name != "adafactor":
                made = [_parameter(p, cut) for p in own]
                found[Way(divided, piled=False)] = _work(made, 1, config, recorder, mesh)
                continue
            ways = (Way(divided, False), Way(divided, True), Way(divided, False, joint=True))
            for way in (*ways, Way(divided, False, native=True)):
                number = 2 if way.piled else 1
                some = [p for p in own if _suits(way, p, config, device)]
                made = [_parameter(p, cut) for p in some for _ in range(number)]
                with mock.patch.object(piles, "at_most", return_value=number):
                    if some:
                        work = _work(made, len(some), config, recorder, mesh, native=way.native)
                found[way] = work
    return found


def _suits(way: Way, p: Sized, config: RunConfig, device: str) -> bool:
    native = not way.divided and is_native(p, config, device)
    return is_joint(p, config) == way.joint and native == way.native


def is_joint(p: Sized, config: RunConfig) -> bool:
    """Whether it is experts of which Adafactor takes statistics together."""
    return p.spec.is_expert and config.optim.expert_statistics == "joint"


def is_factored(p: Sized, config: RunConfig) -> bool:
    """Whether Adafactor keeps moments of its rows and columns only."""
    matrix = p.shape[1:] if p.spec.is_expert else p.shape
    return len(matrix) == 2 and min(matrix) >= config.optim.factored_min_dim


def is_native(p: Sized, config: RunConfig, device: str) -> bool:
    """Whether the compiled core updates it, where ranks do not divide it."""
    return device == "cpu" and is_factored(p, config) and not is_joint(p, config)


def _like(p: Sized) -> tuple[tuple[int, ...], bool, bool]:
    """Parameters of which this is the same are updated alike."""
    return _one(p), p.spec.is_expert, p.spec.is_bias


def _one(p: Sized) -> tuple[int, ...]:
    """An update does with all experts what it does with one."""
    return (1, *p.shape[1:]) if p.spec.is_expert else p.shape


def _parameter(p: Sized, axis: Axis | None) -> nn.Parameter:
    """With a gradient, and cut over the axis as ZeRO cuts matrices."""
    made = declare_spec(nn.Parameter(torch.empty(_one(p))), p.spec)
    made.grad = torch.empty_like(made)
    if axis:
        whole, cut = Block.whole(made), 1 if p.spec.is_expert else 0
        shape = tuple(s * axis.size if d == cut else s for d, s in enumerate(whole.shape))
        axes = tuple((axis,) if d == cut else () for d in range(len(shape)))
        made.block = Block(shape, whole.offsets, whole.sizes, axes)  # type: ignore[attr-defined]
    return made


def _work(
    made: list[nn.Parameter],
    pieces: float,
    config: RunConfig,
    recorder: Recorder,
    mesh: Mesh,
    *,
    native: bool = False,
) -> Work:
    """Of a step, the second, so that the optimizer's states are there."""
    optimizer = build_optimizer(made, config.optim)
    work = Work()
    for _ in range(2):
        before = recorder.work
        clip_gradients(made, config.optim.clip_grad_norm, mesh)
        clipped = recorder.work
        optimizer.step()
        work = recorder.work - before
    numbers = sum(p.numel() for p in made)
    operations = work.operations
    if native:  # pieces of so few operations that those of the norm, taken once of all, would show
        operations -= (clipped - before).operations
    return Work(moved=work.moved / numbers, operations=operations / pieces)
