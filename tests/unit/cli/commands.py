"""Commands run in this process, which is quick, and in one of their own, which is real."""

import json
import os
import subprocess
import sys

import pytest

from megaswitch.cli import cli
from megaswitch.cli.common import explain
from megaswitch.log import UserError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments) -> None:
    """Run a command as `megaswitch` does, up to the handling of errors."""
    cli.main([str(argument) for argument in arguments], standalone_mode=False)


def printed(capsys, *arguments) -> str:
    run(*arguments)
    return capsys.readouterr().out


def report(capsys, *arguments) -> dict:
    """What a command says with --json, read as strictly as other languages do."""

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(printed(capsys, *arguments, "--json"), parse_constant=no_constants)


def refusal(*arguments) -> str:
    """The one-paragraph error of a command that fails as it should."""
    with pytest.raises((UserError, OSError)) as caught:
        run(*arguments)
    message = explain(caught.value)
    assert "\n\n" not in message
    return message


def start(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megaswitch", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
    )


def megaswitch(*arguments, **environment) -> subprocess.CompletedProcess:
    """Run a command in its own process to its end."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
