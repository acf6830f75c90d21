"""Damaged `.bin/.idx` files are refused, with the file, the field and the rule."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.data.indexed import IndexedWriter, TokenStore
from megaswitch.log import UserError


def patched(data: bytes, at: int, layout: str, value: float) -> bytes:
    replacement = struct.pack("<" + layout, value)
    return data[:at] + replacement + data[at + len(replacement) :]


# The corpus under attack: 3 documents of one sequence, 700 + 700 + 100 uint16 tokens.
LENGTHS_AT = 34
OFFSETS_AT = LENGTHS_AT + 4 * 3
DOCUMENTS_AT = OFFSETS_AT + 8 * 3
HEADER = "at least the 34 bytes of its header"
CODES = r"1 (uint8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)"
SIZE = "34 + 12 S + 8 D bytes for its sequence count S ="
# Name: (what is done to the .idx, field and value, rule).
INDEX_MUTATIONS = {
    "empty": (lambda b: b"", "its size is 0", HEADER),
    "short header": (lambda b: b[:30], "its size is 30", HEADER),
    "magic": (lambda b: b"X" + b[1:], "its magic", "must be MMIDIDX"),
    "version": (lambda b: patched(b, 9, "Q", 2), "its version is 2", "must be 1"),
    "code unknown": (lambda b: patched(b, 17, "B", 77), "token type code is 77", CODES),
    "code zero": (lambda b: patched(b, 17, "B", 0), "token type code is 0", CODES),
    "code int8": (lambda b: patched(b, 17, "B", 2), "token type code is 2", CODES),
    "code float64": (lambda b: patched(b, 17, "B", 6), "token type code is 6", CODES),
    "code float32": (lambda b: patched(b, 17, "B", 7), "token type code is 7", CODES),
    "code of another size": (
        lambda b: patched(b, 17, "B", 4),
        "byte offset of sequence 1 is 1400",
        "must be 2800, where the sequence before ends",
    ),
    "one sequence more": (lambda b: patched(b, 18, "Q", 4), "its size is 102", SIZE + " 4"),
    "huge sequence count": (
        lambda b: patched(b, 18, "Q", (1 << 64) - 1),
        "sequence count is 18446744073709551615",
        "at most what its 102 bytes can hold",
    ),
    "sequence count that overflows": (
        lambda b: patched(b, 18, "Q", ((1 << 64) + 36) // 12),
        "sequence count is 1537228672809129304",
        "at most what its 102 bytes can hold",
    ),
    "one boundary more": (
        lambda b: patched(b, 26, "Q", 5),
        "its size is 102",
        "document boundary count D = 5",
    ),
    "huge boundary count": (
        lambda b: patched(b, 26, "Q", 1 << 61),
        "its size is 102",
        "document boundary count D = 2305843009213693952",
    ),
    "no boundaries": (
        lambda b: patched(b, 26, "Q", 0),
        "document boundary count is 0",
        "must be at least 1",
    ),
    "cut off": (lambda b: b[:-1], "its size is 101", SIZE),
    "cut off by a boundary": (lambda b: b[:-8], "its size is 94", SIZE),
    "bytes behind": (lambda b: b + b"\0", "its size is 103", SIZE),
    "negative length": (
        lambda b: patched(b, LENGTHS_AT, "i", -1),
        "length of sequence 0 is -1",
        "must be at least 0",
    ),
    "longer sequence": (
        lambda b: patched(b, LENGTHS_AT, "i", 701),
        "byte offset of sequence 1 is 1400",
        "must be 1402",
    ),
    "last sequence longer": (
        lambda b: patched(b, LENGTHS_AT + 8, "i", 101),
        "length of sequence 2 is 101",
        "must be at most 100, as the .bin of 3000 bytes ends there",
    ),
    "last sequence shorter": (
        lambda b: patched(b, LENGTHS_AT + 8, "i", 99),
        "sum of its sequence lengths is 2998 bytes",
        "must be the size of the .bin, 3000 bytes",
    ),
    "wrong offset in range": (
        lambda b: patched(b, OFFSETS_AT + 8, "q", 1402),
        "byte offset of sequence 1 is 1402",
        "must be 1400",
    ),
    "negative offset": (
        lambda b: patched(b, OFFSETS_AT, "q", -2),
        "byte offset of sequence 0 is -2",
        "must be 0",
    ),
    "offset out of range": (
        lambda b: patched(b, OFFSETS_AT + 8, "q", 1 << 62),
        f"byte offset of sequence 1 is {1 << 62}",
        "must be 1400",
    ),
    "first document late": (
        lambda b: patched(b, DOCUMENTS_AT, "q", 1),
        "document boundary 0 is sequence 1",
        "must be 0",
    ),
    "documents unordered": (
        lambda b: patched(patched(b, DOCUMENTS_AT + 8, "q", 2), DOCUMENTS_AT + 16, "q", 1),
        "document boundary 2 is sequence 1",
        "must be in [2, 3]",
    ),
    "document out of range": (
        lambda b: patched(b, DOCUMENTS_AT + 8, "q", 9),
        "document boundary 1 is sequence 9",
        "must be in [0, 3]",
    ),
    "document negative": (
        lambda b: patched(b, DOCUMENTS_AT + 8, "q", -1),
        "document boundary 1 is sequence -1",
        "must be in [0, 3]",
    ),
    "documents end early": (
        lambda b: patched(b, DOCUMENTS_AT + 24, "q", 2),
        "document boundary 3 is sequence 2",
        "must be 3, the number of sequences",
    ),
    "fairseq": (
        lambda b: b[:26] + b[LENGTHS_AT:DOCUMENTS_AT],
        "is a fairseq index",
        "the Megatron format is needed",
    ),
    "fairseq of old": (
        lambda b: b"TNTIDX" + b[6:],
        "is a fairseq index",
        "the Megatron format is needed",
    ),
    "fairseq, Huffman coded": (
        lambda b: b"HUFFIDX" + b[7:],
        "is a fairseq index",
        "the Megatron format is needed",
    ),
    "multimodal": (lambda b: b + b"\0" * 3, "is a multimodal index", "only text"),
}


def refusal(prefix: Path) -> str:
    with pytest.raises(UserError) as caught:
        TokenStore(prefix)
    return str(caught.value)


@pytest.mark.parametrize("name", INDEX_MUTATIONS)
def test_damaged_indices_are_refused(make_corpus, name):
    prefix = make_corpus(1500)
    mutate, field, rule = INDEX_MUTATIONS[name]
    index = prefix.with_name("corpus.idx")
    index.write_bytes(mutate(index.read_bytes()))
    message = refusal(prefix)
    assert message.startswith(f"'{index}' ")
    assert field in message
    assert rule in message.partition(field)[2]


@pytest.mark.parametrize(
    ("mutate", "field", "rule"),
    [
        (lambda b: b[:-2], "length of sequence 2 is 100", "at most 99, as the .bin of 2998 bytes"),
        (lambda b: b + b"\0\0", "lengths is 3000 bytes", "size of the .bin, 3002 bytes"),
        (lambda b: b + b"\0", "lengths is 3000 bytes", "size of the .bin, 3001 bytes"),
        (lambda b: b"", "length of sequence 0 is 700", "at most 0, as the .bin of 0 bytes"),
    ],
    ids=["cut off", "too long", "odd", "empty"],
)
def test_a_bin_of_another_size_is_refused(make_corpus, mutate, field, rule):
    prefix = make_corpus(1500)
    tokens = prefix.with_name("corpus.bin")
    tokens.write_bytes(mutate(tokens.read_bytes()))
    message = refusal(prefix)
    assert field in message
    assert rule in message


def test_the_bin_of_another_corpus_is_refused(make_corpus):
    prefix = make_corpus(1500)
    other = make_corpus(1600, name="other")
    os.replace(f"{other}.bin", f"{prefix}.bin")
    assert "do not belong together" in refusal(prefix)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.idx")
    assert "must be a regular file" in refusal(tmp_path / "c")


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 77), value=st.integers(0, 255))
def test_no_changed_byte_goes_unnoticed(tmp_path_factory, at, value):
    prefix = tmp_path_factory.mktemp("fuzz") / "c"
    with IndexedWriter(prefix, "<u2") as writer:
        writer.add_document(np.arange(300))
        writer.add_document(np.arange(20))
    index = Path(f"{prefix}.idx")
    good = index.read_bytes()
    assert len(good) == 34 + 12 * 2 + 8 * 3
    changed = patched(good, at, "B", value)
    index.write_bytes(changed)
    # The middle boundary may move between documents, and int16 and uint16 look alike; anything
    # else must be refused.
    try:
        store = TokenStore(prefix)
    except UserError:
        assert changed != good
    else:
        assert (store.num_tokens, store.num_documents) == (320, 2)
        assert store.document_lengths(0, 2).sum() == 320
