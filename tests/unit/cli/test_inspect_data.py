"""`megaswitch inspect` of token files."""

import json
import re
import shutil

import numpy as np
import pytest

from megaswitch.cli import inspect_data
from megaswitch.data.indexed import IndexedWriter, TokenizerInfo, TokenStore, companion
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.text_to_text import preprocess_pairs
from megaswitch.data.tokenizer import Tokenizer
from tests.unit.cli.commands import printed, refusal, report


def write(prefix, documents, *, sidecar=True):
    """A corpus of these documents, each a list of sequences."""
    info = TokenizerInfo("0" * 64, 300, 100) if sidecar else None
    with IndexedWriter(prefix, np.uint16, tokenizer=info) as writer:
        for sequences in documents:
            for length in sequences:
                writer.append(np.arange(length) % 190 + 3)
            writer.end_document()
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "c.orpus", [[700], [], [10, 20], [0], [700], [1], [0, 5000]])


def test_the_report_is_exact(prefix, capsys):
    found = report(capsys, "inspect", prefix, "--verify")
    loader = SpanCorruptionLoader(prefix, seed=0, vocab_size=300, encoder_length=512)
    assert (found["documents"], found["sequences"], found["tokens"]) == (7, 8, 6431)
    assert found["dtype"] == "uint16"
    assert found["bytes"][".bin"] == 2 * 6431
    assert found["ids"] == {
        "min": 3, "max": 192, "all_read": True, "used": 190, "of": 200, "unknown_share": 0.0,
    }  # fmt: skip
    assert found["duplicates"] == 1
    lengths = found["lengths"]
    assert {k: lengths[k] for k in ("min", "median", "p99", "max", "empty")} == {
        "min": 0, "median": 30, "p99": 700, "max": 5000, "empty": 2,
    }  # fmt: skip
    assert lengths["mean"] == pytest.approx(6431 / 7)
    assert sum(b["documents"] for b in lengths["histogram"]) == 7
    assert lengths["histogram"][0] == {"from": 0, "below": 1, "documents": 2}
    assert found["training"]["samples"] == loader.samples_per_epoch
    assert found["training"]["fingerprint"] == loader.fingerprint
    assert found["training"]["decoder_length"] == 114
    assert found["sidecar"]["vocab_size"] == 300


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx", ".meta.json"])
def test_any_of_the_files_will_do(prefix, suffix, capsys):
    assert report(capsys, "inspect", companion(prefix, suffix))["path"] == str(prefix)


def test_lengths_do_not_depend_on_the_pieces_read(prefix, monkeypatch):
    store = TokenStore(prefix)
    monkeypatch.setattr(inspect_data, "_DOCUMENTS", 3)
    pieces = [piece.tolist() for piece in inspect_data.document_lengths(store)]
    assert pieces == [[700, 0, 30], [0, 700, 1], [5000]]


def test_quantiles_are_exact_at_any_size():
    values = np.random.default_rng(0).integers(0, 2**45, 5000)
    values[:100] %= 50
    for rank in (0, 50, 2500, 4999):
        pieces = lambda: iter(np.array_split(values, 7))  # noqa: E731
        assert inspect_data.quantile(pieces, rank) == np.sort(values)[rank]


def test_people_see_a_histogram(prefix, capsys):
    text = printed(capsys, "inspect", prefix)
    assert "Tokens per document: min 0, median 30, mean 919, p99 700, max 5,000" in text
    assert "4,096 – 8,191  ████" in text
    assert "repeated documents  1" in text


def test_a_large_corpus_is_not_searched_for_duplicates(prefix, capsys, monkeypatch):
    monkeypatch.setattr(inspect_data, "_CHEAP_TOKENS", 10)
    assert report(capsys, "inspect", prefix)["duplicates"] is None


def test_without_a_sidecar_samples_are_counted_all_the_same(tmp_path, capsys):
    found = report(capsys, "inspect", write(tmp_path / "c", [[5000]], sidecar=False))
    assert found["sidecar"] is None
    assert found["training"]["samples"] == (5000 - 567) // 568
    assert found["training"]["fingerprint"] is None
    assert "no sum to compare" in refusal("inspect", tmp_path / "c", "--verify")


def test_an_empty_corpus_is_described(tmp_path, capsys):
    found = report(capsys, "inspect", write(tmp_path / "c", []))
    assert (found["documents"], found["tokens"], found["lengths"]) == (0, 0, None)
    assert "holds no tokens" in found["training"]["problem"]
    assert "no sample of T5's shape" in printed(capsys, "inspect", tmp_path / "c")


def test_documents_of_nothing_are_described(tmp_path, capsys):
    found = report(capsys, "inspect", write(tmp_path / "c", [[], []]))
    assert found["lengths"]["empty"] == 2


def test_first_documents_are_decoded(text_run, capsys):
    lines = (text_run / "texts.jsonl").read_text().splitlines()
    words = set(" ".join(json.loads(line)["text"] for line in lines).split())
    found = report(capsys, "inspect", text_run / "valid", "--tokenizer", text_run / "spm.model")
    assert len(found["first_documents"]) == 3
    assert set(found["first_documents"][0]["text"].split()[:-1]) <= words
    assert found["first_documents"][0]["cut"]


def test_samples_are_shown_before_and_after_corruption(text_run, capsys):
    arguments = ("inspect", text_run / "valid", "--tokenizer", text_run / "spm.model")
    found = report(capsys, *arguments)
    assert len(found["samples"]) == 2
    for sample in found["samples"]:
        pieces = dict(re.findall(r"(<extra_id_\d+>) ?([^<]*)", sample["targets"]))
        assert pieces
        whole = sample["inputs"]
        for sentinel, text in pieces.items():
            assert sentinel in whole
            whole = whole.replace(sentinel, text)
        assert "".join(whole.split()) == "".join(sample["text"].split())
    assert "Sample 1 of 64 encoder tokens" in printed(capsys, *arguments)


def test_too_little_text_for_a_sample_is_no_error(text_run, tmp_path, capsys):
    tokenizer = Tokenizer(text_run / "spm.model")
    with IndexedWriter(tmp_path / "c", np.uint16, tokenizer=tokenizer.info) as writer:
        writer.add_document([5, 6, 2])
    found = report(capsys, "inspect", tmp_path / "c", "--tokenizer", text_run / "spm.model")
    assert found["samples"] == []
    assert found["ids"]["unknown_share"] == pytest.approx(1 / 3)
    assert found["ids"]["of"] == 400  # and 100 sentinels


def test_coverage_of_a_large_corpus_is_sampled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect_data, "_ID_BUDGET", 4096)
    monkeypatch.setattr(inspect_data, "_WINDOW", 100)
    found = report(capsys, "inspect", write(tmp_path / "c", [[5000]] * 10))
    assert found["ids"]["used"] == 190
    assert not found["ids"]["all_read"]


@pytest.fixture
def pairs(text_run, tmp_path):
    lines = [{"inputs": f"bada {n % 7}", "targets": "gule kida"} for n in range(20)]
    lines.append({"inputs": "bada 1 bada", "targets": "gule"})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    preprocess_pairs([tmp_path / "p.jsonl"], tmp_path / "p", text_run / "spm.model")
    return tmp_path / "p"


def test_pairs_are_described_together(pairs, text_run, capsys):
    arguments = ("inspect", pairs, "--verify", "--tokenizer", text_run / "spm.model")
    found = report(capsys, *arguments)
    assert (found["kind"], found["pairs"], found["duplicates"]) == ("pairs", 21, 13)
    assert found["inputs"]["documents"] == found["targets"]["documents"] == 21
    assert found["inputs"]["verified"]
    assert found["targets"]["lengths"]["max"] >= 2
    assert found["first_pairs"][0]["targets"]["text"] == "gule kida"
    text = printed(capsys, *arguments)
    assert "repeated pairs  13" in text
    assert "Pair 3" in text
    assert report(capsys, "inspect", companion(pairs, "_inputs"))["kind"] == "data"


def test_halves_that_are_no_pairs_are_refused(pairs, text_run, tmp_path):
    write(companion(pairs, "_targets"), [[5]], sidecar=False)
    assert "21 documents and" in refusal("inspect", pairs)
    companion(pairs, "_targets.idx").unlink()
    assert "p_targets.idx" in refusal("inspect", pairs)


def test_another_tokenizer_is_refused(text_run, prefix):
    message = refusal("inspect", prefix, "--tokenizer", text_run / "spm.model")
    assert "did not make" in message


def test_a_changed_bin_is_found(prefix):
    file = companion(prefix, ".bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert "it has changed" in refusal("inspect", prefix, "--verify")


@pytest.mark.parametrize("missing", [1, 10, 70])
def test_a_truncated_index_is_explained(prefix, missing):
    index = companion(prefix, ".idx")
    index.write_bytes(index.read_bytes()[:-missing])
    assert "c.orpus.idx" in refusal("inspect", prefix)


def test_a_missing_half_is_named(prefix, tmp_path):
    shutil.copy(companion(prefix, ".idx"), tmp_path / "half.idx")
    assert "half.bin" in refusal("inspect", tmp_path / "half")
    shutil.copy(companion(prefix, ".bin"), tmp_path / "other.bin")
    assert "other.idx" in refusal("inspect", tmp_path / "other")
