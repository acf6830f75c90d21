"""Blocks: wherever a file is cut, and however it comes in, its documents are the same."""

import random
import time
from contextlib import suppress

import pytest

from megaswitch.data import blocks
from megaswitch.data.blocks import Position, read_blocks
from megaswitch.data.text_files import read_documents, records_of
from megaswitch.log import UserError


def documents(path, start=None):
    """The documents, the rejected lines and the end of every block."""
    found, rejected, ends = [], [], []
    for block in read_blocks(path, ("text",), start=start):
        found += [(r.line, *r.texts) for r in records_of(block, ("text",), rejected.append)]
        ends.append((block.end, len(found)))
    return found, [(r.line, r.reason) for r in rejected], ends


def random_text(draw):
    """Plain text with all kinds of blank lines."""
    pieces = ["a", "bc d", "é", "\n", "\n\n", "\n \t\n", "\r\n", "\r\n\r\n", " ", "\n\n\n", "\x0b"]
    return "".join(draw.choices(pieces, k=draw.randint(0, 60)))


def paragraphs(text):
    """What is plain text by definition: blank lines are between documents."""
    found, lines, first = [], [], 0
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip(" \t\r\n\v\f"):
            first = first if lines else number
            lines.append(line.rstrip("\r\n"))
        elif lines:
            found.append((first, "\n".join(lines)))
            lines = []
    return found


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_any_cut_gives_the_same_documents(tmp_path, monkeypatch, suffix, chunk):
    monkeypatch.setattr("megaswitch.data.compression._CHUNK_BYTES", chunk)
    draw = random.Random(chunk)
    path = tmp_path / f"a{suffix}"
    for _ in range(40):
        text = random_text(draw)
        if suffix == ".jsonl":
            text = text.replace("bc d", '{"text": "x"}').replace("é", '{"text": "y"')
        path.write_bytes(text.encode())
        monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 1 << 20)
        whole, rejected, _ = documents(path)
        if suffix == ".txt":
            assert whole == paragraphs(text)
        monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", draw.randint(1, 20))
        found, again, ends = documents(path)
        assert (found, again) == (whole, rejected)
        for end, count in ends:  # reading goes on behind any block
            assert documents(path, end)[0] == whole[count:]
        if ends:
            assert ends[-1][0].offset == len(text.encode())


def test_a_line_too_long_is_a_block_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks.MAX_DOCUMENT_BYTES", 50)
    monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 20)
    monkeypatch.setattr("megaswitch.data.compression._CHUNK_BYTES", 16)
    line = '{"text": "ba"}\n'
    (tmp_path / "a.jsonl").write_text(line + "x" * 200 + "\n" + line + line)
    found, rejected, ends = documents(tmp_path / "a.jsonl")
    assert found == [(1, "ba"), (3, "ba"), (4, "ba")]
    assert rejected == [(2, "longer than 50 bytes")]
    assert (Position(len(line) + 201, 3), 1) in ends
    for end, count in ends:
        assert documents(tmp_path / "a.jsonl", end)[0] == found[count:]


@pytest.mark.parametrize("line", [b"x", b" ", b"\n", b"x\n", b"[" * 99 + b"\n", b"\r \n"])
def test_long_lines_and_many_lines_take_linear_time(tmp_path, monkeypatch, line):
    monkeypatch.setattr("megaswitch.data.blocks.MAX_DOCUMENT_BYTES", 1 << 21)

    def seconds(size):
        (tmp_path / "a.txt").write_bytes(line * (size // len(line)))
        started = time.process_time()
        with suppress(UserError):  # a document without end
            for block in read_blocks(tmp_path / "a.txt", ("text",)):
                assert block.content is None or len(block.content) < 3 << 20
        return time.process_time() - started

    few, many = (min(seconds(size) for _ in range(3)) for size in (1 << 19, 1 << 22))
    assert many < 24 * few, "eight times the bytes: 8 if linear, 64 if quadratic"


def test_plain_documents_are_named_by_their_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"\n\na\nb\n\n\nc\n\n\n\nd")
    found = list(read_documents(tmp_path / "a.txt", reject=print))
    assert [(d.line, d.text) for d in found] == [(3, "a\nb"), (7, "c"), (11, "d")]


def test_compressed_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed inside: unpack it"):
        blocks.check_inputs([tmp_path / "a.parquet.gz"])
