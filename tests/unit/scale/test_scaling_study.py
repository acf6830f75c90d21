"""The scaling study under examples/: its tables are those of its numbers, and those of plans."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from megaswitch.config import load_config
from megaswitch.scale.estimate import estimate
from megaswitch.scale.hardware import load_hardware
from megaswitch.scale.planned import planned_toml
from megaswitch.scale.profiles import profiles_of
from megaswitch.train.placement import row_lengths

FOLDER = Path(__file__).resolve().parents[3] / "examples/studies/scaling"
RESULTS = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def module(monkeypatch):
    """Loads a file of the study."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"scaling_{name}", FOLDER / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def test_the_tables_are_those_of_the_results(module):
    text = (FOLDER / "tables.md").read_text(encoding="utf-8")
    found = module("tables").tables(RESULTS)
    assert len(found) >= 12
    for title, table in found.items():
        assert f"## {title}\n\n{table}" in text


def test_what_the_readme_shows_is_in_the_tables():
    tables = (FOLDER / "tables.md").read_text(encoding="utf-8")
    rows = [
        line
        for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and "tokens/s" not in line
    ]
    assert len(rows) > 10
    assert not [row for row in rows if row not in tables]


def test_parts_of_a_step_make_the_step():
    points = [p for kind in ("weak", "strong") for ps in RESULTS[kind].values() for p in ps]
    fitting = [p for p in points if "seconds" in p]
    assert len(fitting) > 20
    for point in fitting:
        assert sum(point["seconds"].values()) == pytest.approx(point["step"], rel=1e-2)
        assert point["memory"] <= 80e9
    assert {p["world"] for p in points} >= {8, 4096}


PLANNED = sorted((FOLDER / "planned").glob("*.toml"))


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_planned_runs_are_accepted_and_started_with_their_nodes(path):
    world = int(re.match(r"# Planned for (\d+) ranks", path.read_text(encoding="utf-8"))[1])
    load_config(path, world_size=world)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    script = f"sbatch --nodes={world // 8} examples/slurm/pretrain.sbatch"
    assert f"{script} {path.relative_to(FOLDER.parents[2])}" in text


@pytest.mark.parametrize("name", ["switch-base-128"])
def test_planned_runs_are_what_plans_say_today(name):
    path = FOLDER / f"planned/{name}.toml"
    text = path.read_text(encoding="utf-8")
    world = int(re.match(r"# Planned for (\d+) ranks", text)[1])
    config, hardware = load_config(path, world_size=world), load_hardware("h100")
    profiles = profiles_of(config, hardware)
    profiles(1, False)  # the first that a search makes, whose update serves all others
    one = estimate(config, world, row_lengths(config), profiles, hardware)
    assert planned_toml(one, hardware) == text


@pytest.mark.long
def test_results_are_those_of_plans_today(module):
    run = module("run")
    study = run.Study(load_hardware("h100"))
    for point in RESULTS["weak"]["switch-base-128"][:2]:
        found = run.point_of(study.plan("switch-base-128", point["world"], point["batch"]))
        assert found == {key: point[key] for key in found}
    assert study.paper() == RESULTS["paper"]
