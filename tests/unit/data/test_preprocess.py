import gzip
import json

import numpy as np
import pytest
import zstandard

from megaswitch.data.indexed import TokenStore
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.preprocess import preprocess
from megaswitch.log import UserError


@pytest.fixture(scope="module")
def texts(make_text):
    return make_text(120, seed=3)


@pytest.fixture
def inputs(tmp_path, texts):
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:40]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[40:80]).encode()))
    plain = "\n\n".join(texts[80:]).encode()
    (tmp_path / "c.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    return [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt.zst")]


def texts_of(prefix, tokenizer):
    return [tokenizer.decode(ids) for ids in TokenStore(prefix)]


def test_every_document_arrives_once_in_another_order(inputs, tmp_path, tokenizer, capsys, texts):
    report = preprocess(inputs, tmp_path / "out" / "c", tokenizer.path, workers=2)
    store = TokenStore(tmp_path / "out" / "c")
    found = texts_of(tmp_path / "out" / "c", tokenizer)
    assert sorted(found) == sorted(texts)
    assert found != texts
    assert all(document[-1] == tokenizer.eos_id for document in store)
    assert store.dtype == np.dtype("<u2")
    assert (report.documents, report.tokens) == (120, store.num_tokens)
    assert report.input_bytes == sum(path.stat().st_size for path in inputs)
    assert report.characters == sum(map(len, texts))
    assert report.rejections.count == 0
    assert store.meta.tokenizer_sha256 == tokenizer.sha256
    assert (store.meta.vocab_size, store.meta.num_extra_ids) == (600, 100)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["c.bin", "c.idx", "c.meta.json"]
    assert "120 documents" in capsys.readouterr().err


def test_the_order_depends_on_the_seed_alone(inputs, tmp_path, tokenizer, monkeypatch):
    for name, workers, seed in [("a", 1, 0), ("b", 2, 0), ("c", 1, 1)]:
        preprocess(inputs, tmp_path / name, tokenizer.path, workers=workers, seed=seed)
        monkeypatch.setattr("megaswitch.data.preprocess._BATCH_DOCUMENTS", 7)
        monkeypatch.setattr("megaswitch.data.preprocess._ORDER_CHUNK", 50)
    a, b, c = ((tmp_path / f"{name}.bin").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_held_out_documents(inputs, tmp_path, tokenizer, texts):
    report = preprocess(inputs, tmp_path / "c", tokenizer.path, valid_fraction=0.1)
    train, valid = (texts_of(tmp_path / f"c_{part}", tokenizer) for part in ("train", "valid"))
    assert (len(train), len(valid)) == (108, 12)
    assert sorted(train + valid) == sorted(texts)
    assert {prefix.name for prefix in report.prefixes} == {"c_train", "c_valid"}
    assert not (tmp_path / "c.bin").exists()


def test_without_eos(inputs, tmp_path, tokenizer):
    preprocess(inputs, tmp_path / "c", tokenizer.path, append_eos=False)
    assert 1 not in np.concatenate(list(TokenStore(tmp_path / "c")))


def test_the_result_trains(inputs, tmp_path, tokenizer):
    preprocess(inputs, tmp_path / "c", tokenizer.path)
    loader = SpanCorruptionLoader(
        tmp_path / "c", seed=0, vocab_size=640, encoder_length=64, shuffle=False
    )
    batch = loader.batch(range(2))
    assert "<extra_id_0>" in tokenizer.decode(batch.encoder_tokens[0].tolist())
    assert tokenizer.decode(batch.decoder_targets[0].tolist()).startswith("<extra_id_0> ")


def test_bad_lines_are_reported(tmp_path, tokenizer, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "bada"}\nnonsense\n{"text": ""}\n')
    report = preprocess([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer.path)
    assert report.documents == 1
    assert report.rejections.count == 2
    assert [r.line for r in report.rejections.first] == [2, 3]
    printed = capsys.readouterr().err
    assert "2 lines passed over" in printed
    assert "a.jsonl:3: the text is empty" in printed


def test_texts_without_tokens_are_reported(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "\\u200b"}\n{"text": "bada"}\n')
    report = preprocess([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer.path)
    assert report.documents == 1
    assert report.rejections.first[0].reason == "the text has no tokens"


@pytest.mark.parametrize("content", ["", "\n\n", "nonsense\n"])
def test_nothing_usable_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="no usable document"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "c", tokenizer.path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_damaged_input_leaves_nothing_behind(inputs, tmp_path, tokenizer):
    inputs[1].write_bytes(inputs[1].read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz' is cut off"):
        preprocess(inputs, tmp_path / "c", tokenizer.path)
    assert not list(tmp_path.glob("c.[!t]*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_fraction": 1.0}, "valid_fraction is 1.0"),
        ({"valid_fraction": 0.999}, "leaves none to train on"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"inputs": []}, "none given"),
        ({"tokenizer_path": "missing.model"}, "cannot read the tokenizer"),
    ],
)
def test_mistakes_are_explained(inputs, tmp_path, tokenizer, changes, message):
    arguments = {
        "inputs": inputs,
        "output_prefix": tmp_path / "c",
        "tokenizer_path": tokenizer.path,
        **changes,
    }
    with pytest.raises(UserError, match=message):
        preprocess(**arguments)
