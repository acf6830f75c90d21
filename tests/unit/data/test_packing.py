"""Rows of documents: the core equals its oracle, rows are full, and no file of rows is trusted."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch import native
from megaswitch.data.indexed import IndexedWriter, TokenStore
from megaswitch.data.packing import SHORTEST, WINDOW, cut, in_file_order, open_rows, pack
from megaswitch.log import UserError


def write(prefix, lengths, *, ids=None):
    with IndexedWriter(prefix, "<u2") as writer:
        for number, length in enumerate(lengths):
            writer.add_document(np.full(length, 3 + number % 900) if ids is None else ids[number])
    return TokenStore(prefix)


def texts(store, *, ends_in_eos=False, vocab_size=1000):
    return native.Texts(store.native, ends_in_eos=ends_in_eos, vocab_size=vocab_size)


def pairs(folder, rooms, lengths):
    """Pairs that take these rooms, so that any rooms can be packed by the core."""
    stores = [write(folder / str(side), [r[side] - 1 for r in rooms]) for side in (0, 1)]
    return native.TextPairs(
        *map(texts, stores), encoder_length=lengths[0], decoder_length=lengths[1]
    )


def native_rows(folder, pieces, lengths, packed=True):
    shape = native.RowShape(encoder_length=lengths[0], decoder_length=lengths[1], packed=packed)
    index = open_rows(folder / "c", pieces, shape, {"test": 1})
    return index, [index.row(r) for r in range(index.rows)]


@given(length=st.integers(0, 500), longest=st.integers(3, 60))
def test_pieces_cover_a_document_and_none_is_too_short(length, longest):
    pieces = cut(length, longest)
    assert sum(count for _, count in pieces) == (length if length >= SHORTEST else 0)
    assert all(SHORTEST <= count <= longest for _, count in pieces)
    assert [start for start, _ in pieces] == [
        sum(c for _, c in pieces[:i]) for i in range(len(pieces))
    ]
    assert all(count >= longest - 1 for _, count in pieces[:-1])


def random_rooms(seed, count, lengths):
    random = np.random.default_rng(seed)
    kind = seed % 3
    if kind == 0:
        sizes = random.uniform(0, 1, (count, 2))
    elif kind == 1:
        sizes = random.lognormal(-2, 1, (count, 1)) * random.uniform(0.8, 1.2, (count, 2))
    else:
        sizes = random.choice([0.1, 0.25, 0.5, 1.0], (count, 2))
    rooms = np.clip(np.ceil(sizes * lengths), 1, lengths).astype(int)
    return [(int(a), int(b)) for a, b in rooms]


@pytest.mark.parametrize("seed", range(6))
def test_the_core_packs_as_the_oracle(tmp_path, seed):
    lengths = [(512, 114), (64, 64), (7, 300)][seed // 2]
    rooms = random_rooms(seed, WINDOW + 2000, lengths)  # one window is not full
    _, rows = native_rows(tmp_path, pairs(tmp_path, rooms, lengths), lengths)
    expected = in_file_order(pack(rooms, *lengths))
    assert rows == [[(piece, 0) for piece in row] for row in expected]


@settings(deadline=None)
@given(
    rooms=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), max_size=60),
    window=st.integers(1, 20),
)
def test_every_piece_is_in_one_row_and_rows_fit(rooms, window):
    rows = pack(rooms, 20, 9, window)
    assert sorted(piece for row in rows for piece in row) == list(range(len(rooms)))
    for row in rows:
        assert sum(rooms[p][0] for p in row) <= 20
        assert sum(rooms[p][1] for p in row) <= 9
        assert max(p // window for p in row) == min(p // window for p in row)


def test_rows_by_hand():
    # By falling size 6, 5, 4, 3, 2: 6 opens a row, 5 another; 4 fits the fuller first, 3 and 2
    # the second.
    rooms = [(3, 1), (6, 1), (4, 1), (2, 1), (5, 1)]
    assert pack(rooms, 10, 100) == [[1, 2], [0, 3, 4]]


def test_best_fit_fills_rows_of_documents_like_the_web():
    random = np.random.default_rng(0)
    documents = np.maximum(random.lognormal(5.8, 1.0, 20_000).astype(int), SHORTEST)
    pieces = [count for n in documents for _, count in cut(int(n), 511)]
    rooms = [(count + 1, 1) for count in pieces]
    filled = sum(r for r, _ in rooms)
    best = filled / (512 * len(pack(rooms, 512, 10_000)))
    left, next_fit = 0, 0
    for room, _ in rooms:  # what packing in order would give
        if room > left:
            next_fit, left = next_fit + 1, 512
        left -= room
    assert best > 0.98
    assert filled / (512 * next_fit) < 0.9


def test_without_packing_a_row_is_a_piece_in_the_order_of_the_corpus(tmp_path):
    store = write(tmp_path / "d", [5, 1, 12, 0, 11, 2])
    pieces = native.PrefixDocuments(texts(store), longest=5)
    _, rows = native_rows(tmp_path, pieces, (5, 5), packed=False)
    assert rows == [[(0, 0)], [(2, 0)], [(2, 1)], [(2, 2)], [(4, 0)], [(4, 1)], [(4, 2)], [(5, 0)]]


def test_a_corpus_without_a_piece_is_refused(tmp_path):
    store = write(tmp_path / "d", [1, 0, 1])
    pieces = native.PrefixDocuments(texts(store), longest=5)
    with pytest.raises(UserError, match="no document of at least 2 tokens"):
        native_rows(tmp_path, pieces, (5, 5))
    assert not list(tmp_path.glob("*.partial"))


# ---------------------------------------------------------------- the file


@pytest.fixture
def opened(tmp_path):
    """(path of the file of rows, what opens it again, its rows)."""
    rooms = random_rooms(1, 300, (40, 20))
    pieces = pairs(tmp_path, rooms, (40, 20))
    shape = native.RowShape(encoder_length=40, decoder_length=20, packed=True)
    index = open_rows(tmp_path / "c", pieces, shape, {"corpus": "a"})
    (path,) = tmp_path.glob("c.*.rows")

    def again(settings=("corpus", "a")):
        return open_rows(tmp_path / "c", pieces, shape, dict([settings]))

    def straight():
        return native.RowIndex(str(path), path.read_bytes()[8:40], pieces, shape)

    return path, again, straight, [index.row(r) for r in range(index.rows)]


def test_a_file_of_rows_is_small_and_made_once(opened):
    path, again, _, rows = opened
    before = path.stat()
    pieces = sum(map(len, rows))
    assert before.st_size <= 8 * pieces + 56 + 8 * max(map(len, rows))
    again()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_other_settings_have_a_file_of_their_own(opened, tmp_path):
    _, again, _, _ = opened
    again(("corpus", "b"))
    assert len(list(tmp_path.glob("c.*.rows"))) == 2


def values(data):
    return list(struct.unpack(f"<{len(data) // 8}Q", data))


def damage(position, change):
    def apply(data):
        numbers = values(data)
        numbers[position] = change(numbers[position]) % (1 << 64)
        return struct.pack(f"<{len(numbers)}Q", *numbers)

    return apply


def swap_sizes(data):
    """A row that is too long: the last piece of a full row gives way to a large one."""
    numbers = values(data)
    first = 7 + numbers[6]
    numbers[first], numbers[-1] = numbers[-1], numbers[first]
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def name_twice(data):
    """Each row fits, but a piece is there twice and another not at all."""
    numbers = values(data)
    first = 7 + numbers[6]
    numbers[first] = numbers[first + 1]
    return struct.pack(f"<{len(numbers)}Q", *numbers)


DAMAGE = {
    "empty": (lambda data: b"", "no file of rows has"),
    "header cut off": (lambda data: data[:48], "no file of rows has"),
    "odd size": (lambda data: data[:-3], "no file of rows has"),
    "a piece cut off": (lambda data: data[:-8], "its size does not fit"),
    "a piece too many": (lambda data: data + bytes(8), "its size does not fit"),
    "magic": (lambda data: b"X" + data[1:], "does not begin with"),
    "pieces": (damage(5, lambda n: n + 1), "its size does not fit"),
    "pieces overflow": (damage(5, lambda n: -1), "its size does not fit"),
    "classes": (damage(6, lambda n: n + 1), "its size does not fit"),
    "classes overflow": (damage(6, lambda n: -1), "its size does not fit"),
    "rows of a class": (damage(7, lambda n: n - 1), "belong to no row|longer|not every"),
    "rows overflow": (damage(8, lambda n: 1 << 63), "more than it holds"),
    "unknown document": (damage(-1, lambda n: 1 << 60), "which the corpus has not"),
    "unknown part": (damage(-1, lambda n: n + 1), "which the corpus has not"),
    "too long a row": (swap_sizes, "longer than the rows"),
    "a piece twice": (name_twice, "not every part of every document"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_found_out_and_made_again(opened, name, capsys):
    path, again, straight, rows = opened
    whole = path.read_bytes()
    change, message = DAMAGE[name]
    path.write_bytes(change(whole))
    assert path.read_bytes() != whole
    if name != "empty" and len(path.read_bytes()) >= 40:
        with pytest.raises(native.DataError, match=message):
            straight()
    index = again()
    assert [index.row(r) for r in range(index.rows)] == rows
    assert path.read_bytes() == whole
    assert "it is made again" in " ".join(capsys.readouterr().err.split())


def test_rows_of_another_corpus_are_found_out(opened, tmp_path):
    path, _, _, _ = opened
    key = path.read_bytes()[8:40]
    shape = native.RowShape(encoder_length=40, decoder_length=20, packed=True)
    other = tmp_path / "other"
    other.mkdir()
    longer = pairs(other, [(39, 19)] * 300, (40, 20))
    with pytest.raises(native.DataError, match="longer than the rows"):
        native.RowIndex(str(path), key, longer, shape)
    more = pairs(other, random_rooms(1, 301, (40, 20)), (40, 20))
    with pytest.raises(native.DataError, match="cannot be used"):
        native.RowIndex(str(path), key, more, shape)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    store = write(tmp_path / "d", [5, 6])
    pieces = native.PrefixDocuments(texts(store), longest=6)

    def fail(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("megaswitch.data.packing._make", fail)
    with pytest.raises(UserError, match=r"Read-only file system.*someone who may write there"):
        native_rows(tmp_path, pieces, (6, 6))
