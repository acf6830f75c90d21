"""A rank that dies or hangs ends the whole job, with a sentence that says which and where.

A thread of every rank looks once a second into the rendezvous store. A rank in trouble writes there
what it saw; the threads of the others, which work while their main threads wait, answer with where
these are. From the answers rank 0 prints one message, and all ranks exit. Each rank that is able to
leaves a flight recorder file first: its stacks, and its last collectives as torch recorded them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megaswitch.events import write_event
from megaswitch.log import UserError
from megaswitch.parallel.flight import write_flight_record
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.places import Place, place_now, place_of_error, story

_POLL = 1.0  # seconds between two looks into the store
_ANSWERS = 5.0  # seconds that ranks have to answer in
_STORE = 10.0  # seconds after which the store itself counts as gone


class Watchdog:
    """What one rank tells the others. Made by `watch`.

    Args:
        mesh: of the run.
        timeout: seconds without progress, or without a sign of life of a rank, that mean trouble.
        run_dir: where flight recorder files and the event go; None: nowhere.
    """

    def __init__(self, mesh: Mesh, timeout: float, run_dir: Path | None = None) -> None:
        self._mesh, self._timeout, self._run_dir = mesh, timeout, run_dir
        self._step, self._phase = 0, ""
        self._limited, self._looks = False, 0  # looks into the store since the last progress
        self._failure: tuple[str, Place] | None = None  # of the main thread
        self._cleanups: list[Callable[[], object]] = []
        self._wake, self._ended, self._stopped = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def at(self, step: int, phase: str, *, limited: bool = True) -> None:
        """Say what this rank does from now on.

        Args:
            step: of training; 0: there are none.
            phase: such as "forward"; it may last `timeout` seconds.
            limited: False if it may last for ever, as a checkpoint of a large model may.
        """
        self._step, self._phase = step, phase
        self._limited, self._looks = limited, 0

    def before_exit(self, clean: Callable[[], object]) -> None:
        """Call `clean` if the job ends in a way that leaves no time for `finally`."""
        self._cleanups.append(clean)

    def _start(self) -> None:
        self._thread.start()

    def _stop(self) -> None:
        """End the thread; the other ranks go on without this one's signs of life."""
        self._stopped.set()
        self._wake.set()
        self._thread.join(_STORE + _POLL)

    def _fail(self, error: BaseException) -> NoReturn:
        """Tell the others, let them answer, exit. Never waits for the store itself."""
        # torchrun ends its other ranks as soon as one died; they must first say where they were.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        place = place_of_error(error, self._mesh)
        if place.kind != "collective":
            traceback.print_exception(error)
        self._failure = f"{type(error).__name__}: {_first_line(error)}", place
        self._wake.set()
        if not self._ended.wait(_STORE + 2 * _ANSWERS):
            self._print(f"rank {self._mesh.rank} failed, {self._failure[0]}")
        self._exit()

    def _run(self) -> None:
        try:
            store = _connect()
            next_rank = (self._mesh.rank + 1) % self._mesh.size
            neighbour, beat, silent = f"beat/{next_rank}", b"", 0
            for count in itertools.count():
                if self._stopped.is_set():
                    break
                store.set(f"beat/{self._mesh.rank}", str(count))
                if self._failure or store.check(["trouble"]):
                    self._report(store, self._failure[0] if self._failure else "")
                new = store.get(neighbour) if store.check([neighbour]) else b""
                silent = 0 if new != beat or new == b"done" else silent + 1
                beat = new
                self._looks += 1
                # Looks are counted, not seconds: a machine that was suspended is not in trouble.
                if silent * _POLL > self._timeout:
                    self._report(store, f"no sign of life of rank {next_rank}")
                if self._limited and self._looks * _POLL > self._timeout:
                    self._report(store, f"no progress for {self._timeout:g} s")
                self._wake.wait(_POLL)
            store.set(f"beat/{self._mesh.rank}", "done")
        except dist.DistError as error:  # the process that holds the store is gone
            if not self._stopped.is_set():
                self._print(
                    "rank 0 or its node is gone, as the store there does not answer "
                    f"({_first_line(error)}); rank {self._mesh.rank} {self._place()}"
                )
                self._exit()

    def _place(self) -> Place:
        place = self._failure[1] if self._failure else place_now(self._mesh)
        return place.during(self._step, self._phase)

    def _report(self, store: dist.Store, reason: str) -> NoReturn:
        """Answer; the rank that was first to report also collects, and rank 0 prints."""
        rank, place = self._mesh.rank, self._place()
        store.set(f"answer/{rank}", json.dumps(asdict(place)))
        written = self._record(place, reason)
        mine = json.dumps({"rank": rank, "reason": reason})
        first = json.loads(store.compare_set("trouble", "", mine))
        if first["rank"] == rank:
            answers = self._collect(store)
            text = story(answers, self._mesh.size)
            store.set("verdict", f"{text}. Rank {rank} reports: {first['reason']}")
        if _appears(store, ["verdict"], 3 * _ANSWERS):
            text = store.get("verdict").decode()
        else:
            text = f"rank {first['rank']} reported {first['reason']!r} and then fell silent"
        if rank == 0:
            self._print(
                text + (f". Stacks and collectives of each rank: {written}" * bool(written))
            )
            if self._run_dir:
                write_event(self._run_dir, "ended by the watchdog", self._step, story=text)
            store.set("printed", "")
        elif not _appears(store, ["printed"], 2 * _POLL) and first["rank"] in (rank, 0):
            self._print(text)
        # Whoever holds the store leaves last.
        time.sleep(_POLL if rank == 0 else 0.0)
        self._ended.set()
        self._exit()

    def _record(self, place: Place, reason: str) -> Path | None:
        """Leave this rank's flight recorder file; the folder, if it could be written."""
        if self._run_dir is None:
            return None
        try:
            return write_flight_record(self._run_dir / "flight", self._mesh.rank, place, reason)
        except OSError as error:
            self._print(f"no flight recorder file in {self._run_dir}: {error.strerror}")
            return None

    def _collect(self, store: dist.Store) -> dict[int, Place]:
        keys = {rank: f"answer/{rank}" for rank in range(self._mesh.size)}
        _appears(store, list(keys.values()), _ANSWERS)
        return {
            rank: Place(**json.loads(store.get(key)))
            for rank, key in keys.items()
            if store.check([key])
        }

    def _print(self, text: str) -> None:
        print(f"error: the job ends: {text}", file=sys.stderr, flush=True)

    def _exit(self) -> NoReturn:
        """Exit at once; the usual way would wait for groups and threads that hang."""
        for clean in self._cleanups:
            with contextlib.suppress(Exception):
                clean()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)


@contextlib.contextmanager
def watch(mesh: Mesh, timeout: float, run_dir: Path | None = None) -> Iterator[Watchdog]:
    """Guard what all ranks do together; costs three small messages a second.

    Any exception inside ends the job, but for a `UserError` (which ranks raise together) and an
    interruption. In a single process nothing is watched.

    Args:
        mesh: of the run, whose ranks met at MASTER_ADDR:MASTER_PORT.
        timeout: seconds, as of the collectives.
        run_dir: where flight recorder files and the event go; None: nowhere.
    """
    watchdog = Watchdog(mesh, timeout, run_dir)
    if mesh.size == 1:
        yield watchdog
        return
    watchdog._start()
    try:
        yield watchdog
    except UserError:
        raise
    except Exception as error:
        watchdog._fail(error)
    finally:
        watchdog._stop()


def _connect() -> dist.Store:
    """A connection of our own: a wait of another thread would block the group's."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=_STORE),
    )
    # torchrun keeps its store when it starts all ranks again.
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _appears(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Wait for keys; `Store.wait` would fill the log with its own complaints."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _first_line(error: BaseException) -> str:
    """The first line of a message, without gloo's place in its sources and its good wishes."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^\]]*\] |\. This is typically caused by .*", "", line)[:300]
