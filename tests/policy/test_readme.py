"""What README shows is true: its commands exist, its configurations load."""

import re
import shlex
from pathlib import Path

import click
import pytest

from megaswitch.cli import cli
from megaswitch.config import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.split("\n")
]


def parse(words: list[str]) -> None:
    """Let click parse a command line without running it."""
    group: click.Command = cli
    while isinstance(group, click.Group):
        assert words[0] in group.commands, f"no command {words[0]}"
        group, words = group.commands[words[0]], words[1:]
    group.make_context(group.name, words)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "megaswitch " in c])
def test_commands_exist(command):
    words = shlex.split(command)
    parse(words[words.index("megaswitch") + 1 :])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "toml"])
def test_configurations_load(text, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(text)
    load_config(path, world_size=8)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.toml")), ids=lambda p: p.name)
def test_examples_load(path):
    load_config(path, world_size=2)


def test_what_the_demo_suggests_is_accepted():
    demo = (ROOT / "examples/demo.py").read_text(encoding="utf-8")
    suggestions = re.findall(r"megaswitch train (\S+) (--[^\\]*)", demo)
    assert suggestions
    for path, overrides in suggestions:
        load_config(ROOT / path, overrides.split())


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
