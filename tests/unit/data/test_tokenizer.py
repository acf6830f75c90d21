import gzip
import json
import subprocess
import sys

import pytest
import sentencepiece

from megaswitch.data.tokenizer import Tokenizer, train_tokenizer
from megaswitch.log import UserError

VOCAB = 600


def test_conventions_of_t5(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.sentinel_id(0) == VOCAB - 1
    assert tokenizer.sentinel_id(99) == VOCAB - 100
    assert len(tokenizer.sha256) == 64
    assert tokenizer.info.vocab_size == VOCAB
    assert tokenizer.info.num_extra_ids == 100


def test_text_round_trips(tokenizer, make_text):
    for text in [*make_text(20, seed=5), "Ünïcödé 東京 🚀", "tabs and <angles>"]:
        ids = tokenizer.encode(text)
        assert max(ids) < VOCAB - 100
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == text


def test_sentinels(tokenizer):
    text = "<extra_id_0> bada <extra_id_99> kilo <extra_id_1>"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= VOCAB - 100] == [VOCAB - 1, VOCAB - 100, VOCAB - 2]
    assert tokenizer.decode(ids) == text


def test_sentinels_that_do_not_exist_are_text(tokenizer_path):
    few = Tokenizer(tokenizer_path, num_extra_ids=2)
    assert few.vocab_size == VOCAB - 98
    ids = few.encode("<extra_id_2> a")
    assert max(ids) < VOCAB - 100
    assert few.decode(ids) == "<extra_id_2> a"


def test_batches_equal_single_texts_but_take_sentinels_for_text(tokenizer, make_text):
    texts = make_text(50, seed=9)
    expected = [tokenizer.encode(t) for t in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    ended = [ids.tolist() for ids in tokenizer.encode_batch(texts, eos=True)]
    assert ended == [[*ids, tokenizer.eos_id] for ids in expected]
    (ids,) = tokenizer.encode_batch(["<extra_id_0>"])
    assert max(ids) < VOCAB - 100


def test_ids_beyond_the_vocabulary_are_unknown(tokenizer):
    assert tokenizer.decode([VOCAB, -1]) == tokenizer.decode([2, 2])


def test_all_kinds_of_inputs_and_the_same_file_twice(tmp_path, make_text):
    texts = make_text(300)
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:150]))
    lines = "\n".join(json.dumps({"text": text}) for text in texts[150:])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(f"not json\n{lines}".encode()))
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl.gz"]
    for name in ("one.model", "two.model"):
        train_tokenizer(inputs, tmp_path / "new" / name, vocab_size=500)
    one, two = (Tokenizer(tmp_path / "new" / name) for name in ("one.model", "two.model"))
    assert one.vocab_size == 500
    assert one.sha256 == two.sha256
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["one.model", "two.model"]


def test_long_lines_are_not_lost(tmp_path, make_text):
    (tmp_path / "a.txt").write_text(" ".join(make_text(300)) + " " + "字" * 5_000)
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=500)
    assert len(Tokenizer(tmp_path / "t.model").encode("字字字字")) <= 5  # bytes would be 13


@pytest.mark.parametrize("vocab_size", [370, 100_000])
def test_sizes_that_do_not_suit_the_text(tmp_path, vocab_size, make_text):
    (tmp_path / "a.txt").write_text("\n".join(make_text(50)))
    with pytest.raises(UserError, match=f"no tokenizer of vocab_size {vocab_size}") as caught:
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=vocab_size)
    assert "SentencePiece says: Vocabulary size" in str(caught.value)
    assert ".cc(" not in str(caught.value)
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 359}, r"vocab_size is 359; .* Choose 360 or more"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 259, "num_sentinels": 0}, "Choose 260 or more"),
        ({"character_coverage": 0.0}, r"character_coverage is 0\.0"),
        ({"character_coverage": 0.97}, r"SentencePiece takes \[0\.98, 1\]"),
        ({"character_coverage": 1.01}, r"character_coverage is 1\.01"),
        ({"character_coverage": float("nan")}, "character_coverage is nan"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1025}, r"threads is 1025; it must lie in \[1, 1024\]"),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(
            [tmp_path / "missing"], tmp_path / "t.model", **{"vocab_size": 500, **changes}
        )


def test_a_full_disk_is_explained_and_leaves_nothing_behind(tmp_path, make_text):
    (tmp_path / "a.txt").write_text("\n".join(make_text(300)))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from pathlib import Path\n"
        "from megaswitch.data.tokenizer import train_tokenizer\n"
        "train_tokenizer([Path('a.txt')], Path('new/t.model'), vocab_size=500)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "UserError: cannot write the tokenizer 'new/t.model': File too large" in done.stderr
    assert list((tmp_path / "new").iterdir()) == []


def test_an_unwritable_output_is_explained(tmp_path, make_text):
    (tmp_path / "a.txt").write_text("\n".join(make_text(300)))
    with pytest.raises(UserError, match=r"cannot write the tokenizer '.*a\.txt/t\.model'"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "a.txt" / "t.model", vocab_size=500)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no lines passed over"),
        (b"\n \n", "no lines passed over"),
        ("\u200b\n".encode(), "no lines passed over"),
        (b"\xff\xfe\n" * 3, r"3 lines passed over, the first at .*a\.txt:1: not UTF-8"),
    ],
    ids=["empty", "blank", "invisible", "not UTF-8"],
)
def test_inputs_without_text_are_refused(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"the inputs hold no usable text \({reason}\)"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", vocab_size=500)


def test_damaged_inputs_are_refused_by_name(tmp_path, make_text):
    whole = gzip.compress("\n".join(make_text(300)).encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.txt\.gz' is cut off"):
        train_tokenizer([tmp_path / "a.txt.gz"], tmp_path / "t.model", vocab_size=500)
    assert not (tmp_path / "t.model").exists()


def test_files_that_are_no_tokenizer_are_refused(tmp_path, tokenizer_path):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(UserError, match=r"cannot read the tokenizer '.*': Is a directory"):
        Tokenizer(tmp_path)
    # SentencePiece quotes the byte's broken name, which is not UTF-8, in its message.
    broken_byte = tokenizer_path.read_bytes().replace(b"<0x3F>", b"\xdc0x3F>")
    for content in (b"", b"not a model", bytes(range(256)) * 20, broken_byte):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="is not a SentencePiece model"):
            Tokenizer(tmp_path / "bad.model")


def test_other_conventions_are_refused(tmp_path, make_text):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_text(100)),
        model_prefix=str(tmp_path / "other"),
        vocab_size=150,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"has the ids \(-1, 2, 0\)"):
        Tokenizer(tmp_path / "other.model")
