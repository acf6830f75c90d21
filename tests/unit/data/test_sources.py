"""Names of sources, and text sorted into them."""

import gzip
import json
from pathlib import Path

import pytest

from megaswitch.data import sources as module
from megaswitch.data.indexed import TokenStore
from megaswitch.data.sources import parse_data, tokenize_sources
from megaswitch.log import UserError


@pytest.fixture
def files(tmp_path):
    """Empty files of these names; returns their paths."""

    def make(*names: str) -> list[str]:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return [str(tmp_path / name) for name in names]

    return make


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("de.valid.jsonl.zst", "de.valid"),
        ("books.txt.gz", "books"),
        ("notes.txt", "notes"),
        ("corpus.v2_valid", "corpus.v2_valid"),
    ],
)
def test_names_come_from_file_names(files, file, name):
    pair = name == file
    (path, *_) = files(*([f"{file}.bin", f"{file}.idx"] if pair else [file]))
    given = path.removesuffix(".bin")
    for argument in {given, path}:
        (found,) = parse_data([argument])
        assert (found.name, found.path, found.is_text) == (name, Path(given), not pair)


def test_a_name_that_is_given_counts_and_a_path_may_hold_the_sign(files):
    path, hive = files("a.txt", "lang=de/part.jsonl")
    assert [f.name for f in parse_data([f"mine={path}", hive])] == ["mine", "part"]
    assert parse_data([f"x={hive}"])[0].path == Path(hive)


def test_files_of_one_name_go_by_their_folders(files):
    paths = files("de/valid.txt", "fr/valid.txt", "other.txt")
    assert [f.name for f in parse_data(paths)] == ["de/valid", "fr/valid", "other"]
    with pytest.raises(UserError, match="several sources are called x; give each a name"):
        parse_data([f"x={paths[0]}", f"x={paths[1]}"])
    with pytest.raises(UserError, match=r"given more than once: '.*other.txt'"):
        parse_data([paths[2], f"y={paths[2]}"])


def test_what_is_not_there_is_named(files, tmp_path):
    for argument in ("none", "name=none"):
        with pytest.raises(UserError, match="there is no data 'none'; give the prefix of"):
            parse_data([argument])
    with pytest.raises(UserError, match="there is no data"):
        parse_data([str(tmp_path)])


def test_only_json_lines_can_be_split(files):
    table, text = files("a.jsonl.gz", "b.txt")
    assert parse_data([table], "lang")
    with pytest.raises(UserError, match=r"--by lang splits JSON lines .*b.txt' has none"):
        parse_data([table, text], "lang")


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def split(tmp_path, tokenizer, paths, *, by="lang", least_tokens=1):
    folder = tmp_path / "made"
    folder.mkdir()
    made = tokenize_sources(
        parse_data([str(p) for p in paths], by), tokenizer, folder, least_tokens=least_tokens, by=by
    )
    expected = {f"source-{i}{s}" for i in range(len(made)) for s in (".bin", ".idx", ".meta.json")}
    assert {p.name for p in folder.iterdir()} == expected
    return {source.name: source for source in made}


def test_values_over_all_files_are_sources(tmp_path, tokenizer):
    one = write(tmp_path / "one.jsonl", [
        {"text": "bada", "lang": "de"}, {"text": "bada kolo", "lang": "fr"}, {"text": "none"},
        {"text": "x", "lang": ""}, {"text": "x", "lang": None}, {"text": "y", "lang": 7},
        {"text": "z", "lang": ["a", True]}, {"text": "w", "lang": "a\nb"},
    ])  # fmt: skip
    two = tmp_path / "two.jsonl.gz"
    two.write_bytes(gzip.compress(b'{"text": "mila", "lang": "de"}'))
    made = split(tmp_path, tokenizer, [one, two])
    assert list(made) == ['"a\\nb"', "(no lang)", "7", '["a", true]', "de", "fr"]
    store = TokenStore(made["de"].prefix)
    texts = {tokenizer.decode(store.document(i)) for i in range(store.num_documents)}
    assert texts == {"bada", "mila"}
    assert TokenStore(made["(no lang)"].prefix).num_documents == 3


def test_a_named_file_keeps_its_values_apart(tmp_path, tokenizer):
    records = [{"text": "bada", "lang": "de"}]
    one, two = (write(tmp_path / f"{n}.jsonl", records) for n in ("one", "two"))
    made = split(tmp_path, tokenizer, [one, f"second={two}"])
    assert list(made) == ["de", "second/de"]


def test_values_too_rare_to_stand_alone_share_a_source(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(module, "_MOST_SOURCES", 3)
    sizes = {"a": 50, "b": 40, "c": 30, "d": 20, "e": 2}
    path = write(
        tmp_path / "x.jsonl",
        [{"text": " ".join(["bada"] * size), "lang": lang} for lang, size in sizes.items()],
    )
    made = split(tmp_path, tokenizer, [path], least_tokens=10)
    assert list(made) == ["a", "b", "c", "(other)"]
    assert TokenStore(made["(other)"].prefix).num_documents == 2
    assert "2 of 5 values of 'lang'" in capsys.readouterr().err


def test_values_called_like_our_names_are_kept_apart(tmp_path, tokenizer):
    sizes = {"(other)": 50, "(no lang)": 40, None: 30, "d": 3, "e": 3}
    path = write(
        tmp_path / "x.jsonl",
        [{"text": " ".join(["bada"] * size), "lang": lang} for lang, size in sizes.items()],
    )
    made = split(tmp_path, tokenizer, [path], least_tokens=10)
    assert list(made) == ['"(no lang)"', '"(other)"', "(no lang)", "(other)"]
    assert [TokenStore(s.prefix).num_documents for s in made.values()] == [1, 1, 1, 2]


def test_values_too_rare_even_together_are_left_out_aloud(tmp_path, tokenizer, capsys):
    path = write(
        tmp_path / "x.jsonl",
        [{"text": "bada " * 50, "lang": "a"}, {"text": "bada", "lang": "b"}],
    )
    assert list(split(tmp_path, tokenizer, [path], least_tokens=10)) == ["a"]
    assert "are left out: together they are too short for one sample: b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("by", "least_tokens", "message"),
    [
        ("nothing", 1, "no document has a value in the field 'nothing'"),
        ("lang", 100, "one sample takes 100 tokens, and all documents together have"),
        (None, 100, r"one sample takes 100 tokens, and fewer are in x \("),
        ("id", 1, "the field 'id' has more than 3 values"),
    ],
)
def test_unusable_text_is_refused(tmp_path, tokenizer, monkeypatch, by, least_tokens, message):
    monkeypatch.setattr(module, "_MOST_VALUES", 3)
    path = write(
        tmp_path / "x.jsonl", [{"text": "bada", "lang": "de", "id": number} for number in range(4)]
    )
    with pytest.raises(UserError, match=message):
        split(tmp_path, tokenizer, [path], by=by, least_tokens=least_tokens)


def test_a_file_without_text_is_named(tmp_path, tokenizer):
    full, empty = write(tmp_path / "full.jsonl", [{"text": "bada"}]), tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match=r"fewer are in empty \(0\)"):
        split(tmp_path, tokenizer, [full, empty], by=None)


def test_a_full_disk_is_said(tmp_path, tokenizer, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.IndexedWriter, "add_document", full)
    path = write(tmp_path / "x.jsonl", [{"text": "bada"}])
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        split(tmp_path, tokenizer, [path], by=None)
