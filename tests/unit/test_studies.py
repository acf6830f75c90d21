"""The studies under examples/: their arithmetic, and that their settings are accepted."""

import importlib
import json
from pathlib import Path

import pytest

from megaswitch.config import differences, load_config

FOLDER = Path(__file__).resolve().parents[2] / "examples/studies/sparse-vs-dense"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("report")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("run")


def test_ends_are_means_over_the_last_steps(report):
    points = [(100, 8.0), (200, 4.0), (300, 3.0), (400, 1.0)]
    assert report.end(points) == 2.0  # steps 201 to 400
    assert report.smooth(points) == [(100, 8.0), (200, 6.0), (300, 3.5), (400, 2.0)]


def test_the_step_that_reaches_a_level_lies_between_two_points(report):
    points = [(100, 5.0), (200, 4.0), (300, 3.0)]
    assert report.steps_to(points, 3.25) == 275
    assert report.steps_to(points, 4.0) == 200
    assert report.steps_to(points, 6.0) == 100
    assert report.steps_to(points, 2.9) is None


def test_a_spread_needs_every_seed(report):
    assert report.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert report.spread([1.0], 1) == "1.0"
    assert report.spread([1.0, None, 3.0], 1) == "reached by 2 of 3"


def metrics_of(final: float, loss: float = 6.0, **router: float) -> list[dict[str, float]]:
    valid = {"valid/loss": final, "valid/content_loss": final + 1}
    return [
        {"step": 100, "loss": loss, **router},
        {"step": 100, "valid/loss": 5.0, "valid/content_loss": 6.0},
        {"step": 200, "loss": loss - 2, **router},
        {"step": 200, **valid},
    ]


def test_models_are_compared_seed_by_seed(report):
    dense = [metrics_of(3.0), metrics_of(2.0)]
    sparse = [
        metrics_of(2.5, loss=6.5, load_imbalance=1.5),
        metrics_of(2.25, loss=7.0, load_imbalance=2.5),
    ]
    result = report.summarize(sparse, dense)
    assert result["held_out_minus_dense"] == [-0.5, 0.25]
    assert result["steps_to_dense"] == [180, None]
    assert result["training_loss"] == [5.5, 6.0]
    assert result["training_minus_dense"] == [0.5, 1.0]
    assert result["curves"]["training_minus_dense"] == [(100, 0.75), (200, 0.75)]
    assert result["curves"]["held_out_loss"] == [(100, 5.0), (200, 2.375)]
    text = report.table({"dense": report.summarize(dense, dense), "sparse": result})
    assert "| busiest expert ÷ even share | – | 2.00 ± 0.71 |" in text
    assert (
        "| steps to the dense model's final held-out loss | 200 ± 0 | reached by 1 of 2 |" in text
    )


@pytest.mark.parametrize("task", ["T5_SPANS", "LONG_SPANS"])
def test_all_models_are_accepted_and_differ_in_experts_and_rate_alone(study, task):
    task = getattr(study, task)
    plan = study.Study(Path("corpus.txt"), Path("runs/study"), 1500, task)
    configs = {
        m.name: load_config(FOLDER / "study.toml", plan.overrides(m, m.rate, seed=1))
        for m in task.models
    }
    dense = configs.pop("dense")
    assert dense.model.moe.num_experts == 0
    for name, config in configs.items():
        experts, width = config.model.moe.num_experts, config.model.d_ff
        assert name == (f"{experts} experts" if experts else "wide dense")
        assert experts or width > dense.model.d_ff
        different = {key for key, _ in differences(dense, config)}
        assert "train.run_dir" in different
        rest = {key for key in different if not key.startswith("model.moe.")}
        allowed = {"model.preset", "train.run_dir", "optim.learning_rate"}
        assert rest <= allowed | (set() if experts else {"model.d_ff"})


@pytest.mark.parametrize("name", ["results.json", "results-long-spans.json"])
def test_the_readme_holds_the_table_of_the_results(report, name):
    models = json.loads((FOLDER / name).read_text(encoding="utf-8"))["models"]
    assert report.table(models) in (FOLDER / "README.md").read_text(encoding="utf-8")
