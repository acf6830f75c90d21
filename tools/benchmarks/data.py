"""The data core beside what others use: samples per CPU-second, start-up, cold storage, threads.

Command: python tools/benchmarks/data.py --output tools/benchmarks/data.json

Baselines that are not installed are left out, with the reason in the results:
`pip install megatron-core==0.16.1` brings Megatron. Parts can be run alone: `--parts
throughput cold`. Cold reads write a file of `--gigabytes` to TMPDIR and remove it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_baselines import (
    MAKERS,
    NOT_MEASURED,
    PACKAGES,
    RAW,
    VOCABULARY,
    MakeBatch,
    Unavailable,
    version,
)
from data_storage import (
    ROWS,
    batches,
    cold_reads,
    in_own_process,
    opened,
    start_megatron,
    start_ours,
    thread_scaling,
    write_large_corpus,
    write_vast_corpus,
)
from side_by_side import record

from megaswitch.data.document_loader import DocumentLoader
from megaswitch.data.indexed import IndexedWriter
from megaswitch.data.mixture import Mixture

PARTS = ("throughput", "startup", "cold", "threads")


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--samples", type=float, default=1e9, help="Of the start-up.")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="Of the corpus read cold.")
    parser.add_argument("--seconds", type=float, default=40.0, help="Of the throughput.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"versions": {p: v for p in PACKAGES if (v := version(p))}}
    results["load_average"] = {"before": os.getloadavg()[0]}  # other work on the machine
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(Path(folder) / "tokens")
        if "throughput" in arguments.parts:
            results["throughput"] = throughput(prefix, arguments.seconds)
        if "threads" in arguments.parts:
            results["threads"] = thread_scaling(prefix)
        if "startup" in arguments.parts:
            results["startup"] = startup(Path(folder), int(arguments.samples))
        if "cold" in arguments.parts:
            write_large_corpus(Path(folder) / "large", arguments.gigabytes)
            results["cold"] = cold_reads(Path(folder) / "large")
    results["load_average"]["after"] = os.getloadavg()[0]
    record("tools/benchmarks/data.py", results, arguments.output)


def write_corpus(prefix: Path, documents: int = 8_000) -> Path:
    """Documents of sentences, some 500 tokens long, with ids as frequent as words are."""
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            for length in random.lognormal(3.0, 0.5, random.integers(5, 40)).astype(int) + 2:
                writer.append(3 + random.zipf(1.3, length) % (VOCABULARY - 200))
            writer.end_document()
    return prefix


# ---------------------------------------------------------------- throughput


def throughput(prefix: Path, seconds: float) -> dict[str, Any]:
    """Raw tokens per CPU-second of one thread on one core, interleaved, batches of 256 rows."""
    affinity = os.sched_getaffinity(0)
    makers = {**MAKERS, **ours(prefix)}
    variants: dict[str, MakeBatch] = {}
    left_out = dict(NOT_MEASURED)
    for name, maker in makers.items():
        try:
            variants[name] = maker(prefix, ROWS)
            variants[name]()
        except Unavailable as error:
            left_out[name] = str(error)
            print(f"{name}: left out, {error}")
    laps: dict[str, list[tuple[int, float, float]]] = {name: [] for name in variants}
    os.sched_setaffinity(0, {min(affinity)})
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(laps[next(iter(laps))]) < 5:
            for name, make in variants.items():
                # Fast ones run longer in a round, for a clock that has enough to count.
                for _ in range(1 if name in MAKERS else 20):
                    wall, cpu = time.perf_counter(), time.process_time()
                    tokens = make()
                    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                    laps[name].append((tokens, cpu, wall))
    finally:
        os.sched_setaffinity(0, affinity)
    table = {name: _speed(found) for name, found in laps.items()}
    core = table["ours"]["tokens_per_cpu_second"]
    for name, row in table.items():
        row["ours_is_faster_by"] = core / row["tokens_per_cpu_second"]
        print(
            f"{name:32s} {row['tokens_per_cpu_second'] / 1e6:9.3f} M tokens/CPU-s "
            f"p50 {row['batch_ms_p50']:9.3f} ms  p99 {row['batch_ms_p99']:9.3f} ms  "
            f"ours ×{row['ours_is_faster_by']:.1f}"
        )
    return {"rows_per_batch": ROWS, "variants": table, "left_out": left_out}


def ours(prefix: Path) -> dict[str, Callable[[Path, int], MakeBatch]]:
    """The core as training uses it: plain, in a mixture, and with packed documents."""

    def of(make_loader: Callable[[], Any]) -> Callable[[Path, int], MakeBatch]:
        def maker(_: Path, rows: int) -> MakeBatch:
            loader, plan = make_loader(), batches(0, rows)
            packed = loader.packed

            def make() -> int:
                batch = loader.batch(next(plan))
                if not packed:
                    return rows * RAW
                return int(batch.encoder_mask.sum() + batch.decoder_mask.sum())

            return make

        return maker

    def mixture() -> Mixture:
        return Mixture({str(n): opened(prefix) for n in range(100)}, seed=0, exponent=0.3)

    def packed() -> DocumentLoader:
        return DocumentLoader(
            prefix, objective="span-corruption", packing=True, seed=0, vocab_size=VOCABULARY,
            encoder_length=512,
        )  # fmt: skip

    return {
        "ours": of(lambda: opened(prefix)),
        "ours, mixture of 100": of(mixture),
        "ours, packed documents": of(packed),
    }


def _speed(laps: list[tuple[int, float, float]]) -> dict[str, float]:
    speeds = sorted(tokens / cpu for tokens, cpu, _ in laps if cpu)
    low, middle, high = statistics.quantiles(speeds, n=4)
    walls = np.array([wall for _, _, wall in laps]) * 1e3
    return {
        "tokens_per_cpu_second": middle,
        "quartile_low": low,
        "quartile_high": high,
        "batch_ms_p50": float(np.percentile(walls, 50)),
        "batch_ms_p99": float(np.percentile(walls, 99)),
        "batches": len(laps),
    }


# ---------------------------------------------------------------- start-up


def startup(folder: Path, samples: int) -> dict[str, Any]:
    """Time and memory until the first batch of a run over so many samples, in fresh processes."""
    vast = folder / "vast"
    write_vast_corpus(vast, samples)
    found = [in_own_process(start_ours.__name__, vast, samples) for _ in range(5)]
    result: dict[str, Any] = {"samples": samples, "ours": _medians(found)}
    if version("megatron-core"):
        result["Megatron-core shuffle index"] = in_own_process(start_megatron.__name__, samples)
    else:
        result["left_out"] = {"Megatron-core shuffle index": "megatron-core is not installed"}
    for name in ("ours", "Megatron-core shuffle index"):
        if row := result.get(name):
            print(
                f"{name:32s} {row['wall_seconds']:9.4f} s, RSS grows by "
                f"{row['rss_growth_mb']:.1f} MB, at most {row['peak_growth_mb']:.1f}"
            )
    return result


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    main()
