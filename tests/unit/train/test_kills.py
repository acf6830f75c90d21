"""A run that is killed without warning, again and again, ends as if nothing had happened."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from megaswitch.checkpoint.manager import checkpoints, find_checkpoint, verify
from megaswitch.metrics_file import read_metrics
from tests.conftest import write_corpus

STEPS = 400
# Kills, and what a run on packed documents of several sources has that others have not.
RUNS = {"one corpus": (50, False), "packed mixture": (15, True)}


def newest(run_dir):
    """Name of the newest checkpoint, or None."""
    found = checkpoints(run_dir / "checkpoints")
    return found[-1].name if found else None


def command(config, options, run_dir, steps=STEPS):
    return [
        *(sys.executable, "-m", "megaswitch", "train", str(config), *options),
        f"--train.steps={steps}",
        f"--train.run_dir={run_dir}",
        "--checkpoint.interval=1",
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_kills_leave_no_trace(run_options, tmp_path, name):
    total, mixed = RUNS[name]
    if mixed:
        run_options = [o for o in run_options if not o.startswith("--data.train=")]
        for number, source in enumerate(("de", "en")):
            write_corpus(tmp_path / source, 3_000 * (number + 1), seed=number)
            run_options.append(f"--data.train.{source}={tmp_path / source}")
        run_options += ["--data.mixture.exponent=0.3", "--data.mixture.block=40"]
        run_options.append("--data.packing=true")
    config = tmp_path / "run.toml"
    config.write_text("")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(config, run_options, tmp_path / "straight"), env=environment, check=True)
    run = command(config, run_options, tmp_path / "run")
    chance = random.Random(0)
    kills = 0
    while kills < total:
        before = newest(tmp_path / "run")
        # How samples are read and how long the run is to be are no part of what they are.
        now = command(config, run_options, tmp_path / "run", STEPS + kills)
        now += [f"--data.loader_threads={1 + kills % 3}"]
        now += [f"--data.access={('mmap', 'pread')[kills % 2]}"]
        process = subprocess.Popen(now, env=environment, stderr=subprocess.DEVNULL)
        while newest(tmp_path / "run") == before and process.poll() is None:
            time.sleep(0.005)
        # A step with its checkpoint takes some 30 ms, so kills hit every moment of a write.
        time.sleep(chance.uniform(0.0, 0.2))
        assert process.poll() is None, "the run ended before it was killed often enough"
        process.kill()
        process.wait()
        kills += 1
        for path in checkpoints(tmp_path / "run" / "checkpoints"):
            verify(path)
    subprocess.run(run, env=environment, check=True)
    curves = []
    for name in ("straight", "run"):
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        curves.append({m["step"]: m["loss"] for m in metrics if "loss" in m})
    assert curves[0] == curves[1]
    assert len(curves[0]) == STEPS
    (one,) = find_checkpoint(tmp_path / "straight").glob("*.safetensors")
    (other,) = find_checkpoint(tmp_path / "run").glob("*.safetensors")
    for name, value in load_file(one).items():
        assert torch.equal(value, load_file(other)[name]), name
