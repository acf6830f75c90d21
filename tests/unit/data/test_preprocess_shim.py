"""Megatron's flags: what they write, and what is refused with the reason."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaswitch.data.indexed import TokenStore

SHIM = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"


@pytest.fixture
def inputs(tmp_path, make_text):
    for name, first in (("a.jsonl", 0), ("b.jsonl", 30)):
        texts = make_text(60)[first : first + 30]
        lines = [json.dumps({"text": text, "title": text[:9]}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines))
    return make_text(60)


def run(folder, *arguments):
    command = [sys.executable, SHIM, "--output-prefix", "c", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def documents_of(prefix):
    store = TokenStore(prefix)
    return [store.document(i).tolist() for i in range(store.num_documents)]


def test_megatrons_flags(inputs, tmp_path, tokenizer):
    done = run(
        tmp_path, "--input", "*.jsonl", "--json-keys", "text", "title", "--append-eod",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer.path,
        "--vocab-extra-ids", "20", "--dataset-impl", "mmap", "--workers", "2",
        "--partitions", "2", "--log-interval", "100", "--keep-sequential-samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: --partitions has no effect" in done.stderr
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in inputs]
    assert documents_of(tmp_path / "c_text_document") == expected
    assert len(documents_of(tmp_path / "c_title_document")) == 60
    assert TokenStore(tmp_path / "c_text_document").meta.num_extra_ids == 20


def test_documents_are_shuffled_and_without_eos_by_default(inputs, tmp_path, tokenizer):
    done = run(tmp_path, "--input", "a.jsonl", "b.jsonl", "--tokenizer-model", tokenizer.path)
    assert done.returncode == 0, done.stderr
    found = documents_of(tmp_path / "c_text_document")
    expected = [tokenizer.encode(text) for text in inputs]
    assert sorted(found) == sorted(expected)
    assert found != expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split-sentences"], "--split-sentences is refused: T5 masks spans of flat text"),
        (["--vocab-file", "v.json", "--merge-file", "m"], "--merge-file is refused: it belongs to"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-type GPT2BPETokenizer is none of"),
        (["--tokenizer-model", "missing.model"], "cannot read the tokenizer 'missing.model'"),
        ([], "--tokenizer-model is missing"),
        (["--vocab-extra-ids", "-1"], "--vocab-extra-ids is -1"),
        (["--dataset-impl", "lazy"], "argument --dataset-impl: invalid choice: 'lazy'"),
    ],
)
def test_mistakes_are_explained(inputs, tmp_path, flags, message):
    done = run(tmp_path, "--input", "a.jsonl", *flags)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
