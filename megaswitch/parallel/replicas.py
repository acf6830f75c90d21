"""Whether ranks that hold the same weights hold the same bits.

A bit that memory or a chip flipped makes replicas drift apart without a word. Each rank sums the
bits of what it shares with others; equal sums cost one small message, and only where they differ
are single parameters compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.places import rank_list
from megaswitch.parallel.weights import Weight

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements summed at a time, in int64
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as a signed number


@dataclass(frozen=True)
class Difference:
    """A parameter whose replicas differ.

    Attributes:
        parameter: its name.
        odd: ranks whose bits are not those of most; empty if no value has a majority.
        ranks: all that hold it.
    """

    parameter: str
    odd: tuple[int, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        if not self.odd:
            return f"{rank_list(self.ranks)} hold different bits of {self.parameter}"
        others = [rank for rank in self.ranks if rank not in self.odd]
        verb = "holds" if len(self.odd) == 1 else "hold"
        return (
            f"{rank_list(self.odd)} {verb} other bits of {self.parameter} than {rank_list(others)}"
        )


class Replicas:
    """Compares weights; all ranks build it and call it together.

    Args:
        weights: of this rank.
        mesh: the ranks.
    """

    def __init__(self, weights: Mapping[str, Weight], mesh: Mesh) -> None:
        self.mesh = mesh
        mine = [_key(w) for w in weights.values() if w.local.numel()]
        holders: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for rank, keys in enumerate(mesh.gather(mine)):
            for key in keys:
                holders[key].append(rank)
        self.shared: dict[tuple[int, ...], list[Weight]] = defaultdict(list)
        for w in weights.values():
            if len(ranks := holders.get(_key(w), ())) > 1:
                self.shared[tuple(ranks)].append(w)

    def differences(self) -> list[Difference]:
        """Parameters whose replicas differ, on all ranks alike; [] if none does."""
        mine = {ranks: _total(bit_sum(w.local) for w in ws) for ranks, ws in self.shared.items()}
        sums = self.mesh.gather(mine)
        apart = {
            ranks for held in sums for ranks in held if len({sums[r][ranks] for r in ranks}) > 1
        }
        if not apart:
            return []
        single = {
            (w.name, w.block.offsets, ranks): bit_sum(w.local).item()
            for ranks in apart & self.shared.keys()
            for w in self.shared[ranks]
        }
        values: dict[tuple[str, tuple[int, ...], tuple[int, ...]], dict[int, int]] = {}
        for rank, found in enumerate(self.mesh.gather(single)):
            for key, value in found.items():
                values.setdefault(key, {})[rank] = value
        return [
            Difference(name, _odd(by_rank), ranks)
            for (name, _, ranks), by_rank in sorted(values.items())
            if len(set(by_rank.values())) > 1
        ]


def bit_sum(tensor: Tensor) -> Tensor:
    """A sum of a tensor's bits, int64 scalar; a single altered element always changes it."""
    flat = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(chunk), device=flat.device)
        total += (chunk * (places * _SPREAD | 1)).sum()
    return total


def _total(sums: Iterable[Tensor]) -> int:
    """One number of several, which depends on their order."""
    total = 0
    for value in torch.stack(list(sums)).tolist():
        total = (total * 31 + value) % (1 << 64)
    return total


def _key(weight: Weight) -> tuple[object, ...]:
    return weight.name, weight.block.offsets, weight.block.sizes


def _odd(values: Mapping[int, int]) -> tuple[int, ...]:
    """Ranks without the value of the majority."""
    (value, count), *_ = Counter(values.values()).most_common()
    if count * 2 <= len(values):
        return ()
    return tuple(sorted(rank for rank, held in values.items() if held != value))


def describe(differences: Sequence[Difference]) -> str:
    """The first of them in words, and how many there are."""
    more = len(differences) - 1
    return str(differences[0]) + (f", and of {more} more parameters" if more else "")
