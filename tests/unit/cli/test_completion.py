"""What a shell is offered when a user presses Tab."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from megaswitch.cli import cli
from megaswitch.config import known_keys
from megaswitch.presets import PRESETS
from tests.unit.cli.commands import ENVIRONMENT, printed

# The package has the command under this name.
completion = sys.modules["megaswitch.cli.completion"]
SHELLS = ("bash", "zsh", "fish")
# bash alone takes words apart at "=".
PIECES = {
    "bash": lambda word: word.replace("=", " = ").split(),
    "zsh": str.split,
    "fish": str.split,
}


def offers(monkeypatch, line: str, shell: str = "bash") -> list[tuple[str, str]]:
    """(type, value) of each candidate at the end of a command line."""
    words = [piece for word in line.split(" ") for piece in PIECES[shell](word) or [""]]
    place = words[-1] if shell == "fish" else str(len(words) - 1)
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", place)
    program = completion._SHELLS[shell](cli, {}, "megaswitch", "_MEGASWITCH_COMPLETE")
    items = program.get_completions(*program.get_completion_args())
    return [(item.type, item.value) for item in items]


def values(*arguments) -> list[str]:
    return [value for _, value in offers(*arguments)]


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_are_offered(monkeypatch, shell):
    assert values(monkeypatch, "megaswitch in", shell) == ["inspect"]


@pytest.mark.parametrize("shell", SHELLS)
def test_sections_then_keys_are_offered(monkeypatch, shell):
    found = offers(monkeypatch, "megaswitch train run.toml --", shell)
    assert ("key", "--model.") in found
    assert ("plain", "--keys") in found
    assert not any(value.startswith("--model.d") for _, value in found)
    found = values(monkeypatch, "megaswitch train run.toml --model.moe.", shell)
    assert found == [f"--{key}=" for key in known_keys() if key.startswith("model.moe.")]
    assert values(monkeypatch, "megaswitch train run.toml --m", shell)[0] == "--model.preset="


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--model.preset=switch-l", [name for name in PRESETS if name.startswith("switch-l")]),
        ("--optim.name=", ["adafactor", "adamw"]),
        ("--train.activation_checkpointing=", ["false", "true", "selective"]),
        ("--model.moe.capacity_mode=d", ["dropless"]),
        ("--train.steps=", []),
        ("--train.rampup_batch_size=", []),
        ("--no.such=", []),
        ("--model=", []),
    ],
)
def test_values_are_offered(monkeypatch, shell, word, expected):
    lead = "" if shell == "bash" else word.partition("=")[0] + "="
    found = values(monkeypatch, f"megaswitch train run.toml --train.steps=5 {word}", shell)
    assert found == [lead + value for value in expected]


@pytest.mark.parametrize("shell", SHELLS)
def test_files_of_values_are_offered(monkeypatch, tmp_path, shell):
    for name in ("a.bin", "a.idx", "spm.model", ".hidden.idx"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)

    def found(word):
        lead = "" if shell == "bash" else word.partition("=")[0] + "="
        line = f"megaswitch train run.toml {word}"
        return [
            (kind, value.removeprefix(lead)) for kind, value in offers(monkeypatch, line, shell)
        ]

    assert found("--data.train=") == [("plain", "a"), ("key", "runs/")]
    assert found(f"--data.valid={tmp_path}/a") == [("plain", f"{tmp_path}/a")]
    assert found("--data.tokenizer=s") == [("plain", "spm.model")]
    assert found("--train.run_dir=r") == [("key", "runs/")]
    assert found("--train.run_dir=nowhere/") == []


def test_the_keys_of_files_exist():
    assert set(completion._FILES) <= set(known_keys())


@pytest.mark.parametrize(
    "line", ["megaswitch inspect ", "megaswitch train ", "megaswitch inspect x --tokenizer "]
)
def test_paths_are_left_to_the_shell(monkeypatch, line):
    assert offers(monkeypatch, line) == [("file", "")]


def test_choices_are_offered(monkeypatch):
    assert values(monkeypatch, "megaswitch completion ") == list(SHELLS)


def test_keys_of_an_unknown_script_are_plain(monkeypatch):
    shell = completion._SHELLS["bash"](cli, {}, "megaswitch", "_MEGASWITCH_COMPLETE")
    item = completion.CompletionItem("--model.", "key")
    assert shell.format_completion(item) == "key,--model."
    monkeypatch.setattr(completion._Bash, "source_template", "")
    assert shell.format_completion(item) == "plain,--model."


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_knows_keys(capsys, shell):
    script = printed(capsys, "completion", shell)
    assert f"_MEGASWITCH_COMPLETE={shell}_complete" in script
    assert "key" in script
    help_text = cli.commands["completion"].get_help(click.Context(cli.commands["completion"]))
    assert f"megaswitch completion {shell}" in help_text


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_well_formed(capsys, shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    script = printed(capsys, "completion", shell)
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes(tmp_path):
    """The script in a real bash, with the program that this Python has installed."""
    program = Path(sys.executable).with_name("megaswitch")
    if not program.exists():
        pytest.skip("the console script is not installed")
    lines = f"""
        PATH={program.parent}:$PATH
        eval "$(megaswitch completion bash)"
        compopt() {{ echo "compopt $2"; }}
        COMP_WORDS=(megaswitch train run.toml --model.preset = switch-xxl-6); COMP_CWORD=5
        _megaswitch_completion megaswitch; echo "${{COMPREPLY[@]}}"; COMPREPLY=()
        COMP_WORDS=(megaswitch train run.toml --checkpoint.i); COMP_CWORD=3
        _megaswitch_completion megaswitch; echo "${{COMPREPLY[@]}}"
    """
    process = subprocess.run(
        ["bash", "--norc"], input=lines, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines() == [
        "switch-xxl-64-paper",
        "compopt nospace",
        "--checkpoint.interval=",
    ]


@pytest.mark.parametrize(
    "words",
    ["megaswitch ", "megaswitch train r.toml --model.preset=", "megaswitch train r.toml --op"],
)
def test_completing_is_quick(words):
    """Nothing heavy is imported: a time limit would only measure the machine."""
    code = """
import sys
from megaswitch.cli import cli
try:
    cli.main(prog_name="megaswitch")
except SystemExit:
    pass
heavy = {"torch", "numpy", "sentencepiece", "tensorboard", "rich.table"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = ENVIRONMENT | {
        "_MEGASWITCH_COMPLETE": "zsh_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip(), os.linesep
