"""Other services get the same metrics; stand-ins have the few calls of theirs that we use."""

import sys
import types

import pytest

from megaswitch.config import load_config
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer


@pytest.fixture
def services(monkeypatch):
    """What wandb and mlflow were told."""
    told = {"wandb": [], "mlflow": []}

    class Run:
        def define_metric(self, name, *, step_metric):
            told["wandb"].append(("define", name, step_metric))

        def log(self, values):
            told["wandb"].append(values)

        def finish(self):
            told["wandb"].append("finish")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: told["wandb"].append(settings) or Run()
    mlflow = types.ModuleType("mlflow")
    mlflow.set_experiment = lambda name: told["mlflow"].append(name)
    mlflow.start_run = lambda *, run_name: told["mlflow"].append(run_name)
    mlflow.log_text = lambda text, name: told["mlflow"].append(name)
    mlflow.log_metrics = lambda values, *, step: told["mlflow"].append((step, values))
    mlflow.end_run = lambda: told["mlflow"].append("end")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return told


def test_services_get_every_metric(run_options, services):
    options = [*run_options, '--train.trackers=["wandb", "mlflow"]', "--train.steps=2"]
    Trainer.build(load_config(None, options), Mesh.start("cpu")).fit()
    settings, definition, *lines, last = services["wandb"]
    assert settings["name"] == "run"
    assert "[train]" in settings["config"]["toml"]
    assert definition == ("define", "*", "train_step")
    assert last == "finish"
    assert [line["train_step"] for line in lines] == [1, 2, 2]
    assert all("loss" in line or "valid/loss" in line for line in lines)
    _, name, text, *steps, end = services["mlflow"]
    assert (name, text, end) == ("run", "config.toml", "end")
    assert [step for step, _ in steps] == [1, 2, 2]


def test_a_service_that_is_not_installed_is_refused_in_words(run_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load_config(None, [*run_options, '--train.trackers=["wandb"]'])
    with pytest.raises(UserError, match="pip install wandb"):
        Trainer.build(config, Mesh.start("cpu"))
