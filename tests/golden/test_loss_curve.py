"""A hundred steps of a tiny run, in fp64: initialisation, data, routing, optimizer, all in one.

After a deliberate change: MEGASWITCH_RECORD=1 pytest tests/golden/test_loss_curve.py
"""

import json
import os
from pathlib import Path

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.metrics_file import read_metrics
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer

GOLDEN = Path(__file__).with_name("loss_curve.json")


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
def test_the_loss_curve_is_as_recorded(run_options, tmp_path):
    options = ["--train.steps=100", "--train.log_interval=1", "--train.valid_interval=100"]
    options += ["--model.dropout=0.05", "--optim.schedule=wsd", "--optim.decay_steps=20"]
    config = load_config(None, [*run_options, *options])
    Trainer.build(config, Mesh.start("cpu")).fit()
    keys = ("loss", "aux_loss", "grad_norm", "dropped_fraction", "valid/content_loss")
    curve = {
        key: [m[key] for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if key in m]
        for key in keys
    }
    if "MEGASWITCH_RECORD" in os.environ:
        GOLDEN.write_text(json.dumps(curve) + "\n", encoding="utf-8")
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for key in keys:
        assert len(recorded[key]) == (1 if key.startswith("valid/") else 100)
        assert curve[key] == pytest.approx(recorded[key], rel=1e-6), key
