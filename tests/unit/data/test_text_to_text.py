"""JSON lines of pairs to two corpora, and a training run on them."""

import json

import pytest

from megaswitch.data.document_loader import DocumentLoader
from megaswitch.data.indexed import TokenStore
from megaswitch.data.text_to_text import preprocess_pairs
from megaswitch.log import UserError

PAIRS = [("ba da", "ka"), ("da <extra_id_0> ga", "<extra_id_0> ba"), ("mo " * 30, "no")]


def write(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def records(pairs):
    return [{"inputs": i, "targets": t, "other": 1} for i, t in pairs]


def test_pairs_become_two_corpora_in_their_order(tmp_path, tokenizer, tokenizer_path):
    paths = [
        write(tmp_path / "a.jsonl", records(PAIRS[:2])),
        write(tmp_path / "b.jsonl", records(PAIRS[2:])),
    ]
    report = preprocess_pairs(paths, tmp_path / "c", tokenizer_path)
    stores = [TokenStore(tmp_path / f"c_{side}") for side in ("inputs", "targets")]
    for number, pair in enumerate(PAIRS):
        for store, text in zip(stores, pair, strict=True):
            assert store.document(number).tolist() == tokenizer.encode(text)
    assert tokenizer.sentinel_id(0) in stores[0].document(1)
    assert report.documents == 3
    assert report.tokens == sum(store.num_tokens for store in stores)


def test_bad_lines_are_passed_over_and_told(tmp_path, tokenizer_path):
    bad = [
        "not json", "[]", {"inputs": "ba"}, {"inputs": 1, "targets": "da"},
        {"inputs": " ", "targets": "da"}, '{"inputs": "\\ud800", "targets": "da"}', "",
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", [*bad, *records(PAIRS)])
    report = preprocess_pairs([path], tmp_path / "c", tokenizer_path)
    assert report.documents == 3
    assert report.rejections.count == 6  # an empty line is none
    reasons = [r.reason for r in report.rejections.first]
    assert reasons[2] == "no string under 'targets'"
    assert [r.line for r in report.rejections.first][:3] == [1, 2, 3]


def test_unusable_inputs_are_refused(tmp_path, tokenizer_path):
    path = write(tmp_path / "a.jsonl", [{"text": "ba"}])
    with pytest.raises(UserError, match=r"no usable pair .*no string under 'inputs'"):
        preprocess_pairs([path], tmp_path / "c", tokenizer_path)
    assert not list(tmp_path.glob("c*"))
    plain = write(tmp_path / "a.txt", ["ba"])
    with pytest.raises(UserError, match="pairs are read from JSON lines"):
        preprocess_pairs([plain], tmp_path / "c", tokenizer_path)


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_are_samples_of_the_loader(tmp_path, tokenizer, tokenizer_path, packing):
    path = write(tmp_path / "a.jsonl", records(PAIRS))
    preprocess_pairs([path], tmp_path / "c", tokenizer_path)
    loader = DocumentLoader(
        tmp_path / "c", objective="text-to-text", packing=packing, seed=0,
        vocab_size=tokenizer.vocab_size, encoder_length=200, decoder_length=20,
    )  # fmt: skip
    assert loader.samples_per_epoch == (1 if packing else 3)
    batch = loader.batch(range(loader.samples_per_epoch))
    rows = zip(batch.encoder_tokens.tolist(), batch.decoder_targets.tolist(), strict=True)
    texts = {(tokenizer.decode(source), tokenizer.decode(target)) for source, target in rows}
    if packing:
        ((source, target),) = texts
        assert all(i.strip() in source and t in target for i, t in PAIRS)
    else:
        assert texts == {(i.strip(), t) for i, t in PAIRS}
