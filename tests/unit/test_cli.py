"""The commands as a user meets them: what they print, and what they say of bad input."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaswitch.checkpoint.manager import checkpoints
from megaswitch.metrics_file import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def megaswitch(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "megaswitch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
        **options,
    )


def refused(process) -> str:
    """The one-paragraph error of a command that failed as it should."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    message = process.stderr[process.stderr.index("error: ") :].strip()
    assert "\n\n" not in message
    return message


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("")
    return path


def test_presets_as_json():
    rows = {row["name"]: row for row in json.loads(megaswitch("presets", "--json").stdout)}
    c = rows["switch-c-2048"]
    assert c["total_parameters"] == 1_571_327_875_360
    assert c["num_heads"] == 30
    for name, total, flops in (
        ("switch-base-8", 619_339_008, 124e9),
        ("switch-large-128", 26_309_291_008, 425e9),
        ("switch-xxl-128", 394_675_073_024, 6.3e12),
        ("t5-base", 222_903_552, 124e9),
        ("t5-v1_1-xxl", 11_135_332_352, 6.3e12),
    ):
        assert rows[name]["total_parameters"] == total
        assert rows[name]["forward_flops_per_sequence"] == pytest.approx(flops, rel=0.01)
        assert rows[name]["active_parameters"] <= total


def test_presets_as_a_table():
    lines = megaswitch("presets").stdout.splitlines()
    line = next(line for line in lines if "switch-xxl-128 " in line)
    assert "394,675,073,024" in line
    assert "6,260.2" in line


def test_train_lists_its_keys():
    lines = megaswitch("train", "--keys").stdout.splitlines()
    (line,) = (line for line in lines if "model.moe.jitter" in line)
    assert "0.01" in line
    assert "router input is multiplied by" in line


def test_a_missing_config_is_named(tmp_path):
    assert "no.toml does not exist" in refused(megaswitch("train", tmp_path / "no.toml"))


def test_all_problems_come_at_once(config_file):
    message = refused(
        megaswitch(
            "train", config_file, "--model.d_modle=3", "--optim.beta1=0.5", "--train.steps=x"
        )
    )
    assert "3 problems in the configuration" in message
    assert "did you mean model.d_model?" in message
    assert "optim.beta1=0.5 would be ignored because optim.name='adafactor'" in message
    assert "train.steps='x' is wrong" in message


def test_no_data_is_said_with_the_remedy(config_file):
    assert "--data.train=PREFIX" in refused(megaswitch("train", config_file))


def test_a_missing_corpus_is_named(config_file, run_options, tmp_path):
    options = [*run_options, f"--data.train={tmp_path / 'none'}"]
    assert "none" in refused(megaswitch("train", config_file, *options))


@pytest.mark.parametrize("missing", [10, 30, 200])
def test_a_truncated_index_is_refused(config_file, run_options, corpus, tmp_path, missing):
    for suffix in (".bin", ".idx", ".meta.json"):
        (tmp_path / f"cut{suffix}").write_bytes(corpus.with_name(corpus.name + suffix).read_bytes())
    index = tmp_path / "cut.idx"
    index.write_bytes(index.read_bytes()[:-missing])
    options = [*run_options, f"--data.train={tmp_path / 'cut'}"]
    assert "cut.idx" in refused(megaswitch("train", config_file, *options))


def test_an_index_that_lies_about_its_length_is_refused(config_file, run_options, corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"lie{suffix}").write_bytes(corpus.with_name(corpus.name + suffix).read_bytes())
    index = bytearray((tmp_path / "lie.idx").read_bytes())
    struct.pack_into("<Q", index, 18, 2**61)
    (tmp_path / "lie.idx").write_bytes(index)
    options = [*run_options, f"--data.train={tmp_path / 'lie'}"]
    assert "lie.idx" in refused(megaswitch("train", config_file, *options))


def test_an_empty_corpus_is_refused(tmp_path, corpus):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    output = tmp_path / "spm.model"
    message = refused(megaswitch("tokenizer", "train", empty, "--output", output))
    assert "the inputs hold no usable text" in message
    assert not output.exists()


def test_a_vocabulary_that_is_too_small_is_refused(config_file, run_options):
    message = refused(megaswitch("train", config_file, *run_options, "--model.vocab_size=150"))
    assert "150" in message
    assert "192" in message


def test_divergence_ends_the_run_and_keeps_the_checkpoint(config_file, run_options, tmp_path):
    assert megaswitch("train", config_file, *run_options, "--train.steps=2").returncode == 0
    # Every step multiplies the matrices by some -5e8, so they leave the range of fp32.
    wild = ["--optim.weight_decay=1e10", "--optim.warmup_steps=0"]
    wild += [f"--train.run_dir={tmp_path / 'wild'}", "--checkpoint.interval=1"]
    message = refused(megaswitch("train", config_file, *run_options, *wild))
    assert "both must be finite" in message
    assert "newest checkpoint" in message
    folder = tmp_path / "wild" / "checkpoints"
    assert checkpoints(folder)
    assert not list(folder.glob("*.unfinished"))


def limit_file_size(size: int) -> None:
    """Let writes beyond `size` bytes fail with an error, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_earlier_checkpoints_intact(config_file, run_options, tmp_path):
    assert megaswitch("train", config_file, *run_options, "--train.steps=2").returncode == 0
    folder = tmp_path / "run" / "checkpoints"
    (earlier,) = checkpoints(folder)
    before = {p.name: p.read_bytes() for p in earlier.iterdir()}
    process = megaswitch(
        "train", config_file, *run_options, preexec_fn=lambda: limit_file_size(50_000)
    )
    message = refused(process)
    assert "step_00000012 could not be written" in message
    assert "Earlier checkpoints are intact" in message
    assert [p.name for p in folder.iterdir()] == [earlier.name]
    assert {p.name: p.read_bytes() for p in earlier.iterdir()} == before
    assert megaswitch("train", config_file, *run_options).returncode == 0


def test_a_damaged_checkpoint_is_not_resumed(config_file, run_options, tmp_path):
    assert megaswitch("train", config_file, *run_options, "--train.steps=2").returncode == 0
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    message = refused(megaswitch("train", config_file, *run_options))
    assert "does not match its checksum" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(config_file, run_options, tmp_path, number):
    command = [sys.executable, "-m", "megaswitch", "train", str(config_file), *run_options]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen([*command, "--train.steps=100000"], env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 130
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    done = int(saved.name.removeprefix("step_"))
    resumed = subprocess.run(
        [*command, f"--train.steps={done + 2}"], env=ENVIRONMENT, capture_output=True, check=True
    )
    assert b"resuming" in resumed.stderr
    steps = [m["step"] for m in read_metrics(metrics) if "loss" in m]
    assert steps == list(range(1, done + 3))
