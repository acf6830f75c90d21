"""Resharding beside `cp` of the same checkpoint; after a kill; and in bounded memory.

Command: python tools/benchmarks/reshard.py --output tools/benchmarks/reshard.json

It needs 35 GB of disk at --folder. All times include that everything is on disk; sources are out of
the page cache at the start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from side_by_side import record

from megaswitch.checkpoint.chunks import shard_name
from megaswitch.checkpoint.integrity import entry_of
from megaswitch.checkpoint.manager import tensor_files
from megaswitch.checkpoint.placement import head_of
from megaswitch.checkpoint.tensor_files import read_headers
from megaswitch.config import OptimConfig, RunConfig, model_config, to_toml
from megaswitch.train.relayout import Changes, plan_fresh

SOURCE = ["--parallel.pp=2", "--parallel.tp=2"]  # 4 ranks
TARGET = ["--parallel.ep=8", "--parallel.tp=2"]  # 16 ranks
MEMORY = "1GiB"
PHASES = ("throughput", "kill", "memory", "dry-run")


def make_checkpoint(path: Path, preset: str, *, sparse: bool) -> int:
    """A checkpoint of a model with AdamW's states; of zeros that take no disk, if sparse."""
    path.mkdir(parents=True)
    config = RunConfig(model=model_config(preset), optim=OptimConfig(name="adamw"))
    files, config = plan_fresh(config, SOURCE, None, Changes())
    (path / "config.toml").write_text(to_toml(config))
    generator = np.random.default_rng(0)
    for rank, pieces in enumerate(files):
        with (path / shard_name(rank, len(files))).open("wb") as file:
            file.write(head_of(pieces))
            left = sum(p.bytes for p in pieces)
            if sparse:
                file.truncate(file.tell() + left)
            for size in [] if sparse else [64 << 20] * (left >> 26) + [left % (64 << 20)]:
                bits = generator.integers(0, 1 << 32, size // 4, dtype=np.uint32)
                file.write((bits & np.uint32(0xBFFFFFFF)).data)  # all of them finite
    listed: dict[str, dict[str, Any]] = {p.name: entry_of(p) for p in path.iterdir()}
    state = {"step": 1, "samples": 1, "fingerprint": "0", "mixture": []}
    content = {"format": 1, "state": state, "files": listed}
    (path / "state.json").write_text(json.dumps(content))
    os.sync()
    return sum(entry["bytes"] for entry in listed.values())


def forget(path: Path) -> None:
    """Take files out of the page cache."""
    os.sync()
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def start(source: Path, target: Path) -> subprocess.Popen[bytes]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "megaswitch", "reshard", str(source), str(target)]
    return subprocess.Popen([*command, *TARGET, "--max-memory", MEMORY])


def finish(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Wait for a process; its peak memory in bytes, and the CPU-seconds that it took."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    return usage.ru_maxrss << 10, usage.ru_utime + usage.ru_stime


def copy(source: Path, target: Path) -> None:
    """`cp`, then `sync` of what it wrote."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor, put together by the safetensors library."""
    found = {}
    for name, tensor in read_headers(tensor_files(path)).items():
        whole = np.empty(tensor.shape, dtype=np.uint32)
        for part in tensor.parts:
            with safe_open(str(part.file), framework="pt") as file:
                index = tuple(
                    slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True)
                )
                whole[index] = file.get_tensor(name).view(torch.int32).numpy().view(np.uint32)
        found[name] = hashlib.sha256(whole.data).hexdigest()
    return found


def throughput(source: Path, size: int, rounds: int = 3) -> dict[str, Any]:
    """Seconds of both, in turn."""
    seconds: dict[str, list[float]] = {"cp": [], "reshard": []}
    used: list[tuple[int, float]] = []
    target = source.with_name("target")
    for _ in range(rounds):
        for name, laps in seconds.items():
            forget(source)
            begin = time.perf_counter()
            if name == "cp":
                copy(source, target)
            else:
                used.append(finish(start(source, target)))
            laps.append(time.perf_counter() - begin)
            print(f"{name}: {laps[-1]:.1f} s, {size / laps[-1] / 1e6:.0f} MB/s", flush=True)
            if len(laps) < rounds or name == "cp":
                shutil.rmtree(target)
    equal = hashes(source) == hashes(target)
    shutil.rmtree(target)
    medians = {name: statistics.median(laps) for name, laps in seconds.items()}
    return {
        "bytes": size,
        "seconds": seconds,
        "megabytes_per_second": {name: size / s / 1e6 for name, s in medians.items()},
        "fraction_of_cp": medians["cp"] / medians["reshard"],
        "fraction_of_cp_of_the_fastest": min(seconds["cp"]) / min(seconds["reshard"]),
        "peak_bytes": max(peak for peak, _ in used),
        "cpu_seconds": statistics.median(cpu for _, cpu in used),
        "tensors_equal_by_sha256": equal,
    }


def killed(source: Path, size: int) -> dict[str, Any]:
    """SIGKILL once half is there, then the same command again."""
    target = source.with_name("target")
    aside = target.with_name("target.resharding")
    process = start(source, target)
    while sum(f.stat().st_size for f in aside.glob("*.safetensors")) < size // 2:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    loads = (aside / "state.json").exists() or target.exists()
    lines = (aside / "journal.jsonl").read_text().splitlines()
    done = [entry["written"] for entry in map(json.loads, lines) if "written" in entry]
    kept = {name: (aside / name).stat().st_mtime_ns for name in done}
    begin = time.perf_counter()
    finish(start(source, target))
    seconds = time.perf_counter() - begin
    again = {name: (target / name).stat().st_mtime_ns for name in done}
    equal = hashes(source) == hashes(target)
    shutil.rmtree(target)
    return {
        "files_kept": len(kept),
        "kept_files_were_not_written_again": kept == again,
        "something_loads_after_the_kill": loads,
        "seconds_of_the_rest": seconds,
        "tensors_equal_by_sha256": equal,
    }


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory with a checkpoint many times larger."""
    source, target = folder / "sparse", folder / "target"
    size = make_checkpoint(source, "switch-base-32", sparse=True)
    begin = time.perf_counter()
    peak, _ = finish(start(source, target))
    seconds = time.perf_counter() - begin
    shutil.rmtree(source)
    shutil.rmtree(target)
    return {"bytes": size, "max_memory": MEMORY, "peak_bytes": peak, "seconds": seconds}


def dry_run() -> dict[str, Any]:
    """Plan Switch-C on 512 ranks."""
    command = [sys.executable, "-m", "megaswitch", "reshard", "--dry-run", "switch-c-2048", "out"]
    layout = ["--parallel.ep=256", "--parallel.tp=2", "--json", "--disk-bandwidth=1GB/s"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, *layout], stdout=subprocess.PIPE)
    assert process.stdout
    report = json.loads(process.stdout.read())
    peak, _ = finish(process)
    return {
        "ranks": len(report["files"]),
        "parameters": report["parameters"],
        "bytes": report["bytes"],
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak,
    }


def main() -> None:
    """Measure; earlier results of other phases are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--only", choices=PHASES, nargs="+", default=PHASES)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())["results"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if {"throughput", "kill"} & set(arguments.only):
            source = folder / "source"
            size = make_checkpoint(source, "switch-base-8", sparse=False)
            if "throughput" in arguments.only:
                results["throughput"] = throughput(source, size)
            if "kill" in arguments.only:
                results["kill"] = killed(source, size)
            shutil.rmtree(source)
        if "memory" in arguments.only:
            results["memory"] = memory(folder)
        if "dry-run" in arguments.only:
            results["dry-run"] = dry_run()
    print(json.dumps(results, indent=1))
    record("tools/benchmarks/reshard.py", results, arguments.output)


if __name__ == "__main__":
    main()
