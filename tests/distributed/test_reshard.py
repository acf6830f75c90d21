"""Resharding beside real ranks: they hold what was foretold, and training goes on."""

import math
from pathlib import Path

import pytest
import torch

from megaswitch.checkpoint import tensor_files
from megaswitch.checkpoint.contents import model_chunks
from megaswitch.checkpoint.manager import find_checkpoint, verify
from megaswitch.config import load_config
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.placement import placements
from megaswitch.train.trainer import Trainer
from tests.unit.cli.commands import run

CPU = torch.device("cpu")
LAYOUTS = [
    ["pp=2", "ep=2", "tp=2"],
    ["tp=4", "ep=2", "zero='full'"],
    ["tp=2", "zero='optimizer'"],
    ["ep=2", "zero='full'", "replicas=2"],
    ["pp=2", "schedule='interleaved'", "stages_per_rank=2", "zero='full'"],
    ["pp=4", "tp=2"],
]


def overrides(layout: list[str]) -> list[str]:
    return [f"--parallel.{key}" for key in layout]


def trainer_of(options: list[str], ranks: int) -> Trainer:
    config = load_config(None, options, world_size=ranks)
    mesh = Mesh.over_ranks(CPU, config.parallel) if ranks > 1 else Mesh(0, 1, CPU, None)
    return Trainer.build(config, mesh)


def blocks(options: list[str]) -> dict[str, tuple]:
    """This rank's part of each parameter."""
    weights = trainer_of(options, 8).parts.weights
    return {name: (w.block.offsets, w.block.sizes) for name, w in weights.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "·".join(layout))
def test_ranks_hold_what_is_foretold(world, run_options, layout):
    options = [
        *run_options,
        *overrides(layout),
        "--model.num_encoder_layers=3",
        "--model.num_decoder_layers=5",
        "--model.vocab_size=195",  # uneven over tp
        "--train.batch_size=32",
    ]
    held = placements(load_config(None, options, world_size=8), 8)
    real = world.run(8, blocks, options)
    for name, one in held.items():
        want: dict[tuple, list[int]] = {}
        for rank, mine in enumerate(real):
            if name in mine and math.prod(mine[name][1]):
                want.setdefault(mine[name], []).append(rank)
        found = {r: sorted(ranks) for r, ranks in one.parts.items() if math.prod(r[1])}
        assert found == want, name
    assert set().union(*real) == held.keys()


def leg(options: list[str], ranks: int) -> bool:
    """Train on from the newest checkpoint."""
    torch.set_default_dtype(torch.float64)
    complete = trainer_of(options, ranks).fit()
    torch.set_default_dtype(torch.float32)
    return complete


LEGS = [
    (8, ["pp=2", "ep=2", "tp=2"], 2),
    (8, ["tp=4", "zero='full'"], 4),
    (4, ["pp=2", "schedule='zero-bubble'", "stages_per_rank=2", "zero='optimizer'"], 2),
    (1, [], 4),
]


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_training_goes_on_from_a_resharded_checkpoint(world, run_options, tmp_path, optimizer):
    options = [
        *run_options,
        f"--optim.name={optimizer}",
        f"--optim.learning_rate={0.05 if optimizer == 'adafactor' else 0.003}",
        "--optim.clip_grad_norm=1.0",
        "--model.moe.group_size=64",
        "--train.valid_samples=8",
    ]
    if optimizer == "adafactor":
        options.append("--optim.factored_min_dim=16")
    straight = [f"--train.run_dir={tmp_path / 'straight'}", "--train.micro_batch_size=4"]
    assert world.run(1, leg, [*options, *straight, "--train.steps=8"], 1) == [True]
    for number, (ranks, layout, rows) in enumerate(LEGS, 1):
        keys = [*overrides(layout), f"--train.micro_batch_size={rows}"]
        if number > 1:
            move_to(tmp_path / "run", tmp_path / str(number), [f"--ranks={ranks}", *keys])
        steps = [f"--train.steps={2 * number}"]
        assert all(world.run(ranks, leg, [*options, *keys, *steps], ranks)), layout
    one, many = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("straight", "run"))
    losses = [[m["loss"] for m in metrics if "loss" in m] for metrics in (one, many)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


def move_to(run_dir: Path, before: Path, arguments: list[str]) -> None:
    """Replace the newest checkpoint by one that was resharded."""
    path = find_checkpoint(run_dir)
    path.rename(before)
    run("reshard", before, path, *arguments)
    verify(path)
    assert not torch.distributed.is_initialized()


def load_alone(options: list[str], path: str) -> list[int]:
    """Open files as this rank loads its experts; which ranks' files they are."""
    weights = {n: w for n, w in trainer_of(options, 8).parts.weights.items() if w.spec.is_expert}
    files, opened = set(), tensor_files.opened

    def noted(file):
        files.add(int(file.name.split("-")[1]) - 1)
        return opened(file)

    stored = tensor_files.read_headers(sorted(Path(path).glob("*.safetensors")))
    tensor_files.opened = noted
    tensor_files.read_chunks(Path(path), stored, model_chunks(weights))
    tensor_files.opened = opened
    return sorted(files)


def test_a_rank_opens_its_own_file_for_what_it_alone_holds(world, run_options, tmp_path):
    assert world.run(1, leg, [*run_options, "--train.steps=1"], 1) == [True]
    path = tmp_path / "wide"
    keys = overrides(["ep=4", "tp=2"])
    run("reshard", tmp_path / "run", path, *keys)
    options = [*run_options, *keys, f"--train.run_dir={tmp_path / 'other'}"]
    found = world.run(8, load_alone, [*options, "--train.micro_batch_size=2"], str(path))
    assert found == [[rank] for rank in range(8)]
