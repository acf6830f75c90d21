"""Ranks that a test starts, hurts and starts again: forked, so that a start takes no second.

What happens inside a rank is decided by an injection, a function that is called in its process
before training and may replace whatever it likes there.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from megaswitch.checkpoint.manager import checkpoints, verify
from megaswitch.config import load_config
from megaswitch.log import UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.train.launch import launch
from megaswitch.train.trainer import Trainer

Injection = Callable[[int], None]


class Ranks:
    """The processes of one start of a run.

    Args:
        options: overrides that make the run's configuration.
        size: number of ranks.
        folder: where each rank's words go.
        inject: is called with the rank in its process.
    """

    def __init__(
        self, options: list[str], size: int, folder: Path, inject: Injection | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._words = [folder / f"rank{rank}.err" for rank in range(size)]
        context = mp.get_context("fork")
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            process = context.Process(
                target=_rank, args=(options, rank, size, port, self._words[rank], inject)
            )
            with warnings.catch_warnings():  # of threads, which do not matter to the child
                warnings.simplefilter("ignore")
                process.start()
            self.processes.append(process)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid or 0, number)

    @property
    def running(self) -> bool:
        """Whether all of them are."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 250.0) -> list[int]:
        """Exit codes; a rank that goes on longer is killed, and fails the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} did not end: {self.words()}"
        return [process.exitcode or 0 for process in self.processes]

    def words(self) -> str:
        """What all ranks said."""
        return "".join(path.read_text(errors="replace") for path in self._words if path.exists())


def _rank(
    options: list[str], rank: int, size: int, port: int, words: Path, inject: Injection | None
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    with words.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 0
    try:
        if inject:
            inject(rank)
        if not launch(load_config(None, options, world_size=size)):
            code = 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    os._exit(code)


def record_samples(folder: Path) -> Injection:
    """Each rank notes which samples it trained on in which step, in a file of its own."""

    def inject(rank: int) -> None:
        plain = Trainer._batches
        file = (folder / f"samples-{os.getpid()}-{rank}").open("a", buffering=1)

        def batches(self, number):
            found = plain(self, number)
            indices = [int(i) for batch in found for i in batch.sample_index]
            # Tensor-parallel ranks read the same rows; the first is enough.
            file.write(f"{self.state.step + 1} {' '.join(map(str, indices))}\n")
            return found

        Trainer._batches = batches

    return inject


def samples_by_step(folder: Path) -> dict[int, list[int]]:
    """The samples of each step in order of their indices.

    Of a step that was done several times, those of all times: if they are the same, no more.
    """
    steps: dict[int, set[int]] = {}
    for path in folder.glob("samples-*"):
        for line in path.read_text().splitlines():
            step, *indices = map(int, line.split())
            steps.setdefault(step, set()).update(indices)
    return {step: sorted(indices) for step, indices in sorted(steps.items())}


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; no step may stand there twice."""
    lines = [m for m in read_metrics(run_dir / "metrics.jsonl") if "loss" in m]
    found = {m["step"]: m["loss"] for m in lines}
    assert len(found) == len(lines)
    return found


def newest(run_dir: Path) -> int:
    """Step of the newest checkpoint; 0: there is none."""
    found = checkpoints(run_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def wait_until(true: Callable[[], bool], ranks: Ranks, seconds: float = 180.0) -> None:
    """Until something is so; the ranks must be running all the time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it never came: {ranks.words()}"
        assert ranks.running, f"a rank ended: {ranks.words()}"
        time.sleep(0.002)


def unreadable(run_dir: Path) -> int:
    """Checkpoints under their final names that do not match their sums."""
    count = 0
    for path in checkpoints(run_dir / "checkpoints"):
        try:
            verify(path)
        except UserError:
            count += 1
    return count


def small_disk(limit: int) -> Injection:
    """No file of a rank may grow beyond `limit` bytes: the kernel refuses, as a full disk does."""

    def inject(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return inject


def all_of(*injections: Injection | None) -> Injection:
    """Several, one after the other."""

    def inject(rank: int) -> None:
        for one in injections:
            if one:
                one(rank)

    return inject
