"""How fast ranks of this machine talk: collectives of a small group, timed.

Ranks are processes of their own, with gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megaswitch.scale.stopwatch import least_seconds

_SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22)  # bytes
_TIMES = 4  # calls that are timed together
_REPEATS = 8


@dataclass(frozen=True)
class Link:
    """One kind of collective.

    Attributes:
        operation: such as "all_to_all".
        size: bytes, as `parallel/README.md` counts them.
        crossing: bytes of it that leave a rank.
        seconds: of a call, on one rank.
    """

    operation: str
    size: int
    crossing: float
    seconds: float


def measure_links(device: str, ranks: int) -> list[Link]:
    """Of a group of so many ranks: all-to-all and all-reduce of several sizes."""
    by_rank = run_ranks(device, ranks, _time_collectives, device)
    return [
        Link(operation, size, crossing, fmean(told[i][3] for told in by_rank))
        for i, (operation, size, crossing, _) in enumerate(by_rank[0])
    ]


def _time_collectives(device: str) -> list[tuple[str, int, float, float]]:
    ranks, place = dist.get_world_size(), torch.device(device)
    found = []
    for size in _SIZES:
        x = torch.ones(size // 4, device=place)
        y = torch.empty_like(x)
        share = (ranks - 1) / ranks
        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "all_to_all": (size * share, partial(dist.all_to_all_single, y, x)),
            "all_reduce": (2 * size * share, partial(dist.all_reduce, x)),
        }
        for operation, (crossing, call) in calls.items():
            dist.barrier()
            took = least_seconds(partial(_repeat, call), place, _REPEATS) / _TIMES
            found.append((operation, size, crossing, took))
    return found


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(_TIMES):
        call()


def run_ranks(device: str, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on each rank of a new group; what each returned.

    Args:
        device: "cpu" or "cuda".
        ranks: processes, each with as many threads as this one.
        function: of a module, by whose name it is found; returns what JSON can hold.
        args: pickled on their way.
    """
    with tempfile.TemporaryDirectory() as folder:
        threads = torch.get_num_threads()
        mp.spawn(_serve, (device, ranks, threads, folder, function, args), nprocs=ranks)
        texts = (Path(folder, f"{r}.json").read_text(encoding="utf-8") for r in range(ranks))
        return [json.loads(text) for text in texts]


def _serve(
    rank: int,
    device: str,
    ranks: int,
    threads: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
    )
    told = json.dumps(function(*args))
    Path(folder, f"{rank}.json").write_text(told, encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
