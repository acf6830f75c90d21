import gzip
import json
import lzma
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner

from megaswitch import native
from megaswitch.cli.preprocess import preprocess as preprocess_command
from megaswitch.data.indexed import TokenStore
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.preprocess import preprocess
from megaswitch.data.spool import Spool
from megaswitch.log import UserError

INPUTS = ("a.jsonl", "b.jsonl.gz", "d.jsonl.xz", "e.parquet", "c.txt.zst")


@pytest.fixture(scope="module")
def texts(make_text):
    return make_text(120, seed=3)


@pytest.fixture
def inputs(tmp_path, texts):
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:40]).encode()))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress("\n".join(lines[40:60]).encode()))
    pq.write_table(pa.table({"text": texts[60:80]}), tmp_path / "e.parquet")
    plain = "\n\n".join(texts[80:]).encode()
    (tmp_path / "c.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    return [tmp_path / name for name in INPUTS]


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


def test_the_order_is_the_keyed_permutation(inputs, tmp_path, tokenizer, texts):
    preprocess(inputs, tmp_path / "c", tokenizer.path, seed=5)
    order = native.permute(np.arange(120), size=120, seed=5, epoch=0)
    expected = [[*tokenizer.encode(texts[number]), tokenizer.eos_id] for number in order]
    assert [ids.tolist() for ids in documents_of(tmp_path / "c")] == expected


def test_without_shuffle(inputs, tmp_path, tokenizer, texts):
    preprocess(inputs, tmp_path / "c", tokenizer.path, shuffle=False)
    assert texts_of(tmp_path / "c", tokenizer) == texts


def test_the_order_depends_on_the_seed_alone(inputs, tmp_path, tokenizer, monkeypatch):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        preprocess(inputs, tmp_path / name, tokenizer.path, seed=seed)
        monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 99)
        monkeypatch.setattr("megaswitch.data.preprocess._ORDER_CHUNK", 50)
        monkeypatch.setattr("megaswitch.data.spool._PIECE_TOKENS", 30)
    a, b, c = ((tmp_path / f"{name}.bin").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_files_do_not_depend_on_the_workers(inputs, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 999)
    monkeypatch.setattr("megaswitch.data.workers._AHEAD_BYTES", 2000)
    with inputs[0].open("a") as file:
        file.write("\nnonsense\n" * 30)
    written = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        report = preprocess(
            inputs, folder / "c", tokenizer.path, workers=workers, valid_fraction=0.1
        )
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        written.append((files, report.inputs, report.rejections))
    assert len(written[0][0]) == 7
    assert written[0] == written[1] == written[2]


def test_a_worker_that_dies_is_explained(inputs, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 99)
    started, add = [], Spool.add

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            started.append(self)
            super().__init__(*args, **kwargs)

    def add_and_kill(spool, encoded):
        add(spool, encoded)
        for process in started:
            process.kill()

    monkeypatch.setattr("megaswitch.data.workers.subprocess.Popen", Recorded)
    monkeypatch.setattr(Spool, "add", add_and_kill)
    with pytest.raises(UserError, match=r"was killed, .* Use fewer --workers"):
        preprocess(inputs, tmp_path / "c", tokenizer.path, workers=2)
    assert not list(tmp_path.glob("c.[!t]*"))


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
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "bada"}\nnonsense\n{"text": ""}\n')
    report = preprocess([path], tmp_path / "c", tokenizer.path)
    assert report.documents == 1
    assert report.rejections.count == 2
    assert [r.line for r in report.rejections.first] == [2, 3]
    printed = capsys.readouterr().err
    assert "2 lines passed over" in printed
    assert "a.jsonl:3: the text is empty" in printed
    listed = [json.loads(line) for line in (tmp_path / "c.rejected.jsonl").open()]
    assert [entry["line"] for entry in listed] == [2, 3]
    assert listed[1] == {"file": str(path), "line": 3, "reason": "the text is empty"}
    path.write_text('{"text": "bada"}\n')
    preprocess([path], tmp_path / "c", tokenizer.path)
    assert not (tmp_path / "c.rejected.jsonl").exists()  # of the older corpus


def test_the_report_counts_each_input(inputs, tmp_path, tokenizer):
    inputs[2].write_bytes(lzma.compress(b'nonsense\n{"text": "bada"}\n'))
    result = CliRunner().invoke(
        preprocess_command,
        [
            *map(str, inputs), "--tokenizer", str(tokenizer.path), "--json", "--workers", "1",
            "--output", str(tmp_path / "c"),
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [one["documents"] for one in report["inputs"]] == [20, 20, 1, 20, 40]
    assert [one["rejected"] for one in report["inputs"]] == [0, 0, 1, 0, 0]
    assert [one["bytes"] for one in report["inputs"]] == [path.stat().st_size for path in inputs]
    for name in ("documents", "tokens", "characters", "rejected"):
        assert report[name] == sum(one[name] for one in report["inputs"])
    assert report["tokens"] == TokenStore(tmp_path / "c").num_tokens
    assert report["rejected_file"] == str(tmp_path / "c.rejected.jsonl")


def test_another_field_for_the_text(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "bada", "text": "no"}\n')
    pq.write_table(pa.table({"body": ["kilo"], "text": ["no"]}), tmp_path / "b.parquet")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    preprocess(paths, tmp_path / "c", tokenizer.path, text_field="body", shuffle=False)
    assert texts_of(tmp_path / "c", tokenizer) == ["bada", "kilo"]


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
