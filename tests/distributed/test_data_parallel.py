"""Two ranks train as one process does: losses, gradients, checkpoints, across launches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaswitch.checkpoint.manager import find_checkpoint
from megaswitch.metrics_file import read_metrics

GRADIENTS = """
import sys
import torch
from pathlib import Path
from megaswitch.config import load_config
from megaswitch.parallel.mesh import Mesh, world_size
from megaswitch.train import trainer as module
from megaswitch.train.meters import Meters

torch.set_default_dtype(torch.float64)
target, *overrides = sys.argv[1:]
mesh = Mesh.start("cpu")
trainer = module.Trainer.build(load_config(None, overrides, world_size=world_size()), mesh)
taken = {}

def clip(parameters, max_norm, mesh):
    step = trainer.state.step
    taken.update({f"{step} {n}": w.local.grad.clone() for n, w in trainer.parts.weights.items()})
    return torch.zeros(())

module.clip_gradients = clip
meters = Meters(trainer.config, mesh, (), None)
for _ in range(2):  # the second step's gradients lie in the memory of the first one's
    meters.begin(routing=False)
    trainer.step(0.0, meters, False)
taken["loss"] = torch.tensor(meters.losses.summary(mesh)["loss"])
if mesh.rank == 0:
    torch.save(taken, target)
mesh.stop()
"""


# Runs the command line with one rank made to differ.
UNEQUAL = """
import os, resource, signal, sys
from megaswitch.train import resume, trainer
from megaswitch.cli import main
from megaswitch.data.loader import SpanCorruptionLoader

kind = sys.argv.pop(1)
mine = int(os.environ["RANK"])
if kind == "sees no checkpoint" and mine == 1:
    resume.checkpoints = lambda folder: []
if kind == "cannot read its data" and mine == 1:
    def batch(self):
        raise trainer.UserError("the data of this node is gone")
    trainer.BatchStream.__next__ = batch
if kind == "cannot write metrics" and mine == 0:
    def write(self, step, metrics):
        raise OSError(28, "No space left on device")
    trainer.MetricLog.write = write
main()
"""


def launch(ranks: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert not check or process.returncode == 0, process.stderr
    return process


def losses(run_dir: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in read_metrics(run_dir / "metrics.jsonl") if "loss" in m}


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_equal_one_process(run_options, tmp_path, ranks):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    options = [*run_options, "--model.dropout=0.1", "--train.micro_batch_size=2"]
    for number in (1, ranks):
        run_dir = f"--train.run_dir={tmp_path / f'ranks{number}'}"
        launch(number, str(script), str(tmp_path / f"{number}.pt"), *options, run_dir)
    one = torch.load(tmp_path / "1.pt", weights_only=True)
    many = torch.load(tmp_path / f"{ranks}.pt", weights_only=True)
    assert one.keys() == many.keys()
    for name, gradient in one.items():
        assert gradient.dtype == torch.float64
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (many[name] - gradient).abs().max() <= 1e-12 * scale, name


def test_a_run_may_go_on_with_another_number_of_ranks(run_options, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("")
    train = ["-m", "megaswitch", "train", str(config), *run_options]
    straight = f"--train.run_dir={tmp_path / 'straight'}"
    launch(1, *train, straight)
    launch(2, *train, "--train.steps=4")
    launch(1, *train, "--train.steps=8")
    launch(2, *train)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)


def test_two_ranks_resume_bit_for_bit(run_options, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("")
    train = ["-m", "megaswitch", "train", str(config), *run_options]
    launch(2, *train, f"--train.run_dir={tmp_path / 'straight'}")
    launch(2, *train, "--train.steps=5")
    launch(2, *train)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    resumed, straight = (
        {k: v for file in find_checkpoint(tmp_path / d).glob("*.safetensors")
         for k, v in load_file(file).items()}
        for d in ("run", "straight")
    )  # fmt: skip
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_a_batch_that_two_ranks_cannot_share_is_refused_before_they_meet(run_options, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("")
    options = [*run_options, "--train.batch_size=12", "--train.micro_batch_size=4"]
    process = launch(2, "-m", "megaswitch", "train", str(config), *options, check=False)
    assert process.returncode != 0
    assert "train.batch_size=12 must be a multiple of" in process.stderr
    assert "4 × 2 = 8; use" in process.stderr
    assert "Traceback (most recent call last)" not in process.stderr.split("elastic")[0]


@pytest.mark.parametrize("zero", ["none", "full"])
def test_more_ranks_than_validation_batches(run_options, tmp_path, zero):
    config = tmp_path / "run.toml"
    config.write_text("")
    few = ["--train.valid_samples=4", "--train.steps=2", "--train.valid_interval=1"]
    train = ["-m", "megaswitch", "train", str(config), *run_options, *few]
    launch(1, *train, f"--train.run_dir={tmp_path / 'one'}")
    launch(2, *train, f"--parallel.zero={zero}")
    one, two = (
        [m for m in read_metrics(tmp_path / name / "metrics.jsonl") if "valid/loss" in m]
        for name in ("one", "run")
    )
    assert len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sees no checkpoint", "the ranks see different newest checkpoints"),
        ("cannot read its data", "the data of this node is gone"),
        ("cannot write metrics", "metrics cannot be written to"),
    ],
)
def test_one_rank_in_trouble_ends_all_with_its_reason(run_options, tmp_path, kind, message):
    config, script = tmp_path / "run.toml", tmp_path / "unequal.py"
    config.write_text("")
    script.write_text(UNEQUAL)
    launch(1, "-m", "megaswitch", "train", str(config), *run_options, "--train.steps=2")
    process = launch(2, str(script), kind, "train", str(config), *run_options, check=False)
    ours = process.stderr.split("ChildFailedError")[0]
    assert process.returncode != 0
    assert f"error: {message}" in ours or f"error on rank 1: {message}" in ours
    assert "GLHF" not in ours  # gloo's word for a peer that went away unannounced
