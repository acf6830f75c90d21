"""Columns of Parquet files, honest and hostile ones."""

import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaswitch.data.blocks import check_inputs, read_blocks
from megaswitch.data.indexed import TokenStore
from megaswitch.data.preprocess import preprocess
from megaswitch.data.text_files import read_documents
from megaswitch.data.text_to_text import preprocess_pairs
from megaswitch.log import UserError

TEXTS = ["one", "two", None, "three", "", "one", "é\nb"]
KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


def read(path):
    rejected = []
    found = [(d.line, d.text) for d in read_documents(path, reject=rejected.append)]
    return found, [(r.line, r.reason) for r in rejected]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_columns_of_texts(tmp_path, kind, compression):
    table = pa.table({"id": range(7), "text": pa.array(TEXTS, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, compression=compression)
    found, rejected = read(tmp_path / "a.parquet")
    assert found == [(1, "one"), (2, "two"), (4, "three"), (6, "one"), (7, "é\nb")]
    assert rejected == [(3, "no string under 'text'"), (5, "the text is empty")]


def test_reading_goes_on_behind_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 40)
    monkeypatch.setattr("megaswitch.data.parquet._BATCH_ROWS", 7)
    texts = [f"text {n}" for n in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=30)
    advanced = []
    parts = list(read_blocks(tmp_path / "a.parquet", ("text",), advance=advanced.append))
    assert len(parts) > 10
    assert sum(advanced) == (tmp_path / "a.parquet").stat().st_size
    for number, part in enumerate(parts):
        rest = list(read_blocks(tmp_path / "a.parquet", ("text",), start=part.end))
        rows = [row for block in rest for row in block.content]
        assert rows == [row for block in parts[number + 1 :] for row in block.content]


def test_bytes_that_are_not_utf8_are_passed_over(tmp_path):
    column = pa.array([b"a", b"\xff", b"b"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([(1, "a"), (3, "b")], [(2, "not UTF-8")])


def test_pairs(tmp_path, tokenizer, tokenizer_path):
    table = pa.table({"inputs": ["ba", "da", None], "targets": ["<extra_id_0> ka", "", "mo"]})
    pq.write_table(table, tmp_path / "a.parquet")
    report = preprocess_pairs([tmp_path / "a.parquet"], tmp_path / "c", tokenizer_path)
    assert (report.documents, report.rejections.count) == (1, 2)
    target = TokenStore(tmp_path / "c_targets").document(0).tolist()
    assert target == tokenizer.encode("<extra_id_0> ka")
    listed = [json.loads(line)["reason"] for line in (tmp_path / "c.rejected.jsonl").open()]
    assert listed == ["the text under 'targets' is empty", "no string under 'inputs'"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, "has no column 'text'; its columns are 'body'"),
        ({"text": [1, 2]}, "'text' of .* is of type int64; it must be text"),
        ({"text": [["a"]]}, "is of type list"),
        ({"text": [{"text": "a"}]}, "is of type struct"),
    ],
)
def test_other_columns_are_refused(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        check_inputs([tmp_path / "a.parquet"], ("text",))


def test_damage_is_an_error_or_changes_nothing_else(tmp_path, make_text):
    """Any byte of a small file, and any length: never a crash, a hang or another error."""
    texts = make_text(30)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    whole = (tmp_path / "a.parquet").read_bytes()
    draw = random.Random(0)
    refused = 0
    for turn in range(150):
        damaged = bytearray(whole)
        if turn % 3 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            for _ in range(draw.choice([1, 4])):
                damaged[draw.randrange(len(damaged))] = draw.choice(
                    [0, 255, 127, draw.randrange(256)]
                )
        (tmp_path / "b.parquet").write_bytes(damaged)
        try:
            read(tmp_path / "b.parquet")
        except UserError:
            refused += 1
    assert refused > 75


def test_a_small_file_with_a_large_text_in_every_row(tmp_path):
    """One value of the dictionary in 9,000 rows: 180 GB, were the column ever made whole."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), ["x" * 20_000_000])
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", compression="zstd")
    code = (
        "import pathlib, re\n"
        "from megaswitch.data import blocks\n"
        "blocks.MAX_DOCUMENT_BYTES = 1 << 20\n"
        "for block in blocks.read_blocks(pathlib.Path('a.parquet'), ('text',)):\n"
        "    assert block.content is None\n"
        # Not getrusage, whose peak a process inherits from the one that started it.
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(block.end.offset, int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) >> 10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows, mebibytes = map(int, done.stdout.split())
    assert rows == 9000
    assert mebibytes < 1000


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, tokenizer):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "megaswitch\[parquet\]"'):
        preprocess([tmp_path / "a.parquet"], tmp_path / "c", tokenizer.path)
