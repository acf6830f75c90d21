"""Counter-based randomness: what is perturbed decides the draw, not when or where it happens.

The draw for an element is a hash of (seed, step, site, global sample, element). It is the same
under every layout, micro-batch size and recomputation, and a resumed run needs no generator state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaswitch import native
from megaswitch.layers.compiled import region_to_compile, regions_are_compiled
from megaswitch.layers.kernels import kernels_of
from megaswitch.layers.parameter import stable_hash
from megaswitch.parallel.tensor_parallel import ALONE, TensorParallel

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15: Weyl increment of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


_ALL = slice(None)


def _mix(x: Tensor, scratch: Tensor) -> Tensor:
    """SplitMix64 on int64 (two's complement wraps as uint64 does) but for its last xor-shift.

    That one leaves the upper 31 bits as they are. In place; `scratch` is like `x`, and overwritten.
    """
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        torch.bitwise_right_shift(x, shift, out=scratch).bitwise_and_((1 << (64 - shift)) - 1)
        x.bitwise_xor_(scratch).mul_(factor)
    return x


@dataclass(frozen=True)
class Noise:
    """The source of one training step's randomness.

    Attributes:
        seed: of the run.
        step: optimizer step; micro-batches of a step differ by their samples.
        samples: [B] int64, the global index of each row's sample.
    """

    seed: int
    step: int
    samples: Tensor

    @classmethod
    def from_torch(cls, rows: int, device: torch.device) -> Noise:
        """Noise seeded by torch's global generator, for models trained outside our trainer."""
        seed = int(torch.randint(0, 2**62, ()).item())
        return cls(seed, 0, torch.arange(rows, device=device))

    def uniform(self, site: str, shape: tuple[int, ...], part: slice = _ALL) -> Tensor:
        """Uniform draws in [0, 1), fp32.

        Args:
            site: the name of the module that asks; each name has its own stream.
            shape: [B, …], one row for each sample.
            part: of the draws of each row, flattened, only these; then the result is [B, n].
        """
        width = math.prod(shape[1:])
        columns = range(width)[part]
        draws = draw(self._keys(site), columns)
        return draws.view(shape) if len(columns) == width else draws

    def token_keys(self, site: str, length: int, width: int) -> Tensor:
        """[B·length] int64, from which `draw` makes each token's row of draws [B, length, width].

        A token's key may travel to where the token is worked on.
        """
        tokens = torch.arange(length, device=self.samples.device).mul_(width).mul_(_GOLDEN)
        return (self._keys(site)[:, None] + tokens).flatten()

    def for_tokens(
        self, site: str, tokens: slice, length: int, columns: range, width: int
    ) -> Tensor:
        """Some rows and columns of the draws [B·length, width].

        Args:
            site: the name of the module that asks.
            tokens: rows, counted through samples and positions.
            length: tokens of a sample.
            columns: of all `width`.
            width: draws of a token.
        """
        return draw(self.token_keys(site, length, width)[tokens], columns)

    def _keys(self, site: str) -> Tensor:
        base = stable_hash(self.seed, self.step, site)
        keys = self.samples * _GOLDEN + base
        keys = _mix(keys, torch.empty_like(keys))
        return keys.bitwise_xor_((keys >> 31).bitwise_and_((1 << 33) - 1))


def ahead(keys: Tensor, elements: Tensor) -> Tensor:
    """Keys whose draws begin so many elements further on, both [N] int64."""
    return keys + elements * _GOLDEN


def draw(keys: Tensor, columns: range) -> Tensor:
    """Uniform draws in [0, 1), fp32: [N, len(columns)] for keys [N] int64."""
    if regions_are_compiled():
        return _draw_at_once(keys, columns.start, columns.stop)
    if kernels_of(keys) == "cpu":
        draws: Tensor = torch.ops.megaswitch.draw(keys, columns.start, len(columns))
        return draws
    elements = torch.arange(columns.start + 1, columns.stop + 1, device=keys.device)
    counters = keys[:, None] + elements.mul_(_GOLDEN)
    bits = _mix(counters, torch.empty_like(counters)) >> 40
    return bits.bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)


_LIBRARY = torch.library.Library("megaswitch", "FRAGMENT")
_LIBRARY.define("draw(Tensor keys, int first, int number) -> Tensor")


@torch.library.impl(_LIBRARY, "draw", "CPU")
def _draw_in_the_core(keys: Tensor, first: int, number: int) -> Tensor:
    draws = torch.empty(len(keys), number, dtype=torch.float32)
    threads = torch.get_num_threads()
    native.draw(keys.contiguous().numpy(), first, draws.numpy(), threads=threads)
    return draws


@torch.library.register_fake("megaswitch::draw", lib=_LIBRARY)
def _(keys: Tensor, first: int, number: int) -> Tensor:
    return keys.new_empty(len(keys), number, dtype=torch.float32)


@region_to_compile
def _draw_at_once(keys: Tensor, start: int, stop: int) -> Tensor:
    """`draw` as one expression, which needs no memory of its own where it is compiled."""
    elements = torch.arange(start + 1, stop + 1, device=keys.device) * _GOLDEN
    bits = keys[:, None] + elements
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


def dropout(
    x: Tensor,
    rate: float,
    site: str,
    noise: Noise | None,
    *,
    tp: TensorParallel = ALONE,
    length: int = 0,
) -> Tensor:
    """Zero elements of `x` with probability `rate`, and scale the rest up.

    Args:
        x: [B, …], or this rank's tokens [B·length/tp, d] of activations [B, length, d].
        rate: 0 returns `x` itself.
        site: the name of the module that asks.
        noise: None (no training) returns `x` itself.
        tp: who has the other tokens.
        length: tokens of a sample, where x is of some tokens only.
    """
    if noise is None or rate == 0.0:
        return x
    if length and x.ndim == 2:
        tokens = tp.tokens(x, len(noise.samples) * length)
        width = x.shape[1]
        draws = noise.for_tokens(site, tokens, length, range(width), width)
    else:
        draws = noise.uniform(site, tuple(x.shape))
    return drop(x, draws, rate)


@region_to_compile
def drop(x: Tensor, draws: Tensor, rate: float) -> Tensor:
    """`x` where the draws are at least `rate`, scaled up; else 0."""
    return x * (draws >= rate).to(x.dtype).mul_(1.0 / (1.0 - rate)).view(x.shape)
