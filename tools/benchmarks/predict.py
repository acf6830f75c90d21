"""Predicted against measured time of training steps that the calibration has not seen.

The machine is calibrated first, as `megaswitch study calibrate` does, for one process and for two
at once. Then each run is rehearsed, planned and done, in one process or two. Seconds are those of a
CPU for a rank, in one thread, at the speed that the machine had for a step of the calibration; of
two ranks the mean, as routing gives one more than the other, or those of the slower pipeline stage.
Command: python tools/benchmarks/predict.py --output tools/benchmarks/predict.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from side_by_side import record

from megaswitch.config import RunConfig, load_config
from megaswitch.parallel.mesh import Mesh
from megaswitch.scale.calibrate import STEPS, as_table, calibrate
from megaswitch.scale.estimate import estimate
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.links import run_ranks
from megaswitch.scale.profile import Profile, profile
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.scale.simulate import step_seconds as simulated_seconds
from megaswitch.scale.stopwatch import step_seconds
from megaswitch.scale.updates import update_work
from megaswitch.train.placement import row_lengths

BASE = (
    "--model.preset=switch-tiny",
    "--train.device=cpu",
    "--data.encoder_length=128",
    "--data.decoder_length=32",
    "--train.micro_batch_size=8",
    "--train.batch_size=8",
)
ADAMW = ("--optim.name=adamw", "--optim.schedule=constant", "--optim.learning_rate=1e-4")
TWO = ("--train.batch_size=16",)
# Name to the number of processes and what differs from the base. None is a step of `calibrate`.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "4 rows": (1, ("--train.micro_batch_size=4", "--train.batch_size=4")),
    "switch-tiny": (1, ()),
    "48 rows": (1, ("--train.micro_batch_size=48", "--train.batch_size=48")),
    "8 blocks, AdamW": (1, ("--model.num_encoder_layers=4", "--model.num_decoder_layers=4",
                            *ADAMW)),
    "t5-tiny, 24 rows": (1, ("--model.preset=t5-tiny", "--train.micro_batch_size=24",
                             "--train.batch_size=24")),
    "256 wide": (1, ("--model.d_model=256", "--model.d_ff=1024")),
    "rows of 256 and 64": (1, ("--data.encoder_length=256", "--data.decoder_length=64")),
    "recomputed, two micro-batches": (1, ("--train.activation_checkpointing=true", *TWO)),
    "dp 2": (2, TWO),
    "ep 2": (2, (*TWO, "--parallel.ep=2")),
    "tp 2": (2, ("--parallel.tp=2",)),
    "pp 2": (2, (*TWO, "--parallel.pp=2", "--parallel.schedule=1f1b")),
    "ep 2, 256 wide, 16 rows": (2, ("--model.d_model=256", "--model.d_ff=1024", "--parallel.ep=2",
                                    "--train.micro_batch_size=16", "--train.batch_size=32")),
    "ZeRO, full": (2, (*TWO, *ADAMW, "--parallel.zero=full")),
}  # fmt: skip

REFERENCE = "32 experts"  # of the calibration's steps
_ROUNDS = 5


def config_of(name: str) -> RunConfig:
    """Of a run above."""
    ranks, words = RUNS[name]
    return load_config(None, (*BASE, *words), world_size=ranks)


def measure(names: Sequence[str], repeats: int) -> list[float]:
    """Seconds of each run on this rank, by those of the reference; alone, or as one of two.

    A shared machine is twice as slow for minutes, so the reference is timed right before each run,
    and the median of several rounds counts.
    """
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    alone, joined = Mesh(0, 1, cpu, None), dist.is_initialized()
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_ROUNDS):
        for name in names:
            config = config_of(name)
            if joined:
                dist.barrier()
            reference = step_seconds(load_config(None, (*BASE, *STEPS[REFERENCE])), alone, repeats)
            mesh = Mesh.over_ranks(cpu, config.parallel) if joined else alone
            ratios[name].append(step_seconds(config, mesh, repeats) / reference)
    return [statistics.median(found) for found in ratios.values()]


def simulate(name: str, hardware: Hardware) -> float:
    """Of the slowest rank of a pipeline, as others are alike."""
    config, world = config_of(name), RUNS[name][0]
    ranks = range(0, world, world // config.parallel.pp)
    steps = [rehearse_rank(config, world, rank, "cpu") for rank in ranks]
    return max(sum(simulated_seconds(step, config, world, hardware).values()) for step in steps)


_PROFILES: dict[str, Profile] = {}  # of models, which many runs share


def plan(name: str, hardware: Hardware) -> float:
    """The planner's seconds, but those in which nobody computes."""
    config, world = config_of(name), RUNS[name][0]
    lengths = row_lengths(config)

    def profile_of(tp: int, exchanges: bool) -> Profile:
        key = repr((config.model, config.optim, lengths, tp, exchanges))
        if key not in _PROFILES:
            updates = update_work(config, "cpu")
            _PROFILES[key] = profile(config, lengths, tp, exchanges, "cpu", updates)
        return _PROFILES[key]

    seconds = estimate(config, world, lengths, profile_of, hardware).seconds
    return seconds.total - seconds.bubble - seconds.checkpoint


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """1 if both numbers always order alike, -1 if never."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(pairs, 2)]
    return sum((s > 0) - (s < 0) for s in signs) / len(signs)


def summary(rows: dict[str, dict[str, float]], predictor: str) -> dict[str, Any]:
    """How good a predictor is over all runs."""
    errors = {name: row[predictor] / row["measured"] - 1 for name, row in rows.items()}
    return {
        "median_error": statistics.median(map(abs, errors.values())),
        "largest_error": max(map(abs, errors.values())),
        "beyond_25_percent": [n for n, e in errors.items() if abs(e) > 0.25],
        "kendall_tau": kendall_tau([(r[predictor], r["measured"]) for r in rows.values()]),
    }


def main() -> None:
    """Calibrate, predict, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        calibrations = {ranks: calibrate("cpu", ranks, Path(folder)) for ranks in (1, 2)}
    measured: dict[str, float] = {}
    for ranks in (1, 2):
        names = [name for name, (number, _) in RUNS.items() if number == ranks]
        if ranks == 1:
            by_rank = [measure(names, arguments.repeats)]
        else:
            by_rank = run_ranks("cpu", ranks, measure, names, arguments.repeats)
        for name, column in zip(names, zip(*by_rank, strict=True), strict=True):
            pipeline = config_of(name).parallel.pp > 1
            measured[name] = (max if pipeline else statistics.fmean)(column)
    rows = {}
    for name in RUNS:
        calibration = calibrations[RUNS[name][0]]
        hardware = calibration.hardware
        reference = next(s.seconds for s in calibration.steps if s.name == REFERENCE)
        row = {
            "measured": measured[name] * reference,
            "simulated": simulate(name, hardware),
            "planned": plan(name, hardware),
        }
        rows[name] = row
        ratios = (f"{p} ×{row[p] / row['measured']:.2f}" for p in ("simulated", "planned"))
        print(f"{name:32s} {row['measured'] * 1e3:9.1f} ms", *ratios, flush=True)
    tables = {str(ranks): as_table(found) for ranks, found in calibrations.items()}
    results = {"runs": rows, "calibrations": tables}
    for predictor in ("simulated", "planned"):
        results[predictor] = summary(rows, predictor)
        print(predictor, results[predictor])
    record("tools/benchmarks/predict.py", results, arguments.output)


if __name__ == "__main__":
    main()
