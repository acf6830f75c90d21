"""What `megaswitch doctor --cluster` finds out: whether the hosts of a launch fit together.

All ranks measure, gather what they found, and come to the same findings; rank 0 shows them.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import megaswitch
from megaswitch.cli.doctor_checks import Finding
from megaswitch.cli.show import size
from megaswitch.parallel.clocks import TOLERANCE, clock_offsets
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.places import rank_list

_ROUNDS = 3
_PATIENCE = 30.0  # seconds in which a new file must appear on all hosts: NFS caches names
_SLOW = 0.7  # of the median: a chip or link slower than that is a problem


@dataclass(frozen=True)
class Rank:
    """What one rank says of itself.

    Attributes:
        host: its name.
        versions: of all that must be the same everywhere, by name.
        device: its name.
        flops: FLOP/s of a matrix product there.
        health: what is wrong with its GPU, in words; None if nothing is.
        receives: bytes/s from the rank before it while all ranks do the same.
        sums: bytes/s of a sum over all ranks, as of one link (2 (n - 1) / n of its bytes).
        sees: whether a new file of rank 0 appeared.
        locks: whether a lock that rank 0 holds is felt; None if rank 0 could not lock.
        free: bytes left in the folder.
    """

    host: str
    versions: dict[str, str]
    device: str
    flops: float
    health: str | None
    receives: float | None
    sums: float | None
    sees: bool
    locks: bool | None
    free: int


def check_cluster(mesh: Mesh, folder: Path) -> list[Finding]:
    """The findings, on all ranks alike.

    Args:
        mesh: the ranks.
        folder: where runs will be; made if it is not there.
    """
    offsets = clock_offsets(mesh)
    mine = _examine(mesh, folder)
    ranks = [Rank(**found) for found in mesh.gather(asdict(mine))]
    return [
        *_hosts(ranks),
        *_same_versions(ranks),
        *_speeds(ranks),
        *_clocks(ranks, offsets),
        *_storage(ranks, folder),
    ]


def _examine(mesh: Mesh, folder: Path) -> Rank:
    sees, locks = _shares(mesh, folder)
    on_gpu = mesh.device.type == "cuda"
    return Rank(
        host=socket.gethostname(),
        versions=_versions(on_gpu),
        device=torch.cuda.get_device_name(mesh.device) if on_gpu else platform.machine(),
        flops=_flops(mesh.device),
        health=_health(mesh.device) if on_gpu else None,
        receives=_ring(mesh),
        sums=_sums(mesh),
        sees=sees,
        locks=locks,
        free=shutil.disk_usage(folder).free if folder.is_dir() else 0,
    )


def _versions(on_gpu: bool) -> dict[str, str]:
    versions = {
        "megaswitch": megaswitch.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if on_gpu:
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["driver"] = _ask_gpu("driver_version", torch.cuda.current_device()) or "unknown"
    return versions


def _ask_gpu(what: str, index: int) -> str | None:
    """An answer of nvidia-smi about a device of this process, or None."""
    uuid = torch.cuda.get_device_properties(index).uuid
    words = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [*words, f"--id=GPU-{uuid}"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _health(device: torch.device) -> str | None:
    """Errors that its memory could not correct, and whether it is slowed down by heat or power."""
    index = device.index or 0
    problems = []
    errors = _ask_gpu("ecc.errors.uncorrected.volatile.total", index)
    if errors and errors.isdecimal() and int(errors):
        problems.append(f"{errors} memory errors that could not be corrected")
    slowed = _ask_gpu("clocks_event_reasons.hw_slowdown", index)
    if slowed == "Active":
        problems.append("it is slowed down by heat or power")
    return "; ".join(problems) or None


def _best(mesh: Mesh, work: Callable[[], object]) -> float:
    """Least seconds of several rounds, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        if mesh.group is not None:
            dist.barrier(group=mesh.group)
        _finish(mesh.device)
        began = time.perf_counter()
        work()
        _finish(mesh.device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(device: torch.device) -> float:
    n, dtype, times = (8192, torch.bfloat16, 10) if device.type == "cuda" else (512, None, 4)
    a = torch.randn(n, n, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(times):
            torch.mm(a, a)

    return times * 2 * n**3 / _best(Mesh(0, 1, device, None), work)


def _message(mesh: Mesh) -> torch.Tensor:
    return torch.ones((256 if mesh.device.type == "cuda" else 8) << 18, device=mesh.device)


def _ring(mesh: Mesh) -> float | None:
    if mesh.group is None:
        return None
    sent, received = _message(mesh), _message(mesh)
    after, before = (mesh.rank + 1) % mesh.size, (mesh.rank - 1) % mesh.size

    def work() -> None:
        operations = [
            dist.P2POp(dist.isend, sent, group=mesh.group, group_peer=after),
            dist.P2POp(dist.irecv, received, group=mesh.group, group_peer=before),
        ]
        for one in dist.batch_isend_irecv(operations):
            one.wait()

    return sent.nbytes / _best(mesh, work)


def _sums(mesh: Mesh) -> float | None:
    if mesh.group is None:
        return None
    message = _message(mesh)
    seconds = _best(mesh, lambda: mesh.sum_all_(message))
    return message.nbytes * 2 * (mesh.size - 1) / mesh.size / seconds


def _shares(mesh: Mesh, folder: Path) -> tuple[bool, bool | None]:
    """Whether a file of rank 0 is seen here, and whether its lock is felt."""
    name = f".megaswitch-doctor-{mesh.gather(secrets.token_hex(8))[0]}"
    lock = None
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            lock = None
    can_lock = mesh.gather(lock is not None)[0]
    deadline = time.monotonic() + _PATIENCE
    while not (folder / name).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    sees = (folder / name).exists()
    felt = _is_locked(folder / name) if sees and can_lock else None
    mesh.gather(None)  # rank 0 holds the lock until all have tried
    if mesh.rank == 0:
        if lock:
            lock.close()
        (folder / name).unlink(missing_ok=True)
    return sees, felt


def _is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _by_value(ranks: list[Rank], value: Callable[[Rank], str]) -> dict[str, list[int]]:
    """Ranks by a value of theirs, the most frequent first."""
    found: dict[str, list[int]] = {}
    for rank, one in enumerate(ranks):
        found.setdefault(value(one), []).append(rank)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _hosts(ranks: list[Rank]) -> Iterator[Finding]:
    for host, members in _by_value(ranks, lambda r: r.host).items():
        devices = ", ".join(_by_value([ranks[m] for m in members], lambda r: r.device))
        yield Finding(
            "hosts", host, f"{rank_list(members)}: {devices}",
            {"ranks": members, "device": devices},
        )  # fmt: skip
    for rank, one in enumerate(ranks):
        if one.health:
            yield Finding(
                "hosts", f"GPU of rank {rank}", one.health, one.health,
                problem=f"the GPU of rank {rank} on {one.host} is not well: {one.health}",
                remedy=f"leave {one.host} out (sbatch --exclude={one.host}) and have it looked at",
            )  # fmt: skip


def _same_versions(ranks: list[Rank]) -> Iterator[Finding]:
    for name in ranks[0].versions:
        found = _by_value(ranks, lambda r, name=name: r.versions.get(name, "none"))  # type: ignore[misc]
        text = "; ".join(f"{v} on {rank_list(members)}" for v, members in found.items())
        if len(found) == 1:
            yield Finding("versions", name, next(iter(found)), found)
        else:
            hosts = sorted({ranks[m].host for members in list(found.values())[1:] for m in members})
            yield Finding(
                "versions", name, text, found,
                problem=f"{name} is not the same everywhere: {text}",
                remedy=f"install {next(iter(found))} on {', '.join(hosts)}, or use a container",
            )  # fmt: skip


def _speeds(ranks: list[Rank]) -> Iterator[Finding]:
    gpu = "CUDA" in ranks[0].versions
    rows: list[tuple[str, list[float | None], float, str]] = [
        ("matrix product", [r.flops for r in ranks], 1e12, "TFLOP/s"),
        ("from the rank before", [r.receives for r in ranks], 1e9, "GB/s"),
        ("sum over all ranks", [r.sums for r in ranks], 1e9, "GB/s"),
    ]
    for name, values, unit, label in rows:
        numbers = [value for value in values if value is not None]
        if not numbers:
            continue
        median = statistics.median(numbers)
        slow = [rank for rank, value in enumerate(numbers) if value < _SLOW * median]
        text = f"{median / unit:.3g} {label} (median), slowest {min(numbers) / unit:.3g}"
        hosts = ", ".join(sorted({ranks[r].host for r in slow}))
        # CPU ranks share their cores with whatever else runs there, so that only GPUs are judged.
        problem = f"{name}: {rank_list(slow)} on {hosts} below 70 % of the median" if slow else None
        yield Finding(
            "speed", name, text, numbers, problem=problem if gpu else None,
            remedy=f"look at {hosts}: heat, other jobs, cables; or leave it out" if slow else None,
        )  # fmt: skip


def _clocks(ranks: list[Rank], offsets: list[float]) -> Iterator[Finding]:
    worst = max(range(len(offsets)), key=lambda r: abs(offsets[r]))
    wrong = abs(offsets[worst]) > TOLERANCE
    yield Finding(
        "clocks", "largest difference", f"{abs(offsets[worst]):.3f} s from the median", offsets,
        problem=f"the clock of {ranks[worst].host} (rank {worst}) is {offsets[worst]:+.1f} s off"
        if wrong else None,
        remedy="set it by NTP or chrony" if wrong else None,
    )  # fmt: skip


def _storage(ranks: list[Rank], folder: Path) -> Iterator[Finding]:
    where = os.fspath(folder.absolute())
    blind = [rank for rank, one in enumerate(ranks) if not one.sees]
    hosts = ", ".join(sorted({ranks[r].host for r in blind}))
    yield Finding(
        "storage", "shared", f"{where}: " + ("not by all" if blind else "by all ranks"), not blind,
        problem=f"{rank_list(blind)} on {hosts} cannot see what rank 0 wrote to {where}"
        if blind else None,
        remedy="give a folder of a file system that all nodes mount" if blind else None,
    )  # fmt: skip
    unfelt = [rank for rank, one in enumerate(ranks) if one.sees and one.locks is False]
    locks = "work" if not unfelt else f"do not reach {rank_list(unfelt)}"
    if all(one.locks is None for one in ranks):
        locks = "are not offered"
    yield Finding(
        "storage", "locks", locks, not unfelt,
        remedy=None if locks == "work" else "see to it that only one job uses a run folder",
    )  # fmt: skip
    yield Finding("storage", "free", size(min(one.free for one in ranks)),
                  min(one.free for one in ranks))  # fmt: skip
