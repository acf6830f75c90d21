"""What `data.py` measures beside speed in memory: start-up, reads from cold storage, threads."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from data_baselines import DECODER, ENCODER, RAW, VOCABULARY

from megaswitch.data.indexed import IndexedWriter
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.samples import Samples

ROWS = 256


def opened(prefix: Path, *, pread: bool = False) -> SpanCorruptionLoader:
    """A loader of T5's shape."""
    return SpanCorruptionLoader(
        prefix, seed=0, vocab_size=VOCABULARY, encoder_length=ENCODER, pread=pread
    )


def batches(start: int = 0, rows: int = ROWS) -> Iterator[range]:
    """Sample indices of batches without end."""
    return (range(i, i + rows) for i in itertools.count(start, rows))


# ---------------------------------------------------------------- start-up


def write_vast_corpus(prefix: Path, samples: int) -> None:
    """Token files of which an epoch has so many samples: a `.bin` of holes, read as zeros."""
    tokens = samples * RAW + RAW - 1
    most = 2**31 - 1
    lengths = [most] * (tokens // most) + [tokens % most]
    offsets = [0, *itertools.accumulate(2 * n for n in lengths)][:-1]
    count = len(lengths)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * tokens)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    entries = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    prefix.with_suffix(".idx").write_bytes(header + entries)


def in_own_process(function: str, *arguments: object) -> dict[str, float]:
    """What a function of this module returns when it is called in a fresh process."""
    here = Path(__file__)
    code = (
        f"import json, sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as m; "
        f"print(json.dumps(m.{function}(*{[str(a) for a in arguments]!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _memory() -> dict[str, float]:
    """MB that this process holds now, and held at most."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    names = {"rss": "VmRSS", "peak": "VmHWM", "own": "RssAnon"}
    return {name: int(fields[key].split()[0]) / 1024 for name, key in names.items()}


def _growth(function: Callable[[], object]) -> dict[str, float]:
    before = _memory()
    wall, cpu = time.perf_counter(), time.process_time()
    kept = function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    after = _memory()
    del kept
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "rss_growth_mb": after["rss"] - before["rss"],
        "peak_growth_mb": after["peak"] - before["rss"],
        "own_memory_growth_mb": after["own"] - before["own"],
    }


def start_ours(prefix: str, samples: str) -> dict[str, float]:
    """Open, and make the batch in the middle of so many samples."""

    def start() -> object:
        loader = opened(Path(prefix))
        assert loader.samples_per_epoch >= int(samples)
        middle = int(samples) // 2
        return loader, loader.batch(range(middle, middle + ROWS))

    _quietly_warmed()
    return _growth(start)


def start_megatron(samples: str) -> dict[str, float]:
    """Shuffle the order of so many samples, as Megatron does on rank 0 while the others wait."""
    from megatron.core.datasets.gpt_dataset import _build_shuffle_index

    count = int(samples)
    return _growth(lambda: _build_shuffle_index(count, count, np.random.RandomState(1)))


def _quietly_warmed() -> None:
    """Load what a first batch loads of torch and of the core, on a corpus of its own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokens"
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document(np.full(100 * RAW, 5))
        opened(prefix).batch(range(ROWS))


# ---------------------------------------------------------------- cold storage


def write_large_corpus(prefix: Path, gigabytes: float) -> None:
    """Random ids: nothing that a disk could compress or leave out."""
    random = np.random.default_rng(0)
    piece = 1 << 22
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(int(gigabytes * 1e9 / 2 / piece)):
            writer.add_document(random.integers(3, 32_000, piece, dtype=np.uint16))
    with prefix.with_suffix(".bin").open("rb") as file:
        os.fsync(file.fileno())


def forget(prefix: Path) -> None:
    """Take the files out of the page cache."""
    for suffix in (".bin", ".idx"):
        with prefix.with_suffix(suffix).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def cold_reads(
    prefix: Path, *, rounds: int = 3, samples: int = 4096
) -> dict[str, dict[str, float]]:
    """Samples per second of wall time from storage, by the way they are read, and bytes for each.

    The first two only copy the tokens of the samples, in our order; ours make whole samples.
    """
    starts = opened(prefix)
    places = [starts.sample_start(i) for i in range(samples * (rounds + 1))]
    del starts

    def plain(advice: int | None) -> Callable[[int], Callable[[], None]]:
        def prepare(first: int) -> Callable[[], None]:
            with prefix.with_suffix(".bin").open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            if advice is not None:
                mapped.madvise(advice)

            def read() -> None:
                for place in places[first : first + samples]:
                    np.frombuffer(mapped, np.uint16, RAW, 2 * place).astype(np.int64)

            return read

        return prepare

    def ours(pread: bool, threads: int) -> Callable[[int], Callable[[], None]]:
        def prepare(first: int) -> Callable[[], None]:
            loader = opened(prefix, pread=pread)

            def read() -> None:
                plan = itertools.islice(batches(first, 64), samples // 64)
                with loader.stream(plan, threads=threads, ahead=8) as stream:
                    assert sum(len(batch) for batch in stream) == samples

            return read

        return prepare

    ways = {
        "mmap, default advice": plain(None),
        "mmap, random advice": plain(mmap.MADV_RANDOM),
        "ours, mmap with hints, 1 thread": ours(False, 1),
        "ours, pread, 1 thread": ours(True, 1),
        "ours, pread, 16 threads": ours(True, 16),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, prepare in ways.items():
            read = prepare(turn * samples)
            forget(prefix)
            wall, disk = time.perf_counter(), _read_bytes()
            read()
            wall, disk = time.perf_counter() - wall, _read_bytes() - disk
            results[name].append((samples / wall, disk / samples / 1024))
            del read
    first = statistics.median(speed for speed, _ in results["mmap, default advice"])
    table = {}
    for name, laps in results.items():
        speed = statistics.median(speed for speed, _ in laps)
        table[name] = {
            "samples_per_second": speed,
            "lowest": min(laps)[0],
            "highest": max(laps)[0],
            "ratio": speed / first,
            "disk_kib_per_sample": statistics.median(disk for _, disk in laps),
        }
        print(f"{name:36s} {speed:10,.0f} samples/s  ×{speed / first:.1f}")
    return table


# ---------------------------------------------------------------- threads


def thread_scaling(prefix: Path, *, rounds: int = 15, samples: int = 102_400) -> dict[str, object]:
    """What two threads do in the time of one: our streams, and arithmetic that shares nothing.

    Wall time, of interleaved rounds the best, as that is of cores that were idle. The arithmetic
    (SHA-256 of data in cache) says what two of this machine's cores can give at all.
    """
    loader = opened(prefix)
    data = b"x" * (1 << 16)

    def hash_it(pieces: int) -> None:
        for _ in range(pieces):
            hashlib.sha256(data)

    def hashes(threads: int) -> None:
        together([lambda: hash_it(3000 // threads)] * threads)

    def fill(first: int, count: int) -> None:
        rows = [np.empty((ROWS, n), np.int32) for n in (ENCODER, DECODER, DECODER)]
        for start in range(first, first + count, ROWS):
            loader.sampler.fill(np.arange(start, start + ROWS), *rows)

    def fills(threads: int) -> None:
        share = samples // threads
        together([lambda n=n: fill(n * share, share) for n in range(threads)])

    def stream(threads: int) -> None:
        drain(loader, samples, threads)

    kinds = {"sha256": hashes, "fill": fills, "stream": stream}
    walls: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in kinds}
    for turn in range(rounds + 1):
        for (name, run), threads in itertools.product(kinds.items(), (1, 2)):
            start = time.perf_counter()
            run(threads)
            if turn:
                walls[name][threads].append(time.perf_counter() - start)
    results: dict[str, object] = {}
    for name, laps in walls.items():
        ratios = [one / two for one, two in zip(laps[1], laps[2], strict=True)]
        speedup = min(laps[1]) / min(laps[2])
        results[name] = {
            "one_thread_seconds": min(laps[1]),
            "two_threads_seconds": min(laps[2]),
            "speedup": speedup,
            "median_of_rounds": statistics.median(ratios),
        }
        print(f"two threads, {name:8s} ×{speedup:.2f}, median {statistics.median(ratios):.2f}")
    return results


def together(works: list[Callable[[], None]]) -> None:
    """Run all at once, each in a thread."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def drain(loader: Samples, samples: int, threads: int) -> None:
    """Take so many samples from a stream."""
    plan = itertools.islice(batches(), samples // ROWS)
    with loader.stream(plan, threads=threads, ahead=8) as stream:
        for _ in stream:
            pass
