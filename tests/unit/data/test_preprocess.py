import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megaswitch.data.indexed import TokenStore
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.preprocess import preprocess
from megaswitch.log import UserError

SHIM = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"


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


def documents_of(prefix):
    store = TokenStore(prefix)
    return [store.document(i) for i in range(store.num_documents)]


def texts_of(prefix, tokenizer):
    return [tokenizer.decode(ids) for ids in documents_of(prefix)]


def test_every_document_arrives_once_in_another_order(inputs, tmp_path, tokenizer, capsys, texts):
    report = preprocess(inputs, tmp_path / "out" / "c", tokenizer.path, workers=2)
    store = TokenStore(tmp_path / "out" / "c")
    found = texts_of(tmp_path / "out" / "c", tokenizer)
    assert sorted(found) == sorted(texts)
    assert found != texts
    assert all(
        document[-1] == tokenizer.eos_id for document in documents_of(tmp_path / "out" / "c")
    )
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
        monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 99)
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
    assert 1 not in np.concatenate(documents_of(tmp_path / "c"))


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


def test_a_full_disk_is_explained_and_leaves_nothing_behind(tmp_path, tokenizer, make_text):
    (tmp_path / "a.txt").write_text("\n\n".join(make_text(300)))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from pathlib import Path\n"
        "from megaswitch.data.preprocess import preprocess\n"
        f"preprocess([Path('a.txt')], Path('c'), Path({str(tokenizer.path)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "UserError: cannot write the corpus 'c': File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_unwritable_output_is_explained(inputs, tokenizer):
    with pytest.raises(UserError, match="Choose an output prefix in a folder you may write to"):
        preprocess(inputs, inputs[0] / "c", tokenizer.path)


def run_shim(folder, *arguments):
    command = [sys.executable, SHIM, "--output-prefix", "c", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_megatrons_flags(inputs, tmp_path, tokenizer):
    flags = ["--input", *inputs, "--tokenizer-model", tokenizer.path, "--append-eod"]
    assert run_shim(tmp_path, *flags).returncode == 0
    assert len(documents_of(tmp_path / "c")) == 120
    assert all(document[-1] == tokenizer.eos_id for document in documents_of(tmp_path / "c"))


def test_megatrons_flags_explain_mistakes(inputs, tmp_path):
    done = run_shim(tmp_path, "--input", inputs[0], "--tokenizer-model", "missing.model")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the tokenizer 'missing.model'")
    assert "Traceback" not in done.stderr
