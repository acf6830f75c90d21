"""Eight processes that wait for work: forked once, joined by gloo anew for each piece of it.

A function and its arguments travel by pickle, so the function is found by its name. Whatever the
piece of work did to `torch.distributed` is gone after it; the processes and their imports stay.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVE = 60.0  # seconds after which a rank gives a collective up
_WORK = 240.0  # seconds for one piece of work
# Pieces of work after which the processes are replaced. Groups that are gone leave threads behind,
# some of which spin once their peers are gone, too: after a hundred pieces they take all cores.
_LIFE = 6
_GRACE = 3.0  # seconds in which ranks may say how another's failure reached them


class RankError(Exception):
    """Work failed on some ranks; the message has their tracebacks, the first to fail first."""


class World:
    """The processes. Started at the first piece of work, and again after one that failed.

    Args:
        size: how many.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._done = 0

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call function(*args) on ranks 0 … ranks - 1 of one group; what each returned.

        One rank alone forms no group, as a process started alone.

        Raises:
            RankError: it failed somewhere. All processes are ended; the next call starts new ones.
        """
        assert 1 <= ranks <= self.size
        if self._done == _LIFE:
            self.close()
        if not self._processes:
            self._start()
        self._done += ranks > 1
        with tempfile.TemporaryDirectory() as folder:
            work = pickle.dumps((ranks, str(Path(folder) / "store"), function, args))
            for pipe in self._pipes[:ranks]:
                pipe.send_bytes(work)
            return self._answers(ranks)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._done = [], [], 0

    def _start(self) -> None:
        context = mp.get_context("fork")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            process = context.Process(
                target=_serve, args=(rank, theirs, list(self._pipes)), daemon=True
            )
            with warnings.catch_warnings():  # of threads, which do not matter to the child
                warnings.simplefilter("ignore")
                process.start()
            theirs.close()
            self._processes.append(process)

    def _answers(self, ranks: int) -> list[Any]:
        rank_of = {pipe: rank for rank, pipe in enumerate(self._pipes[:ranks])}
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + _WORK
        while len(answers) + len(failures) < ranks:
            waiting = [p for p, r in rank_of.items() if r not in answers and r not in failures]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                ok, value = _received(pipe)
                (answers if ok else failures)[rank_of[pipe]] = value
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE)
        missing = sorted(set(range(ranks)) - answers.keys() - failures.keys())
        if failures or missing:
            self.close()
            told = [f"--- rank {rank} failed ---\n{text}" for rank, text in failures.items()]
            silent = [f"--- ranks {missing} did not answer ---"] if missing else []
            raise RankError("\n".join([f"of {ranks} ranks:", *told, *silent]))
        return [answers[rank] for rank in range(ranks)]


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "the process ended without a word"
    return ok, value


def _serve(rank: int, pipe: Connection, inherited: list[Connection]) -> None:
    """A process's life: until the test session ends, or its work fails."""
    for other in inherited:  # else nobody would notice that the session is gone
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # what came with the fork is never looked through again
    while True:
        try:
            work = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            result = _work(rank, *pickle.loads(work))
            # Not `send`, whose tensors would stay here, in shared memory.
            pipe.send_bytes(pickle.dumps((True, result)))
        except BaseException:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            os._exit(1)  # which ends the collectives that other ranks wait in


def _work(
    rank: int, ranks: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    if ranks == 1:
        return function(*args)
    timeout = dt.timedelta(seconds=_COLLECTIVE)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout
    )
    result = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # what held groups, whose threads would otherwise stay
    return result
