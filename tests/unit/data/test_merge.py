import subprocess
import sys
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.cli import cli
from megaswitch.data import merge as module
from megaswitch.data.indexed import CorpusMeta, IndexedWriter, TokenizerInfo, TokenStore
from megaswitch.data.merge import merge, parse_shares, split
from megaswitch.files import sha256
from megaswitch.log import UserError

INFO = TokenizerInfo(tokenizer_sha256="ab" * 32, vocab_size=32_100, num_extra_ids=100)
ROOT = Path(__file__).resolve().parents[3]


def write(prefix, documents, dtype="<u2", tokenizer=INFO):
    """A corpus of these documents, each a list of sequences."""
    with IndexedWriter(prefix, dtype, tokenizer=tokenizer) as writer:
        for sequences in documents:
            for sequence in sequences:
                writer.append(sequence)
            writer.end_document()
    return prefix


def content(prefix):
    """Documents as lists of sequences."""
    store = TokenStore(prefix)
    starts = store.document_starts(0, store.num_documents + 1)
    lengths = store.sequence_lengths(0, store.num_sequences)
    flat = np.split(store.tokens(0, store.num_tokens), np.cumsum(lengths))[:-1]
    return [[s.tolist() for s in flat[a:b]] for a, b in pairwise(starts)]


def files(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".meta.json")]


A = [[[1, 2, 3], [4]], [[]], []]
B = [[[5] * 70]]
C = [[], [[6], [7, 8]]]


@pytest.fixture(autouse=True, params=[3, 1 << 20], ids=["small pieces", "large pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", request.param)


def test_documents_and_sequences_follow_each_other(tmp_path):
    inputs = [write(tmp_path / name, d) for name, d in (("b", B), ("a.v1", A), ("c", C))]
    merge(inputs, tmp_path / "out" / "all")
    assert content(tmp_path / "out" / "all") == B + A + C
    assert files(tmp_path / "out" / "all") == files(write(tmp_path / "at-once", B + A + C))
    meta = CorpusMeta.read(tmp_path / "out" / "all")
    assert meta.content_sha256 == sha256(tmp_path / "out" / "all.bin")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        (("<u1", "<u2"), "<u2"),
        (("<u2", "<i2"), "<i4"),
        (("<u2", "<i4"), "<i4"),
        (("<i4", "<u1", "<i8"), "<i8"),
    ],
)
def test_types_are_widened_to_one_that_holds_all(tmp_path, dtypes, widest):
    tops = [min(np.iinfo(dtype).max, 1 << 40) for dtype in dtypes]
    inputs = [
        write(tmp_path / str(i), [[[0, top]]], dtype)
        for i, (dtype, top) in enumerate(zip(dtypes, tops, strict=True))
    ]
    merge(inputs, tmp_path / "all")
    assert TokenStore(tmp_path / "all").dtype == np.dtype(widest)
    assert content(tmp_path / "all") == [[[0, top]] for top in tops]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_sha256": "cd" * 32}, "tokenizer_sha256 is abab.* and cdcd"),
        ({"vocab_size": 32_200}, "vocab_size is 32100 and 32200"),
        ({"num_extra_ids": 0}, "num_extra_ids is 100 and 0"),
    ],
)
def test_corpora_of_different_tokenizers_are_refused(tmp_path, change, message):
    first = write(tmp_path / "first", A)
    other = write(tmp_path / "other", B, tokenizer=TokenizerInfo(**{**vars(INFO), **change}))
    with pytest.raises(UserError, match=rf"'.*first' and '.*other' were made by .*{message}"):
        merge([first, other], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_an_unknown_tokenizer_is_not_taken_for_the_known_one(tmp_path):
    known, unknown = write(tmp_path / "known", A), write(tmp_path / "unknown", B, tokenizer=None)
    with pytest.raises(UserError, match=r"'.*known' has a \.meta\.json and '.*unknown' has none"):
        merge([unknown, known], tmp_path / "all")
    merge([unknown, write(tmp_path / "third", C, tokenizer=None)], tmp_path / "all")
    assert TokenStore(tmp_path / "all").meta is None


def test_what_makes_no_sense_is_refused(tmp_path):
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", B)
    with pytest.raises(UserError, match="given more than once"):
        merge([a, b, tmp_path / "." / "a"], tmp_path / "all")
    before = files(a)
    with pytest.raises(UserError, match="is an input too"):
        merge([a, b], tmp_path / ".." / tmp_path.name / "a")
    with pytest.raises(UserError, match="there must be at least 1"):
        split(a, tmp_path / "p", parts=0)
    with pytest.raises(UserError, match="a part must have at least 1"):
        split(a, tmp_path / "p", documents=0)
    with pytest.raises(UserError, match=r"has 3 documents.*none is left for .*p_\d"):
        split(a, tmp_path / "p", parts=4)
    assert files(a) == before


def test_a_damaged_input_leaves_no_output(tmp_path):
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", B)
    Path(f"{b}.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"b\.idx"):
        merge([a, b], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_a_corpus_cut_while_it_is_split_leaves_no_part(tmp_path, monkeypatch):
    prefix = write(tmp_path / "c", [[list(range(100))] for _ in range(400)])
    real = IndexedWriter.finish

    def cut_after_the_first(writer):
        real(writer)
        with Path(f"{prefix}.bin").open("r+b") as file:
            file.truncate(100)

    monkeypatch.setattr(IndexedWriter, "finish", cut_after_the_first)
    with pytest.raises(UserError, match="when it was opened and now has 100"):
        split(prefix, tmp_path / "p", parts=4)
    assert not list(tmp_path.glob("p_*"))


def test_split_by_parts_is_even_in_tokens(tmp_path):
    documents = [[[i] * (1 + i % 7)] for i in range(100)]
    prefix = write(tmp_path / "c", documents)
    parts = split(prefix, tmp_path / "p", parts=8)
    assert [part.prefix.name for part in parts] == [f"p_0{i}" for i in range(8)]
    assert list(chain(*(content(part.prefix) for part in parts))) == documents
    tokens = [TokenStore(part.prefix).num_tokens for part in parts]
    assert max(tokens) - min(tokens) <= 2 * 7
    assert all(TokenStore(part.prefix).meta.vocab_size == 32_100 for part in parts)


def test_split_by_documents(tmp_path):
    documents = [[[i]] for i in range(10)]
    parts = split(write(tmp_path / "c", documents), tmp_path / "p", documents=4)
    assert [content(part.prefix) for part in parts] == [
        documents[:4],
        documents[4:8],
        documents[8:],
    ]


def test_split_by_shares_cuts_at_the_exact_token(tmp_path):
    documents = [[[i]] for i in range(1000)]
    shares = parse_shares(["train=0.7", "valid=0.2", "test=0.1"])
    parts = split(write(tmp_path / "c", documents), tmp_path / "p", shares=shares)
    assert [(p.prefix.name, p.first, p.stop) for p in parts] == [
        ("p_train", 0, 700),
        ("p_valid", 700, 900),
        ("p_test", 900, 1000),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train=0.9"], "add up to 0.9"),
        (["train=0.9", "valid=0.2"], r"add up to 1\.1"),
        (["train=0.5", "train=0.5"], "names a part twice"),
        (["0.5", "b=0.5"], "must be NAME=SHARE"),
        (["a=half", "b=0.5"], "must be NAME=SHARE"),
        (["a=-1", "b=2"], "must be NAME=SHARE"),
        (["a=1/0"], "must be NAME=SHARE"),
        (["a/b=1"], "must be NAME=SHARE"),
    ],
)
def test_bad_shares_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_shares(words)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=30),
    size=st.integers(1, 8),
)
def test_the_parts_merged_are_the_corpus(tmp_path_factory, lengths, size):
    folder = tmp_path_factory.mktemp("any")
    prefix = write(folder / "c", [[list(range(n)) for n in sizes] for sizes in lengths])
    parts = split(prefix, folder / "p", documents=size)
    merge([part.prefix for part in parts], folder / "again")
    assert files(folder / "again") == files(prefix)


def test_memory_does_not_grow_with_the_corpus(tmp_path, piece):
    if module._PIECE == 3:
        pytest.skip("pieces of 3 tokens take minutes here")
    # Two documents of one sequence each: not even a sequence may be held whole.
    with IndexedWriter(tmp_path / "c", "<u2") as writer:
        for _ in range(2):
            writer.add_document(np.zeros(12_000_000, dtype=np.uint16))
    tracemalloc.start()
    split(tmp_path / "c", tmp_path / "p", parts=2)
    merge([tmp_path / "p_00", tmp_path / "p_01"], tmp_path / "again")
    assert tracemalloc.get_traced_memory()[1] < 48 << 20  # one sequence as int64 is 96 MB
    tracemalloc.stop()
    assert sha256(tmp_path / "again.bin") == sha256(tmp_path / "c.bin")


def test_the_commands(tmp_path, capfd):
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", B)
    words = ["data", "merge", f"{a}.idx", str(b), "--output", str(tmp_path / "all")]
    cli.main(words, standalone_mode=False)
    assert content(tmp_path / "all") == A + B
    assert "4 documents, 74 tokens of type uint16" in capfd.readouterr().err
    split_words = ["data", "split", str(tmp_path / "all"), "--output", str(tmp_path / "all")]
    shares = ["--share", "train=0.9", "--share", "valid=0.1"]
    with pytest.raises(UserError, match="exactly one of --parts, --documents and --share"):
        cli.main([*split_words, *shares, "--parts", "2"], standalone_mode=False)
    with pytest.raises(UserError, match="exactly one of"):
        cli.main(split_words, standalone_mode=False)
    cli.main([*split_words, "--documents", "3"], standalone_mode=False)
    assert content(tmp_path / "all_00") == A
    assert content(tmp_path / "all_01") == B


def test_megatrons_flags(tmp_path):
    write(tmp_path / "in" / "b", B)
    write(tmp_path / "in" / "a", A)
    command = [sys.executable, "tools/merge_datasets.py", "--output-prefix", tmp_path / "all"]
    subprocess.run([*command, "--input", tmp_path / "in"], cwd=ROOT, check=True)
    assert content(tmp_path / "all") == A + B
    done = subprocess.run(
        [*command, "--input", tmp_path / "none"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
