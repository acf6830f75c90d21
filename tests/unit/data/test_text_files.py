import gzip
import json
import lzma
import tracemalloc
import zlib

import pytest
import zstandard

from megaswitch.data.blocks import check_inputs
from megaswitch.data.text_files import RejectionLog, read_documents
from megaswitch.log import UserError

COMPRESS = {
    "": lambda b: b,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(path):
    log = RejectionLog()
    documents = list(read_documents(path, reject=log))
    return [(d.line, d.text) for d in documents], [(r.line, r.reason) for r in log.first]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = ['{"text": "one\\ntwo", "id": 1}', "", '{"text": "três"}']
    path.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    assert read(path) == ([(1, "one\ntwo"), (3, "três")], [])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_plain_text(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\n\na b\r\nc\n\n \n\nd\n"))
    assert read(path) == ([(3, "a b\nc"), (8, "d")], [])


def test_bad_lines_are_named_and_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"txt": "a"}', "no string under 'text'"),
        (b'{"text": 5}', "no string under 'text'"),
        (b'{"text": " "}', "the text is empty"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "not JSON"),
    ]
    for line, reason in bad:
        path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}')
        documents, rejections = read(path)
        assert documents == [(1, "good"), (3, "too")]
        assert rejections[0][0] == 2
        assert reason in rejections[0][1]


def test_plain_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\nb")
    assert read(tmp_path / "a.txt") == ([(1, "a\nb")], [(2, "not UTF-8")])


def test_rejections_are_counted_beyond_those_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 50)
    log = RejectionLog()
    assert list(read_documents(tmp_path / "a.jsonl", reject=log)) == []
    assert log.count == 50
    assert len(log.first) == log.SHOWN
    assert "50 lines passed over" in str(log)
    assert "a.jsonl:1: not JSON" in str(log)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_long_and_joined_streams(tmp_path, suffix):
    text = "".join(json.dumps({"text": f"document {i} " + "x" * 3_000}) + "\n" for i in range(200))
    half = len(text) // 2
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        COMPRESS[suffix](text[:half].encode()) + COMPRESS[suffix](text[half:].encode())
    )
    documents = list(read_documents(path, reject=RejectionLog()))
    assert [d.text.split()[1] for d in documents] == [str(i) for i in range(200)]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, -1])
def test_cut_off_files_are_refused(tmp_path, suffix, keep):
    whole = COMPRESS[suffix](b"".join(b"%d some words\n\n" % (i * i) for i in range(20_000)))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"a\.txt\{suffix}' is cut off"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("at", [0, 0.5])
def test_corrupt_files_are_refused(tmp_path, suffix, at):
    compress = COMPRESS[suffix]
    if suffix == ".zst":
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    damaged = bytearray(compress(b"".join(b"%d words\n\n" % (i * i) for i in range(20_000))))
    start = int(len(damaged) * at)
    damaged[start : start + 4] = b"\x55\xaa\x55\xaa"
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="is corrupt"):
        read(path)


def test_zeros_between_xz_streams_are_padding(tmp_path):
    padding = b"\0" * 4
    streams = [lzma.compress(f"{word}\n\n".encode()) for word in ("bada", "kilo")]
    (tmp_path / "a.txt.xz").write_bytes(padding.join(streams) + padding * 300)
    assert read(tmp_path / "a.txt.xz") == ([(1, "bada"), (3, "kilo")], [])


def test_an_xz_file_that_wants_much_memory_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    honest = lzma.compress(b"bada", filters=filters)
    (tmp_path / "a.txt.xz").write_bytes(honest)
    assert read(tmp_path / "a.txt.xz") == ([(1, "bada")], [])
    # The same with a header that asks for 1 GiB: byte 16 is the dictionary's size, then a CRC.
    block = bytearray(honest[12:24])
    assert block[2:4] == b"\x21\x01"
    block[4] = 36
    block[8:12] = zlib.crc32(block[:8]).to_bytes(4, "little")
    (tmp_path / "a.txt.xz").write_bytes(honest[:12] + block + honest[24:])
    with pytest.raises(UserError, match=r"wants more than 256 MiB .* `xz -9` or less"):
        read(tmp_path / "a.txt.xz")


def test_garbage_behind_a_stream_is_refused(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text") + b"garbage")
    with pytest.raises(UserError, match="is corrupt"):
        read(tmp_path / "a.txt.gz")


def test_a_document_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("word word\n" * 20)
    with pytest.raises(UserError, match=r"line 1 of .* needs a blank line between documents"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_a_line_too_long_to_hold_is_passed_over(tmp_path, monkeypatch, suffix, kind):
    monkeypatch.setattr("megaswitch.data.blocks.MAX_DOCUMENT_BYTES", 1 << 20)
    documents = [b"bada", b"x" * (1 << 27), b"kilo"]
    if kind == ".jsonl":
        documents = [b'{"text": "' + document + b'"}' for document in documents]
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\n\n".join(documents)))
    del documents
    tracemalloc.start()
    try:
        found = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == ([(1, "bada"), (5, "kilo")], [(3, "longer than 1,048,576 bytes")])
    assert peak < 1 << 26


def test_a_last_line_too_long_to_hold_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 100 + "\n\n" + "x" * 101)
    assert read(tmp_path / "a.txt") == ([(1, "x" * 100)], [(3, "longer than 100 bytes")])


def test_missing_inputs_are_all_named(tmp_path):
    (tmp_path / "here").write_text("")
    with pytest.raises(UserError, match=r"'.*/b', '.*/c'"):
        check_inputs([tmp_path / "here", tmp_path / "b", tmp_path / "c"])
    with pytest.raises(UserError, match="none given"):
        check_inputs([])
