"""The example layouts fit the ranks that they state, and their README names them all."""

import re
import shlex
from pathlib import Path

import pytest

from megaswitch.cli import cli
from megaswitch.config import RunConfig, load_config
from tests.policy.test_readme import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "parallel"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.glob("*.toml"))
ROWS = {
    name: int(ranks)
    for name, ranks in re.findall(r"^\| [^|]+ \| \[(.+)\]\(\1\) \| (\d+) \|", README, re.MULTILINE)
}


def stated(path: Path) -> tuple[int, RunConfig]:
    """The ranks that a file's own command starts, and the configuration, which fits them."""
    command = re.search(
        r"^#   torchrun --nproc-per-node (\d+) -m megaswitch train (\S+)$",
        path.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert command, f"{path} does not say how to start it"
    assert ROOT / command[2] == path
    ranks = int(command[1])
    return ranks, load_config(path, world_size=ranks)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_layout_fits_the_ranks_that_it_states(path):
    ranks, config = stated(path)
    assert ranks in (2, 4, 8)
    assert ROWS[path.name] == ranks
    assert config.train.run_dir == f"runs/{path.stem}"


def test_the_readme_names_each_file_once():
    assert set(ROWS) == {path.name for path in FILES}
    assert README.count(".toml](") == len(FILES)


def test_every_kind_of_layout_has_a_file():
    layouts = [stated(path)[1].parallel for path in FILES]
    assert {p.zero for p in layouts} == {"none", "optimizer", "full"}
    assert {p.schedule for p in layouts if p.pp > 1} == {"1f1b", "interleaved", "zero-bubble"}
    assert any(p.replicas > 1 for p in layouts)
    for axis in ("pp", "ep", "tp"):
        assert any(getattr(p, axis) > 1 for p in layouts), axis
    assert any(p.pp == p.ep == p.tp == 2 for p in layouts)


@pytest.mark.parametrize(
    "command", re.findall(r"^megaswitch (.+)$", README, re.MULTILINE), ids=lambda c: c[:20]
)
def test_commands_exist(command):
    words = shlex.split(command)
    parse(words)
    if words[0] == "doctor":  # quick enough to run
        cli.main(words, standalone_mode=False)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_all_files_train_on_the_same_data(path):
    # The README's commands write these.
    data = stated(path)[1].data
    assert data.tokenizer is not None
    assert f"--output {data.tokenizer} " in README
    for split in ("train", "valid"):
        prefix = getattr(data, split).removesuffix(f"_{split}")
        assert f"--output {prefix} " in README
