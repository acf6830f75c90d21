"""`megaswitch inspect` finds out what a path is, and shows tokenizers."""

import pytest

from megaswitch.cli.inspect import find_kind
from megaswitch.data.tokenizer import Tokenizer
from tests.unit.cli.commands import megaswitch, printed, refusal, report


def test_a_tokenizer(text_run, capsys):
    path = text_run / "spm.model"
    found = report(capsys, "inspect", path)
    tokenizer = Tokenizer(path)
    assert found["vocab_size"] == 500
    assert found["pieces"] == 400
    assert found["special"] == {"pad": 0, "eos": 1, "unk": 2}
    assert found["sentinels"] == {"count": 100, "first": 499, "last": 400}
    assert found["byte_fallback"]
    assert found["sha256"] == tokenizer.sha256
    assert found["example"]["ids"] == tokenizer.encode(found["example"]["text"])
    assert len(found["first_pieces"]) == 12
    assert "<extra_id_0> is 499, <extra_id_99> is 400" in printed(capsys, "inspect", path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "does not exist"),
        ("a.safetensors", "give the folder of the checkpoint"),
        ("a.toml", "`megaswitch train` takes it"),
        ("a.bin", "pickles are never opened"),
        ("a.pt", "pickles are never opened"),
        ("a.jsonl", "`megaswitch preprocess` makes token files"),
        ("a.model", "not a SentencePiece model"),
        ("a", "not a SentencePiece model"),
        (".bin", "not a SentencePiece model"),
    ],
)
def test_what_is_none_of_them_is_explained(tmp_path, name, words):
    if name != "nothing":
        (tmp_path / name).write_bytes(b"\xff\x00 whatever")
    assert words in refusal("inspect", tmp_path / name)


def test_a_huge_file_is_not_read_whole(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 33)
    assert "not a SentencePiece model" in refusal("inspect", tmp_path / "sparse")


def test_tensors_alone_are_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no state.json" in refusal("inspect", tmp_path)


@pytest.mark.parametrize(
    ("what", "option", "words"),
    [
        ("run", "--stats", "is a run folder, and --stats is for a checkpoint"),
        ("run/checkpoints", "--plot=x.png", "--plot is for a run folder"),
        ("valid", "--stats", "a token-file prefix, and --stats is for a checkpoint"),
        ("spm.model", "--verify", "a SentencePiece model, and --verify is for a checkpoint or"),
        ("run", "--tokenizer=x", "--tokenizer is for a token-file prefix"),
    ],
)
def test_an_option_for_something_else_is_refused(text_run, what, option, words):
    assert words in refusal("inspect", text_run / what, option)


def test_a_prefix_may_have_dots_and_any_folder(tmp_path):
    (tmp_path / "v1.2.idx").write_bytes(b"")
    assert find_kind(tmp_path / "v1.2") == (tmp_path / "v1.2", "data")


def test_it_works_as_a_command(text_run):
    process = megaswitch("inspect", text_run / "run")
    assert process.returncode == 0
    assert "Router health" in process.stdout
    assert process.stderr == ""
