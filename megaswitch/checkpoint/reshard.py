"""Rewriting a checkpoint, so that each rank of another layout reads a file of its own.

Any layout reads any checkpoint; what changes is that a rank then opens one file and reads it from
start to end. Tensors stream through windows of bounded memory: files of tensor-parallel neighbours,
which divide rows among them, are written in step, so that what they share is read once. Threads
take one group of files each; reading, hashing and writing leave the interpreter's lock alone.

The result appears whole or not at all: it is written to a folder of another name, where a journal
tells what is on disk, and renamed once all checksums are right.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from megaswitch.checkpoint.chunks import shard_name
from megaswitch.checkpoint.fingerprint import fingerprint
from megaswitch.checkpoint.integrity import (
    SUM,
    damaged_checkpoint,
    entry_of,
    matches,
    recorded_sum,
)
from megaswitch.checkpoint.journal import Journal, finished_files
from megaswitch.checkpoint.manager import FORMAT, read_state
from megaswitch.checkpoint.placement import Piece, head_of
from megaswitch.checkpoint.regions import Region, regions
from megaswitch.checkpoint.safetensors_file import DTYPES, ITEM_BYTES
from megaswitch.checkpoint.tensor_files import Part, StoredTensor, common
from megaswitch.checkpoint.windows import Bits, Buffer, Reader, Writer, read_sums
from megaswitch.files import lock, sync, write_durably
from megaswitch.log import UserError

UNFINISHED = ".resharding"
_LEAST = 4 << 20  # bytes of a buffer, below which reads get slow
_MOST = 32 << 20  # beyond which they get no faster
_SLACK = 64 << 20  # stacks of threads, the journal, what the allocator keeps
_BUFFERS = 5  # of each thread


@dataclass(frozen=True)
class Work:
    """A resharding.

    Attributes:
        source: the checkpoint that is read.
        stored: its tensors.
        wanted: the tensors of the result, by their names there, as parts of the source's files.
        files: what the file of each rank is to hold.
        together: files of so many neighbouring ranks are written in step.
        config: TOML of the result.
    """

    source: Path
    stored: Mapping[str, StoredTensor]
    wanted: Mapping[str, StoredTensor]
    files: Sequence[Sequence[Piece]]
    together: int
    config: str

    @property
    def bytes(self) -> int:
        """That are written."""
        return sum(piece.bytes for file in self.files for piece in file)

    @property
    def identity(self) -> str:
        """Differs from that of any other resharding."""
        digest = hashlib.sha256((self.source / "state.json").read_bytes())
        digest.update(self.config.encode())
        for file in self.files:
            digest.update(repr(file).encode())
        for tensor in self.wanted.values():
            digest.update(repr(tensor).encode())
        return digest.hexdigest()


def reshard(
    work: Work, target: Path, *, max_memory: int, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Do it, or what is left of it.

    Args:
        work: what to do.
        target: the new checkpoint's folder, which must not exist.
        max_memory: bytes that this process may occupy.
        progress: called with numbers of bytes, read to be checked or written, as they are done.

    Raises:
        UserError: the source is damaged, `target` exists or cannot be written, or the memory does
            not suffice. The source is left alone and nothing that loads is left at `target`.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it first")
    aside = target.with_name(target.name + UNFINISHED)
    if aside.is_symlink() or (aside.exists() and not (aside / "journal.jsonl").exists()):
        raise UserError(f"{aside}, where the result would be prepared, is in use; remove it first")
    # Twice as many as cores: some always wait for the disk.
    groups = -(-len(work.files) // work.together)
    threads, size = share_memory(max_memory, min(2 * len(os.sched_getaffinity(0)), groups + 1))
    try:
        with lock(aside, doing="resharding", other="destination"):
            job = _Job(work, aside, Journal(aside / "journal.jsonl", work.identity), progress)
            job.check_space()
            job.run([_Worker(size) for _ in range(threads)])
            job.complete(target)
    except OSError as error:
        kept = _drop_unfinished(aside)
        how = f", which goes on from what is in {aside}" if kept else ""
        raise UserError(
            f"{target} could not be written: {error.strerror or error}. The source is intact; free "
            f"space or choose another destination, and give the same command again{how}"
        ) from error
    except _Damage as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise damaged_checkpoint(work.source, [str(error)]) from error


def _drop_unfinished(aside: Path) -> bool:
    """Remove files that are of no use; whether finished ones are left."""
    finished = finished_files(aside / "journal.jsonl")
    if not finished:
        shutil.rmtree(aside, ignore_errors=True)
        return False
    for path in aside.glob("*.safetensors"):
        if path.name not in finished:
            path.unlink(missing_ok=True)
    return True


class _Damage(Exception):
    """The source is not what it claims to be."""


def share_memory(max_memory: int, threads: int) -> tuple[int, int]:
    """How many threads, and with which buffers, keep the process within `max_memory` bytes.

    Args:
        max_memory: bytes.
        threads: at most so many.

    Returns:
        threads, and the size of each of their buffers.

    Raises:
        UserError: not even one does.
    """
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    free = max_memory - held - _SLACK
    if free < _LEAST * _BUFFERS:
        least = held + _SLACK + _LEAST * _BUFFERS
        raise UserError(
            f"--max-memory {max_memory >> 20}MiB does not suffice, as the program itself takes "
            f"{held >> 20} MiB; give at least {(least >> 20) + 1}MiB"
        )
    threads = max(1, min(threads, free // (_LEAST * _BUFFERS)))
    return threads, min(free // (threads * _BUFFERS), _MOST) // 64 * 64


class _Worker:
    """Memory of one thread.

    Args:
        size: of each of its buffers.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.reader = Reader(size)
        self.windows = Buffer(size), Buffer(size)
        self.cast, self.piece = Buffer(size), Buffer(size)


class _Job:
    """A resharding under way in the folder `aside`."""

    def __init__(
        self, work: Work, aside: Path, journal: Journal, progress: Callable[[int], None]
    ) -> None:
        self.work, self.aside, self.journal, self.progress = work, aside, journal, progress
        self.listed = read_state(work.source)["files"]
        self._stop = threading.Event()
        self._workers: SimpleQueue[_Worker] = SimpleQueue()

    def check_space(self) -> None:
        """Refuse to start what would fill the disk."""
        done = sum(entry["bytes"] for entry in self.journal.written.values())
        free, needed = shutil.disk_usage(self.aside).free, self.work.bytes - done
        if needed > free:
            raise OSError(28, f"it needs {needed:,} bytes and {free:,} are free")

    def run(self, workers: Sequence[_Worker]) -> None:
        """Check the files of the source and write those of the result."""
        parts: dict[Path, list[tuple[Part, StoredTensor]]] = defaultdict(list)
        for tensor in self.work.stored.values():
            for part in tensor.parts:
                parts[part.file].append((part, tensor))
        used = {part.file for tensor in self.work.wanted.values() for part in tensor.parts}
        step = self.work.together
        count = len(self.work.files)
        groups = [range(i, min(i + step, count)) for i in range(0, count, step)]
        checks = [partial(self._check, path, parts[path]) for path in sorted(used)]
        writes = [partial(self._write, group) for group in groups]
        # By turns: the one reads, the other writes.
        tasks = [task for pair in zip_longest(checks, writes) for task in pair if task]
        for worker in workers:
            self._workers.put(worker)
        with ThreadPoolExecutor(len(workers), "reshard") as pool:
            futures = [pool.submit(self._with_worker, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _with_worker(self, task: Callable[[_Worker], None]) -> None:
        worker = self._workers.get()
        try:
            if not self._stop.is_set():
                task(worker)
        finally:
            worker.reader.close()
            self._workers.put(worker)

    def _check(
        self, path: Path, parts: Sequence[tuple[Part, StoredTensor]], worker: _Worker
    ) -> None:
        """Read a file of the source and compare its checksum."""
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        if self.journal.checked.get(path.name, {}).get("stamp") != stamp:
            name, listed = recorded_sum(self.listed[path.name])
            found, sums = read_sums(path, parts, worker.reader, worker.windows[0], name)
            if found != listed:
                raise _Damage(f"{path.name} does not match its checksum")
            self.journal.found_good(path.name, {"stamp": stamp, "tensors": sums})
        self.progress(status.st_size)

    def _write(self, ranks: Sequence[int], worker: _Worker) -> None:
        """Write the files of a group of ranks, but for those that are there."""
        names = {rank: shard_name(rank, len(self.work.files)) for rank in ranks}
        for name in names.values():
            if done := self.journal.written.get(name):
                path = self.aside / name
                if path.is_symlink() or not path.is_file() or path.stat().st_size != done["bytes"]:
                    raise UserError(f"{path} is not as it was left; remove {self.aside}")
                self.progress(done["bytes"])
        open_ranks = [
            rank
            for rank, name in names.items()
            if self.work.files[rank] and name not in self.journal.written
        ]
        writers: dict[int, Writer] = {}
        with ThreadPoolExecutor(1) as ahead:
            try:
                for rank in open_ranks:
                    writers[rank] = Writer(self.aside / names[rank])
                    writers[rank].write(head_of(self.work.files[rank]))
                for bits, region in self._read(open_ranks, worker, ahead):
                    if self._stop.is_set():
                        return
                    self._hand_out(bits, region, writers, worker)
                for rank, writer in writers.items():
                    self.journal.wrote(names[rank], writer.finish())
            finally:
                for writer in writers.values():
                    writer.close()

    def _read(
        self, ranks: Sequence[int], worker: _Worker, ahead: ThreadPoolExecutor
    ) -> Iterator[tuple[Bits, Region]]:
        """All windows that the files of `ranks` are made of; one is read while one is written."""
        pending = None
        files = {rank: self.work.files[rank] for rank in ranks}
        for number, region in enumerate(regions(files, self.work.wanted, worker.size)):
            task = partial(self._fill, region, worker.reader, worker.windows[number % 2])
            future = ahead.submit(task)
            if pending:
                yield pending[0].result(), pending[1]
            pending = future, region
        if pending:
            yield pending[0].result(), pending[1]

    def _fill(self, region: Region, reader: Reader, buffer: Buffer) -> Bits:
        tensor = self.work.wanted[region.name]
        bits = buffer.array(region.sizes, ITEM_BYTES[tensor.dtype])
        reader.fill(bits, tensor, region.offsets)
        return bits

    def _hand_out(
        self, bits: Bits, region: Region, writers: Mapping[int, Writer], worker: _Worker
    ) -> None:
        """Append to each file what it wants of a window."""
        stored = self.work.wanted[region.name].dtype
        for rank, piece in region.pieces:
            overlap = common(piece.offsets, piece.sizes, region.offsets, region.sizes)
            if overlap is None:
                continue
            index = tuple(
                slice(a - o, b - o) for (a, b), o in zip(overlap, region.offsets, strict=True)
            )
            values = bits[index] if index else bits
            if not values.flags.c_contiguous:
                copy = worker.piece.array(values.shape, values.itemsize)
                copy[...] = values
                values = copy
            if piece.dtype != stored:
                values = _cast(values, stored, piece.dtype, worker.cast)
            offsets = [start for start, _ in overlap]
            writers[rank].sums[piece.name] += fingerprint(values, offsets, piece.shape)
            writers[rank].write(values.reshape(-1).view("u1").data)
            self.progress(values.nbytes)

    def complete(self, target: Path) -> None:
        """Compare the tensors, add the small files, and give the folder its name."""
        sums = _totals(self.journal.written.values())
        self._compare(sums, _totals(self.journal.checked.values()))
        files = {
            name: {"bytes": entry["bytes"], SUM: entry[SUM]}
            for name, entry in sorted(self.journal.written.items())
        }
        for name in self.listed:
            if not name.endswith(".safetensors") and name != "config.toml":
                shutil.copyfile(self.work.source / name, self.aside / name, follow_symlinks=False)
                sync(self.aside / name)
                files[name] = self.listed[name]
                if not matches(self.aside / name, files[name]):
                    raise _Damage(f"{name} does not match its checksum")
        config = self.aside / "config.toml"
        write_durably(config, self.work.config)
        files["config.toml"] = entry_of(config)
        content = {
            "format": FORMAT,
            "state": read_state(self.work.source)["state"],
            "files": files,
            "tensors": {name: f"{value:016x}" for name, value in sorted(sums.items())},
        }
        for path in (self.journal.path, self.aside / ".lock"):
            path.unlink()
        write_durably(self.aside / "state.json", json.dumps(content, indent=1))
        sync(self.aside)
        self.aside.rename(target)
        sync(target.parent)

    def _compare(self, sums: Mapping[str, int], source: Mapping[str, int]) -> None:
        """Refuse a result whose tensors are not those of the source."""
        wanted = self.work.wanted
        cast = {p.name for f in self.work.files for p in f if p.dtype != wanted[p.name].dtype}
        wrong = [
            name
            for name, tensor in self.work.wanted.items()
            if tensor is self.work.stored.get(name)
            and name not in cast
            and sums.get(name, 0) != source.get(name, 0)
        ]
        recorded = read_state(self.work.source).get("tensors", {})
        wrong += [n for n in source if n in recorded and recorded[n] != f"{source[n]:016x}"]
        if wrong:
            raise _Damage(f"{wrong[0]} was not the same when it was read twice")


def _totals(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Fingerprints of whole tensors from the shares in several files."""
    sums: dict[str, int] = defaultdict(int)
    for entry in entries:
        for name, share in entry["tensors"].items():
            sums[name] = (sums[name] + share) % (1 << 64)
    return dict(sums)


def _cast(bits: Bits, before: str, after: str, buffer: Buffer) -> Bits:
    """The same numbers in another type."""
    out = buffer.array(bits.shape, ITEM_BYTES[after])
    source = torch.from_numpy(bits).view(DTYPES[before])
    torch.from_numpy(out).view(DTYPES[after]).copy_(source)
    return out
