"""`megaswitch convert` and its shim for Megatron habits, as a user meets them."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.unit.cli.commands import printed, refusal, run
from tests.unit.model.hf_reference import switch

SHIM = Path(__file__).resolve().parents[3] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def hf(tmp_path):
    switch().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_there_and_back(hf, tmp_path, capsys):
    out = printed(capsys, "convert", "import-hf", hf, tmp_path / "ours", "--shard-size", "50KB")
    assert "parameters" in out
    assert "MB/s" in out
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    run("convert", "export-hf", tmp_path / "ours", tmp_path / "out", "--capacity", "7")
    assert (tmp_path / "out" / "config.json").is_file()
    assert "exists already" in refusal("convert", "import-hf", hf, tmp_path / "ours")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shard-size", "5 apples"), ("--shard-size", "3"), ("--capacity", "0"), ("--dtype", "fp8")],
)
def test_values_that_mean_nothing(option, value, tmp_path):
    with pytest.raises(click.UsageError):
        run("convert", "export-hf", tmp_path, tmp_path / "out", option, value)


def test_the_shim_knows_the_ways(hf, tmp_path):
    ours, out = tmp_path / "ours", tmp_path / "out"
    for loader, saver, source, target in (
        ("hf", "megaswitch", hf, ours),
        ("megaswitch", "hf", ours, out),
        ("hf", "hf", hf, tmp_path / "x"),
    ):
        words = ["--loader", loader, "--saver", saver, "--load-dir", source, "--save-dir", target]
        done = subprocess.run([sys.executable, SHIM, *words], capture_output=True, check=False)
        assert done.returncode == (2 if loader == saver else 0), done.stderr
    assert (out / "model.safetensors").is_file()
