"""A run that changes its layout again and again is the same run."""

from pathlib import Path

import pytest
import torch

from megaswitch.checkpoint.manager import find_checkpoint, load_model_tensors
from megaswitch.config import load_config
from megaswitch.metrics_file import read_metrics
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer

# Ranks, layout and rows per forward of each leg of four steps; the last is one process.
LEGS = [
    (8, ["pp=2", "ep=2", "tp=2"], 2),
    (8, [], 1),
    (8, ["ep=4", "tp=2", "ep_chunks=1"], 2),
    (8, ["pp=4"], 1),
    (4, ["zero='full'", "ep=2"], 2),
    (4, ["pp=2", "schedule='zero-bubble'", "stages_per_rank=2", "zero='optimizer'"], 2),
    (8, ["tp=4", "zero='full'"], 4),
    (1, [], 4),
]
STEPS = 4


def leg(ranks: int, overrides: list[str]) -> bool:
    """Train on from the newest checkpoint; True if what was loaded is what was stored."""
    torch.set_default_dtype(torch.float64)
    config = load_config(None, overrides, world_size=ranks)
    cpu = torch.device("cpu")
    alone = Mesh(0, 1, cpu, None)
    trainer = Trainer.build(config, Mesh.over_ranks(cpu, config.parallel) if ranks > 1 else alone)
    equal = True
    if trainer.state.step:
        whole = SwitchTransformer(config.model)
        load_model_tensors(find_checkpoint(Path(config.train.run_dir)), whole)
        stored = dict(whole.named_parameters())
        equal = all(
            torch.equal(w.local, stored[name][w.block.slices])
            for name, w in trainer.parts.weights.items()
        )
    complete = trainer.fit()
    torch.set_default_dtype(torch.float32)
    return equal and complete


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_run_may_change_its_layout_between_any_two_steps(world, run_options, tmp_path, optimizer):
    rate = "0.05" if optimizer == "adafactor" else "0.003"
    options = [
        *run_options,
        "--model.dropout=0.1",
        "--model.moe.group_size=64",
        f"--optim.name={optimizer}",
        f"--optim.learning_rate={rate}",
        "--optim.clip_grad_norm=1.0",
        "--train.valid_interval=4",
        "--train.valid_samples=6",
    ]
    if optimizer == "adafactor":
        options.append("--optim.factored_min_dim=16")
    total = STEPS * len(LEGS)
    straight = [f"--train.run_dir={tmp_path / 'straight'}", f"--train.steps={total}"]
    assert world.run(1, leg, 1, [*options, *straight, "--train.micro_batch_size=4"]) == [True]
    for number, (ranks, layout, rows) in enumerate(LEGS, 1):
        keys = [f"--parallel.{key}" for key in layout]
        steps = [f"--train.steps={STEPS * number}", f"--train.micro_batch_size={rows}"]
        assert all(world.run(ranks, leg, ranks, [*options, *keys, *steps])), layout
    one, many = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("straight", "run"))
    assert [m["step"] for m in one] == [m["step"] for m in many]
    compared = 0
    for a, b in zip(one, many, strict=True):
        for key in a.keys() & {"loss", "aux_loss", "grad_norm", "dropped_fraction", "valid/loss"}:
            assert b[key] == pytest.approx(a[key], rel=1e-8), (a["step"], key)
            compared += 1
    assert compared > 4 * total
