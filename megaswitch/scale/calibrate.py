"""A hardware file of this machine, measured: kernels, real training steps, a small group, the disk.

Kernels and bare collectives tell what the machine can do at best. What it does in training is found
from steps of small models, each rehearsed and run: times of a FLOP, a byte and an operation that
explain all of them best, none better than the kernel's own; then, from steps of a group, times of a
collective and of a byte that crosses, with all that torch does around them (DTensor, FSDP's hooks).
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
import torch.distributed as dist

from megaswitch.config import RunConfig, load_config
from megaswitch.log import UserError, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.scale.hardware import Hardware, crossing_share, load_hardware
from megaswitch.scale.links import Link, measure_links, run_ranks
from megaswitch.scale.recorder import Work
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.scale.stopwatch import least_seconds, step_seconds

_REPEATS = 12  # the least counts, as a machine may be slow for seconds
_ROUNDS = 3  # that steps are repeated in
_EXPERTS, _HEADS = 32, 4  # that groups divide, in steps below
_PRODUCTS = ((512, 512, 2048), (1024, 1024, 1024), (2048, 512, 2048))
_SIZES = (1 << 18, 1 << 20, 1 << 22)  # numbers of an array, from a cache's to a memory's
_DISK = 64 << 20  # bytes
_TINY = ("--model.preset=switch-tiny", "--train.device=cpu", "--data.encoder_length=128",
         "--data.decoder_length=32")  # fmt: skip
# Between them, each of the three times is most of a step.
STEPS: dict[str, tuple[str, ...]] = {
    "few tokens": ("--train.micro_batch_size=4", "--train.batch_size=4", "--model.d_model=64"),
    "many tokens": ("--train.micro_batch_size=32", "--train.batch_size=32"),
    "wide, dense": ("--model.preset=t5-tiny", "--model.d_model=512", "--model.d_ff=2048",
                    "--train.micro_batch_size=8", "--train.batch_size=8"),
    "large vocabulary": ("--model.vocab_size=16384", "--train.micro_batch_size=4",
                         "--train.batch_size=8"),
    "32 experts": ("--model.moe.num_experts=32", "--train.micro_batch_size=16",
                   "--train.batch_size=16", "--model.dropout=0.0"),
}  # fmt: skip


def group_steps(ranks: int) -> dict[str, tuple[str, ...]]:
    """Steps of a group that tell most of its collectives; those that so many ranks can divide."""
    rows = "--train.micro_batch_size=4", f"--train.batch_size={4 * ranks}"
    steps = {
        "dp, large vocabulary": (*rows, "--model.vocab_size=16384"),
        "ZeRO, few tokens": (*rows, "--model.d_model=64", "--parallel.zero=full"),
        "ZeRO, large vocabulary": (*rows, "--model.vocab_size=16384", "--parallel.zero=full"),
    }
    if _EXPERTS % ranks == 0:
        more = "--train.micro_batch_size=16", f"--train.batch_size={16 * ranks}"
        steps["ep, 32 experts"] = (*STEPS["32 experts"], *more, f"--parallel.ep={ranks}")
    if _HEADS % ranks == 0:
        for name in ("few tokens", "wide, dense"):
            steps[f"tp, {name}"] = (*STEPS[name], f"--parallel.tp={ranks}")
    return steps


@dataclass(frozen=True)
class Sample:
    """A real step: what it did, and how long that took.

    Attributes:
        name: of the step.
        work: of all its operations but collectives.
        seconds: that it took.
        calls: of collectives.
        crossing: bytes of them that leave a rank.
    """

    name: str
    work: Work
    seconds: float
    calls: float = 0.0
    crossing: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the machine that explains it."""

    hardware: Hardware
    steps: list[Sample]
    links: list[Link]

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted by measured seconds of the steps that the machine was fitted to."""
        machine = self.hardware
        bf16 = machine.device == "cuda"
        start, by_byte = machine.collective_seconds, 1 / machine.node_bandwidth
        return {
            s.name: (machine.seconds_of(s.work, bf16=bf16) + s.calls * start
                     + s.crossing * by_byte) / s.seconds
            for s in self.steps
        }  # fmt: skip


def calibrate(device: str, ranks: int, folder: Path, links_of: str | None = None) -> Calibration:
    """Measure this machine.

    Args:
        device: "cpu" or "cuda".
        ranks: that share the machine. On a CPU all are measured at once, as they slow each other.
        folder: on the disk that checkpoints are written to.
        links_of: a known machine whose links to take, instead of measuring a group.

    Raises:
        UserError: there are not as many GPUs.
    """
    gpus, group = torch.cuda.device_count(), max(2, ranks)
    if device == "cuda" and gpus < (1 if links_of else group):
        raise UserError(
            f"--ranks {ranks} needs {group} GPUs, and this machine has {gpus}; a machine of one "
            "takes links from a known one, such as --links-of h100"
        )
    place = torch.device(device)
    info("measuring kernels and training steps …")
    together = device == "cpu" and ranks > 1
    # A GPU's host runs ahead: what it does around collectives is hidden.
    shared = {} if links_of or not together else group_steps(ranks)
    what = device, list(STEPS.values()), list(shared.values()), _REPEATS
    told = run_ranks(device, ranks, _measure, *what) if together else [_measure(*what)]
    kernels = Kernels(*np.mean([t["kernels"] for t in told], axis=0).tolist())
    seconds = np.mean([t["seconds"] for t in told], axis=0).tolist()
    took = iter(seconds)  # of the steps alone, then of the shared ones
    alone = [_sample(name, words, 1, next(took), device) for name, words in STEPS.items()]
    fitted = fit(alone, kernels)
    info("measuring a group …")
    links = [] if links_of else measure_links(device, group)
    like = load_hardware(links_of) if links_of else None
    joint = [_sample(name, words, ranks, next(took), device) for name, words in shared.items()]
    crossing = fit_collectives(joint, fitted, fit_links(links)) if links else None
    hardware = _hardware(place, ranks, folder, kernels, fitted, crossing, like)
    return Calibration(hardware, [*alone, *joint], links)


def _measure(
    device: str, alone: Sequence[Sequence[str]], shared: Sequence[Sequence[str]], repeats: int
) -> dict[str, list[float]]:
    """Kernels, and seconds of each step, on this rank while the others do the same.

    Each step is measured in several rounds, as machines are slow for a while.
    """
    place = torch.device(device)
    kernels = list(astuple(_kernels(place, repeats)))
    world = dist.get_world_size() if dist.is_initialized() else 1
    configs = [(_config(words, device, 1), Mesh(0, 1, place, None)) for words in alone]
    for words in shared:
        config = _config(words, device, world)
        configs.append((config, Mesh.over_ranks(place, config.parallel)))
    least = [math.inf] * len(configs)
    for _ in range(_ROUNDS):
        for i, (config, mesh) in enumerate(configs):
            if dist.is_initialized():
                dist.barrier()
            least[i] = min(least[i], step_seconds(config, mesh, -(-repeats // _ROUNDS)))
    return {"kernels": kernels, "seconds": least}


def _sample(name: str, words: Sequence[str], world: int, seconds: float, device: str) -> Sample:
    config = _config(words, device, world)
    step = rehearse_rank(config, world, 0, device)
    calls = crossing = 0.0
    for kind, number in step.collectives.items():
        calls += number
        crossing += number * kind.size * crossing_share(kind.operation, world)
    return Sample(name, step.work, seconds, calls, crossing)


@dataclass(frozen=True)
class Kernels:
    """The best that single operations reach, in units of a second."""

    fp32_flops: float
    bf16_flops: float
    memory_bandwidth: float
    operation: float
    copied: float  # bytes per second to memory of the host


def _kernels(device: torch.device, repeats: int) -> Kernels:
    def products(dtype: torch.dtype) -> float:
        rates = []
        for m, k, n in _PRODUCTS:
            a = torch.randn(m, k, device=device, dtype=dtype)
            b = torch.randn(k, n, device=device, dtype=dtype)
            seconds = least_seconds(partial(torch.mm, a, b), device, repeats)
            rates.append(2 * m * k * n / seconds)
        return max(rates)

    moved = []
    for size in _SIZES:
        x, y, z = torch.randn(3, size, device=device)
        seconds = least_seconds(partial(torch.mul, x, y, out=z), device, repeats)
        moved.append(12 * size / seconds)
    few = torch.ones(16, device=device)
    times = 1000
    start = least_seconds(lambda: [few * few for _ in range(times)], device, repeats) / times
    large = torch.randn(_SIZES[-1], device=device)
    host = torch.empty(_SIZES[-1])
    copying = least_seconds(lambda: host.copy_(large), device, repeats)
    return Kernels(
        products(torch.float32), products(torch.bfloat16), max(moved), start,
        4 * _SIZES[-1] / copying,
    )  # fmt: skip


def _config(words: Sequence[str], device: str, world: int) -> RunConfig:
    config = load_config(None, (*_TINY, *words), world_size=world)
    if device == "cuda":
        config = replace(config, train=replace(config.train, precision="bf16"))
    return config


def fit(steps: Sequence[Sample], kernels: Kernels) -> Work:
    """Seconds of a FLOP, a moved byte and an operation.

    The squares of relative errors are least, of times no shorter than the kernels'.
    """
    least = [1 / kernels.fp32_flops, 1 / kernels.memory_bandwidth, kernels.operation]
    amounts = [[s.work.flops, s.work.moved, s.work.operations] for s in steps]
    return Work(*_times(amounts, [s.seconds for s in steps], least))


def fit_collectives(
    steps: Sequence[Sample], fitted: Work, least: tuple[float, float]
) -> tuple[float, float]:
    """Seconds of a collective, and by byte that crosses, in training steps of a group.

    Args:
        steps: of a group; none: `least` is all that is known.
        fitted: what `fit` found.
        least: both of bare collectives.
    """
    if not steps:
        return least
    parts = [(s.work.flops, s.work.moved, s.work.operations) for s in steps]
    whole = [s.seconds for s in steps]
    left = [w - np.dot(part, astuple(fitted)) for w, part in zip(whole, parts, strict=True)]
    start, by_byte = _times([[s.calls, s.crossing] for s in steps], left, least, whole)
    return start, by_byte


def _times(
    amounts: Sequence[Sequence[float]],
    seconds: Sequence[float],
    least: Sequence[float],
    of: Sequence[float] | None = None,
) -> list[float]:
    """Of one of each amount, so that sums come closest to `seconds`; none below its least.

    The squares of errors are least, relative to `of`, or to the seconds themselves.
    """
    whole = np.array(of or seconds)
    shares = np.array(amounts) * np.array(least) / whole[:, None]
    aims = np.array(seconds) / whole
    times = np.ones(len(least))  # by the least
    for _ in range(2000):  # a convex problem of few numbers, one after the other
        for i, column in enumerate(shares.T):
            missing = aims - shares @ times + column * times[i]
            times[i] = max(1.0, column @ missing / (column @ column))
    found: list[float] = (times * least).tolist()
    return found


def _hardware(
    device: torch.device,
    ranks: int,
    folder: Path,
    kernels: Kernels,
    fitted: Work,
    crossing: tuple[float, float] | None,
    like: Hardware | None,
) -> Hardware:
    gpu = device.type == "cuda"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    name = _processor()
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        memory, name = float(properties.total_memory), properties.name
    if like:
        link, start, nodes = like.node_bandwidth, like.collective_seconds, like.node_gpus
        network, efficiency = like.network_bandwidth, like.link_efficiency
    else:
        assert crossing
        start, link = crossing[0], 1 / crossing[1]
        network, efficiency, nodes = link, 1.0, ranks
    peak = kernels.bf16_flops if gpu else kernels.fp32_flops
    return Hardware(
        name=f"{name}, calibrated",
        sources=[
            f"megaswitch study calibrate, torch {torch.__version__}, "
            f"{torch.get_num_threads()} thread(s) a rank",
            "seconds are of the GPU" if gpu else "seconds are CPU-seconds of a rank",
            f"links of {like.name}"
            if like
            else f"links of {max(2, ranks)} ranks in this machine, "
            f"{'bare' if gpu or ranks == 1 else 'in training steps'}; no network was measured",
            "assumptions: dollars_per_hour, hours_between_failures",
        ],
        device=device.type,
        memory=memory,
        bf16_flops=kernels.bf16_flops,
        fp32_flops=kernels.fp32_flops,
        memory_bandwidth=1 / fitted.moved,
        node_gpus=nodes,
        node_bandwidth=link,
        network_bandwidth=network,
        host_bandwidth=kernels.copied,
        dollars_per_hour=2.5 if gpu else 0.05,
        matmul_efficiency=1 / (fitted.flops * peak),
        link_efficiency=efficiency,
        hours_between_failures=50_000.0,
        operation_seconds=fitted.operations,
        collective_seconds=start,
        disk_bandwidth=_disk(folder) / ranks,
    )


def fit_links(links: Sequence[Link]) -> tuple[float, float]:
    """Seconds to start a collective, and by byte that crosses; relative errors are least."""
    rows = np.array([[1.0, link.crossing] for link in links])
    rows /= np.array([[link.seconds] for link in links])
    scale = rows.max(0)
    start, by_byte = np.linalg.lstsq(rows / scale, np.ones(len(rows)), rcond=None)[0] / scale
    shortest = min(link.seconds for link in links)
    return max(float(start), 0.01 * shortest), float(by_byte)


def _disk(folder: Path) -> float:
    """Bytes per second that reach the disk, in seconds of a clock."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_DISK // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _DISK / (time.perf_counter() - start)


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def as_toml(hardware: Hardware) -> str:
    """A hardware file. The units are those of `hardware/h100.toml`."""
    return tomli_w.dumps(vars(hardware))


def as_table(found: Calibration) -> dict[str, Any]:
    """For programs."""
    return {
        "hardware": vars(found.hardware),
        "steps": [vars(s) | {"work": vars(s.work)} for s in found.steps],
        "ratios": found.ratios,
        "links": [vars(link) for link in found.links],
    }
