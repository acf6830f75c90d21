"""`megaswitch reshard` as a command: plans without data, words, and Megatron's habits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaswitch.checkpoint.manager import find_checkpoint, read_config, verify
from megaswitch.cli.reshard import _Bytes
from tests.unit.cli.commands import ENVIRONMENT, megaswitch, printed, refusal, report, start

TOOL = Path(__file__).resolve().parents[3] / "tools" / "reshard_checkpoint.py"
SWITCH_C = 1_571_327_875_360


def test_switch_c_is_planned_to_the_byte(capsys, tmp_path):
    keys = ["--parallel.ep=256", "--parallel.tp=2", "--disk-bandwidth=1GB/s"]
    begin = time.process_time()
    found = report(capsys, "reshard", "--dry-run", "switch-c-2048", tmp_path / "out", *keys)
    assert time.process_time() - begin < 60
    assert found["parameters"] == SWITCH_C
    assert len(found["files"]) == 512
    # Of Adafactor, a row and a column for each matrix: 2048 experts × 30 layers × 2 matrices.
    factors = 2048 * 30 * 2 * (6144 + 2080) * 4
    rest = found["bytes"] - 4 * SWITCH_C - factors
    assert 0 < rest < 1e9  # states of what is no expert
    sizes = [file["bytes"] for file in found["files"]]
    assert sum(sizes) == found["bytes"]
    assert max(sizes) < 1.02 * min(sizes)
    assert found["seconds"] == pytest.approx(3 * found["bytes"] / 1e9)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_a_checkpoint_says_what_will_be_written(text_run, capsys, tmp_path):
    keys = ["--parallel.ep=2", "--parallel.tp=2"]
    out = tmp_path / "out"
    plan = report(capsys, "reshard", "--dry-run", text_run / "run", out, *keys)
    assert plan["disk_bandwidth"] > 0
    done = report(capsys, "reshard", text_run / "run", out, *keys)
    assert done["bytes"] == plan["bytes"]
    for entry in plan["files"]:
        header = (out / entry["file"]).stat().st_size - entry["bytes"]
        assert 0 < header < 100_000
    assert "expected time" in printed(capsys, "reshard", "--dry-run", out, "x", *keys)


def test_a_killed_command_goes_on(text_run, tmp_path):
    out = tmp_path / "out"
    process = start("reshard", text_run / "run", out, "--parallel.ep=4", "--parallel.tp=2")
    aside = tmp_path / "out.resharding"
    while process.poll() is None and not (aside / "journal.jsonl").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert out.exists() == (process.returncode == 0)
    if not out.exists():
        assert not (aside / "state.json").exists()
        keys = ["--parallel.ep=4", "--parallel.tp=2"]
        assert megaswitch("reshard", text_run / "run", out, *keys).returncode == 0
    verify(out)
    assert not aside.exists()


def test_megatrons_options_are_understood(text_run, tmp_path):
    source = find_checkpoint(text_run / "run")
    words = ["--load-dir", source, "--save-dir", tmp_path / "out"]
    words += ["--target-tensor-parallel-size=2", "--target-expert-parallel-size", "2"]
    command = [sys.executable, TOOL, *words]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True)
    layout = read_config(tmp_path / "out").parallel
    assert (layout.tp, layout.ep, layout.pp) == (2, 2, 1)
    wrong = subprocess.run(command[:4], env=ENVIRONMENT, capture_output=True, text=True)
    assert wrong.returncode
    assert "usage" in wrong.stderr


def test_torchrun_is_not_needed(text_run, tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "without torchrun" in refusal("reshard", text_run / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5kB", 1500), ("64", 64)]
)
def test_sizes_have_units(text, size):
    assert _Bytes().convert(text, None, None) == size


@pytest.mark.parametrize(
    "arguments",
    [["--max-memory", "2 potatoes"], ["--max-memory", "-1GiB"], ["--experts", "3-1"]],
)
def test_sizes_and_numbers_that_are_none_are_refused(text_run, tmp_path, arguments):
    done = megaswitch("reshard", text_run / "run", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert "write it as" in done.stderr


def test_a_report_is_json_alone(text_run, tmp_path):
    done = megaswitch("reshard", text_run / "run", tmp_path / "out", "--json", "--no-optimizer")
    assert json.loads(done.stdout)["files"] == 1
