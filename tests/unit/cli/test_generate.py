"""`megaswitch generate` as a user meets it."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from megaswitch.config import load_config
from megaswitch.data.tokenizer import train_tokenizer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer
from tests.unit.cli.commands import ENVIRONMENT, printed, refusal
from tests.unit.cli.commands import run as run_command

PROMPTS = ["the <extra_id_0> cat sat", "a dog <extra_id_0> on <extra_id_1> mat", "no blank here"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    """The run folder of an untrained model over real words."""
    folder = tmp_path_factory.mktemp("generate")
    words = "the cat sat on a mat and one dog ran far over hills to see it all again"
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{words} {i}" for i in range(200)))
    train_tokenizer([text], folder / "spm.model", vocab_size=400, character_coverage=1.0, threads=1)
    overrides = [
        "--model.preset=switch-tiny",
        "--model.vocab_size=400",
        "--model.moe.num_experts=2",
        f"--data.train={folder / 'text'}",
        f"--data.tokenizer={folder / 'spm.model'}",
        "--data.encoder_length=32",
        f"--train.run_dir={folder / 'run'}",
        "--train.steps=1",
        "--train.batch_size=16",
        "--train.micro_batch_size=16",
    ]
    run_command(
        "preprocess", text, "--tokenizer", folder / "spm.model", "--output", folder / "text",
        "--workers", 1,
    )  # fmt: skip
    assert Trainer.build(load_config(None, overrides), Mesh.start("cpu")).fit()
    return folder / "run"


@pytest.fixture
def generate(run, capsys):
    """Answers of the command, one a line."""
    return lambda *arguments: printed(
        capsys, "generate", run, "--max-tokens", 12, *arguments
    ).splitlines()


def type_in(monkeypatch, text: str) -> None:
    """Make `text` the standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_arguments_a_file_and_standard_input_give_the_same(generate, tmp_path, monkeypatch):
    expected = generate(*PROMPTS)
    assert len(expected) == 3
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    records = tmp_path / "prompts.jsonl"
    records.write_text("\n".join(json.dumps({"inputs": p}) for p in PROMPTS))
    assert generate("--input", path) == expected
    assert generate("--input", records, "--batch-size", 1) == expected
    for arguments in ([], ["--input", "-"]):
        type_in(monkeypatch, path.read_text())
        assert generate(*arguments) == expected


def test_an_output_file_appears_whole(generate, tmp_path):
    output = tmp_path / "answers.jsonl"
    assert generate(*PROMPTS, "--json", "--output", output, "--beams", 2) == []
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["prompt"] for a in answers] == PROMPTS
    assert answers[2]["text"] == answers[2]["output"]
    assert all(a["score"] < 0 for a in answers)
    assert [p.name for p in tmp_path.iterdir()] == ["answers.jsonl"]


def test_sampling_repeats_itself_and_follows_the_seed(generate):
    options = ["--temperature", 1, "--top-p", 0.9, "--raw", *PROMPTS]
    first = generate(*options, "--seed", 1)
    assert generate(*options, "--seed", 1, "--batch-size", 2) == first
    assert generate(*options, "--seed", 2) != first


def test_ranks_share_the_work_and_one_prints(run, generate):
    expected = generate("--batch-size", 1, *PROMPTS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megaswitch",
         "generate", str(run), "--max-tokens", "12", "--batch-size", "1", *PROMPTS],
        capture_output=True, text=True, timeout=180, env=ENVIRONMENT, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == expected


def test_ranks_share_one_standard_input_and_one_prompt(run, generate):
    """Also where rank 0 could stream to a terminal, and with fewer prompts than ranks."""
    (expected,) = generate(PROMPTS[2])
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "megaswitch", "generate", str(run), "--max-tokens", "12"],
        stdin=subprocess.PIPE, stdout=follower, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(follower)
    process.stdin.write(PROMPTS[2].encode())
    process.stdin.close()
    shown = _converse(leader, b"")
    assert process.wait(60) == 0
    assert _letters(expected) == _letters(shown)


def test_closed_standard_streams_are_no_crash(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "holds no prompt" in refusal("generate", run)
    monkeypatch.setattr(sys, "stdout", None)
    run_command("generate", run, "--max-tokens", 2, "x")


def test_a_terminal_gets_the_answer_as_it_grows(run, generate):
    """One prompt on the command line, then a conversation, on a pseudo-terminal."""
    (expected,) = generate("no blank here")
    for arguments, typed in (([PROMPTS[2]], b""), ([], PROMPTS[2].encode() + b"\n\x04")):
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "megaswitch", "generate", str(run), "--max-tokens", "12",
             *arguments],
            stdin=follower, stdout=follower, stderr=subprocess.PIPE, env=ENVIRONMENT,
        )  # fmt: skip
        os.close(follower)
        shown = _converse(leader, typed)
        assert process.wait(60) == 0
        assert _letters(expected) in _letters(shown)


def _letters(text: str) -> str:
    """An untrained model also writes control characters, which a terminal changes."""
    return "".join(c for c in text if c.isalnum() or c in "<>_")


def _converse(leader, typed: bytes) -> str:
    """All that appears; `typed` is sent when something asks for it."""
    shown = b""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        if typed and b"> " in shown:
            os.write(leader, typed)
            typed = b""
        if select.select([leader], [], [], 0.2)[0]:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not piece:
                break
            shown += piece
    os.close(leader)
    return shown.decode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--beams", "0"], "beams is 0"),
        (["--top-k", "5"], "set a temperature"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--input", "nowhere.txt"], "1 PROMPTS were given"),
        (["--output", "/nowhere/answers.txt"], "there is no folder /nowhere"),
        (["--tokenizer", "nowhere.model"], "cannot read the tokenizer"),
        (["--output", "/dev/null"], "is a folder or device"),
        (["--output", "/tmp"], "is a folder or device"),
        (["--raw", "--json"], "leave --raw out"),
        (["--max-tokens", 1 << 20, "--beams", 1 << 20], "not enough memory"),
        (["a <extra_id_100> b"], "prompt 1 has the blank <extra_id_100>"),
        (["a\udcff"], "prompt 1 is not UTF-8"),
    ],
)
def test_bad_options_are_refused(run, arguments, words):
    assert words in refusal("generate", run, *arguments, "prompt")


def test_a_blank_of_thousands_of_digits_is_text(generate):
    blank = f"<extra_id_{'9' * 5000}>"
    assert len(generate(blank)) == 1


def test_bad_prompts_are_refused(run, tmp_path, monkeypatch):
    type_in(monkeypatch, "")
    assert "holds no prompt" in refusal("generate", run)
    assert "no such input file" in refusal("generate", run, "--input", "nowhere.txt")
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n")
    assert "'inputs' or 'text'" in refusal("generate", run, "--input", path)


def test_a_missing_checkpoint_and_another_vocabulary_are_refused(run, tmp_path):
    assert "neither a checkpoint nor a run" in refusal("generate", tmp_path, "x")
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"other words {'abcdefghij'[i % 10] * (1 + i % 7)} {i}" for i in range(300))
    )
    other = tmp_path / "other.model"
    train_tokenizer([text], other, vocab_size=410, character_coverage=1.0, threads=1)
    assert "410 ids" in refusal("generate", run, "--tokenizer", other, "x")
    train_tokenizer([text], other, vocab_size=390, character_coverage=1.0, threads=1)
    assert "leave --tokenizer out" in refusal("generate", run, "--tokenizer", other, "x")
