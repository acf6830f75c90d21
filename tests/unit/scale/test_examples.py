"""The studies under examples/ are accepted whole."""

import re
import tomllib
from pathlib import Path

import pytest

from megaswitch.cli import cli
from megaswitch.config import known_keys, load_config
from megaswitch.scale.study import load_study
from tests.policy.test_readme import parse

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples/studies"
STUDIES = sorted(path for path in FOLDER.glob("*/study.toml") if "title" in path.read_text())
LARGE = sorted(FOLDER.glob("*/full.toml"))
# Keys of features that may be missing from this release.
OPTIONAL = {
    "model.moe.router": r"\brouter = ",
    "model.moe.exploration": r"\bexploration = ",
    "model.moe.router_precision": "router_precision",
    "train.init_from": "init_from",
}


@pytest.mark.parametrize("path", STUDIES + LARGE, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_all_runs_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    missing = OPTIONAL.keys() - set(known_keys())
    if needed := [key for key in missing if re.search(OPTIONAL[key], path.read_text())]:
        pytest.skip(f"needs {', '.join(needed)}")
    study = load_study(path.relative_to(ROOT))
    suffix = "" if path.stem == "study" else f"-{path.stem}"
    assert str(study.runs) == f"runs/studies/{path.parent.name}{suffix}"
    assert len({job.folder for job in study.jobs}) == len(study.jobs) >= 2
    for before in study.file.before:
        parse(before.run)
        if before.run[0] == "train":
            config = load_config(Path(before.run[1]), before.run[2:])
            assert before.makes.startswith(config.train.run_dir)
            assert f"step_{config.train.steps:08d}/" in before.makes


def test_studies_share_what_they_make_of_the_books():
    made = {}
    for path in STUDIES:
        for before in tomllib.loads(path.read_text()).get("before", []):
            if before["makes"].startswith("runs/studies/classics"):
                assert made.setdefault(before["makes"], before["run"]) == before["run"]


def test_the_readme_has_them_all():
    text = (FOLDER / "README.md").read_text()
    for path in STUDIES:
        assert f"[{path.parent.name}]({path.parent.name}/study.toml)" in text
    for line in re.findall(r"^megaswitch (.*)$", text, re.MULTILINE):
        words = line.split("#")[0].rstrip("\\ ").split()
        parse(words)
    assert cli.commands["study"]
