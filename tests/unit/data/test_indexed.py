import json
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch import native
from megaswitch.data.indexed import (
    TYPE_CODES,
    CorpusMeta,
    IndexedWriter,
    TokenizerInfo,
    TokenStore,
    token_dtype,
)
from megaswitch.log import UserError

# Runs with files limited to 4 KiB, a full disk in small; Python ignores SIGXFSZ.
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"

INFO = TokenizerInfo(tokenizer_sha256="ab" * 32, vocab_size=32_100, num_extra_ids=100)


def documents_of(store):
    return [store.document(i).tolist() for i in range(store.num_documents)]


@pytest.mark.parametrize("dtype", list(TYPE_CODES.values()), ids=lambda dtype: dtype.name)
def test_round_trip(tmp_path, dtype):
    top = min(np.iinfo(dtype).max, 1 << 40)
    documents = [[[1, 2, top], [4]], [[]], [[5] * 70]]
    with IndexedWriter(tmp_path / "c.v1", dtype) as writer:
        for sequences in documents:
            for sequence in sequences:
                writer.append(sequence)
            writer.end_document()
    store = TokenStore(tmp_path / "c.v1")
    assert (store.num_tokens, store.num_documents) == (74, 3)
    assert store.dtype == dtype
    assert store.meta is None
    assert documents_of(store) == [[1, 2, top, 4], [], [5] * 70]
    assert store.tokens(2, 3).tolist() == [top, 4, 5]
    assert not list(tmp_path.glob("*.partial"))


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=12))
def test_any_structure_round_trips(tmp_path_factory, lengths):
    prefix = tmp_path_factory.mktemp("any") / "c"
    counter = iter(range(100_000))
    documents = [[[next(counter) for _ in range(n)] for n in sizes] for sizes in lengths]
    with IndexedWriter(prefix, "<i4") as writer:
        for sequences in documents:
            for sequence in sequences:
                writer.append(sequence)
            writer.end_document()
    store = TokenStore(prefix)
    assert documents_of(store) == [list(chain(*sequences)) for sequences in documents]


def test_the_bytes_are_megatrons(tmp_path):
    with IndexedWriter(tmp_path / "c", "<u2") as writer:
        writer.append([7, 8, 9])
        writer.append([10])
        writer.end_document()
    assert (tmp_path / "c.bin").read_bytes() == struct.pack("<4H", 7, 8, 9, 10)
    assert (tmp_path / "c.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 2, 2)
        + struct.pack("<2i", 3, 1)
        + struct.pack("<2q", 0, 6)
        + struct.pack("<2q", 0, 2)
    )


def test_vocabularies_are_stored_as_megatron_does():
    assert token_dtype(65_499) == np.dtype("<u2")
    assert token_dtype(65_500) == np.dtype("<i4")


def test_a_failed_write_leaves_the_old_corpus(tmp_path, make_corpus):
    prefix = make_corpus(1000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def write_half():
        with IndexedWriter(prefix, "<u2") as writer:
            writer.add_document([1, 2, 3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("size", [5_000, 1_900])  # fails at append; at the index, as 3.8 KB fit
def test_a_full_disk_leaves_nothing_behind(tmp_path, size):
    code = LIMITED + (
        "from megaswitch.data.indexed import IndexedWriter\n"
        f"with IndexedWriter({str(tmp_path / 'c')!r}, '<u2') as writer:\n"
        f"    for _ in range({size}): writer.add_document([7])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_opened_leaves_no_other_open(tmp_path):
    (tmp_path / "c.lengths.partial").mkdir()
    writer = IndexedWriter(tmp_path / "c", "<u2")
    with pytest.raises(UserError, match=r"cannot write '.*c\.lengths\.partial': Is a directory"):
        writer.__enter__()
    assert not (tmp_path / "c.bin.partial").exists()
    assert all(stream.closed for stream in writer._streams)


@pytest.mark.parametrize("ids", [[65_536], [-1], [[1, 2]]])
def test_ids_that_do_not_fit_are_never_written(tmp_path, ids):
    with pytest.raises(AssertionError), IndexedWriter(tmp_path / "c", "<u2") as writer:
        writer.add_document(ids)


def test_a_corpus_without_sidecar_drops_the_old_one(make_corpus):
    prefix = make_corpus(1000, tokenizer=INFO)
    assert TokenStore(prefix).meta is not None
    make_corpus(500)
    assert TokenStore(prefix).meta is None


def test_sidecar(make_corpus):
    prefix = make_corpus(1500, tokenizer=INFO)
    meta = TokenStore(prefix).meta
    assert (meta.tokens, meta.documents, meta.sequences) == (1500, 3, 3)
    assert (meta.tokenizer_sha256, meta.vocab_size) == (INFO.tokenizer_sha256, 32_100)
    assert meta.created_by.startswith("megaswitch ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has None for tokenizer_sha256, which must be a string"),
        ({"tokens": -1}, "has -1 for tokens, which must be a non-negative integer"),
        ({"vocab_size": "many"}, "has 'many' for vocab_size"),
        ({"vocab_size": True}, "has True for vocab_size"),
        ({"tokens": 5}, "speaks of 5 tokens but the corpus has 1500"),
        ({"documents": 5}, "speaks of 5 documents but the corpus has 3"),
        ({"sequences": 5}, "speaks of 5 sequences but the corpus has 3"),
    ],
)
def test_bad_sidecars_are_refused(make_corpus, content, message):
    prefix = make_corpus(1500, tokenizer=INFO)
    sidecar = prefix.with_name(prefix.name + ".meta.json")
    if isinstance(content, dict):
        content = json.dumps({**json.loads(sidecar.read_text()), **content})
    sidecar.write_text(content)
    with pytest.raises(UserError, match=message):
        TokenStore(prefix)


def test_missing_sidecar_is_none(tmp_path):
    assert CorpusMeta.read(tmp_path / "nothing") is None


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_files_are_named(make_corpus, suffix):
    prefix = make_corpus(100)
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(UserError, match=rf"cannot open '.*corpus{suffix}': No such file"):
        TokenStore(prefix)


def test_a_folder_is_no_corpus(tmp_path):
    (tmp_path / "c.idx").mkdir()
    with pytest.raises(UserError, match="must be a regular file"):
        TokenStore(tmp_path / "c")


def test_an_unwritable_output_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="Choose an output prefix"),
        IndexedWriter(tmp_path / "file" / "c", "<u2"),
    ):
        pass


def test_reads_outside_are_refused_natively(make_corpus):
    store = TokenStore(make_corpus(100))
    out = np.empty(2, dtype=np.int64)
    for start in (99, 100, (1 << 64) - 1):
        with pytest.raises(IndexError):
            store.native.read(start, out)
    with pytest.raises(IndexError):
        store.document(1)


def test_the_core_writes_into_the_given_array_only(make_corpus):
    store = TokenStore(make_corpus(100))
    with pytest.raises(TypeError):
        store.native.read(0, np.empty(2, dtype=np.int32))
    with pytest.raises(TypeError):
        store.native.read(0, np.empty(4, dtype=np.int64)[::2])
    locked = np.empty(2, dtype=np.int64)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        store.native.read(0, locked)


def test_a_package_that_was_not_compiled_says_so(tmp_path):
    package = Path(native.__file__).parent
    (tmp_path / "megaswitch").mkdir()
    for name in ("__init__.py", "native.py"):
        (tmp_path / "megaswitch" / name).write_bytes((package / name).read_bytes())
    done = subprocess.run(
        # -S: an editable installation would put its own core in the gap.
        [sys.executable, "-S", "-c", "import megaswitch.native"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith(
        f"ImportError: the package megaswitch in '{tmp_path}' has no compiled"
    )
    assert "Run `pip install -e .` there, or start from another folder" in message
