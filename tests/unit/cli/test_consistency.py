"""All commands speak alike. New ones are found by walking the tree, so no list can be forgotten."""

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from itertools import takewhile

import click
import pytest

from megaswitch.cli import cli
from tests.policy.test_readme import parse
from tests.unit.cli.commands import ENVIRONMENT, megaswitch


def walk(command=cli, path=()):
    """(path, command) of every command that is no group."""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))
    else:
        yield path, command


COMMANDS = dict(walk())
IDS = " ".join
# What an option is for, told by a word of its help, and the one name that it may have.
NAMES = {
    "SentencePiece": "--tokenizer",
    "Machine-readable": "--json",
    "JSON lines:": "--json",
    "CUDA where": "--device",
    "picture": "--plot",
    "Draw ": "--plot",
    "decoded together": "--batch-size",
    "per forward": "--batch-size",
    "file to write": "--output",
    "files to write": "--output",
}
FLAGS = {"--json", "--verify", "--stats"}


def options(command):
    return [p for p in command.params if isinstance(p, click.Option)]


def help_of(path) -> str:
    context = click.Context(cli, info_name="megaswitch", terminal_width=100, max_content_width=100)
    command = cli
    for name in path:
        command = command.commands[name]
        context = click.Context(command, parent=context, info_name=name,
                                terminal_width=100, max_content_width=100)  # fmt: skip
    return command.get_help(context)


@pytest.mark.parametrize("path", COMMANDS, ids=IDS)
def test_every_command_has_examples_that_parse(path):
    text = COMMANDS[path].help
    start = text.index("Example")
    lines = re.findall(r"megaswitch (.+)", text[start:])
    commands = (shlex.split(line, comments=True) for line in lines)
    examples = [list(takewhile(lambda word: word not in (">", "|"), words)) for words in commands]
    assert any(tuple(words[: len(path)]) == path for words in examples)
    for words in examples:
        parse(words)


@pytest.mark.parametrize("path", [(), ("tokenizer",), ("data",), *COMMANDS], ids=IDS)
def test_help_fits(path):
    assert all(len(line) <= 100 for line in help_of(path).splitlines())


@pytest.mark.parametrize("path", COMMANDS, ids=IDS)
def test_every_option_explains_itself(path):
    for option in options(COMMANDS[path]):
        obvious = isinstance(option.type, click.Choice) or option.show_default is not False
        assert option.help or obvious, option.name


@pytest.mark.parametrize("path", COMMANDS, ids=IDS)
def test_options_have_the_common_names(path):
    for option in options(COMMANDS[path]):
        assert all(o.startswith("--") and "_" not in o for o in option.opts), option.opts
        for words, name in NAMES.items():
            if words in (option.help or ""):
                assert name in option.opts, f"{option.opts} says {words!r}: call it {name}"
        assert option.is_flag or not FLAGS & set(option.opts)


def test_one_name_means_one_kind_of_value():
    kinds = defaultdict(set)
    for command in COMMANDS.values():
        for option in options(command):
            kind = click.INT if isinstance(option.type, click.IntRange) else option.type
            kinds[option.opts[0]].add((type(kind).__name__, option.is_flag, option.nargs))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=IDS)
def test_help_imports_nothing_heavy(path):
    code = f"""
import sys
from megaswitch.cli import cli
cli.main({[*path, "--help"]!r}, prog_name="megaswitch", standalone_mode=False)
heavy = {{"torch", "numpy", "sentencepiece", "tensorboard", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "words",
    [
        ("presets",),
        ("presets", "--json"),
        ("train", "--keys"),
        ("finetune", "--tasks"),
        ("completion", "zsh"),
        ("inspect", "{run}"),
        ("inspect", "{run}", "--json"),
        ("inspect", "{run}/checkpoints", "--stats"),
        ("inspect", "{folder}/valid"),
        ("inspect", "{folder}/spm.model"),
    ],
    ids=IDS,
)
def test_other_ranks_are_silent(words, text_run, monkeypatch, capfd):
    words = [word.format(folder=text_run, run=text_run / "run") for word in words]
    monkeypatch.setenv("RANK", "1")
    cli.main(words, standalone_mode=False)
    assert capfd.readouterr() == ("", "")


def test_a_mistyped_command_line_is_said_once():
    words = ("inspect", "--no-such-option")
    first, second = megaswitch(*words), megaswitch(*words, RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "--no-such-option" in first.stderr
    assert second.stderr == ""
