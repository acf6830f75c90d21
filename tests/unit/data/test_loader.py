import json
import os
import threading

import numpy as np
import pytest
import torch

from megaswitch.data.indexed import IndexedWriter, TokenizerInfo, TokenStore
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.philox import KeyedPermutation, Random, Stream
from megaswitch.data.samples import text_mask
from megaswitch.data.span_corruption import corrupt, span_counts
from megaswitch.log import UserError

SETTINGS = {"seed": 7, "vocab_size": 1100, "encoder_length": 32}
RAW = 34  # tokens of a sample at encoder_length 32
DECODER = 8
FIELDS = ["encoder_tokens", "decoder_tokens", "decoder_targets", "encoder_mask", "decoder_mask"]


def info(vocab_size=1100, num_extra_ids=100):
    return TokenizerInfo("0" * 64, vocab_size, num_extra_ids)


@pytest.fixture
def prefix(make_corpus):
    return make_corpus(10_000)


def test_default_shape_is_that_of_t5(make_corpus):
    loader = SpanCorruptionLoader(
        make_corpus(20_000), seed=1, vocab_size=32_128, encoder_length=512
    )
    batch = loader.batch(range(4))
    assert loader.tokens_per_sample == 568
    assert batch.encoder_tokens.shape == (4, 512)
    assert batch.decoder_targets.shape == (4, 114)
    assert bool(batch.encoder_mask.all())
    assert bool(batch.decoder_mask.all())
    assert (batch.encoder_tokens >= 32_128 - 100).sum(1).tolist() == [28] * 4
    assert {getattr(batch, field).dtype for field in FIELDS} == {torch.int32, torch.bool}


def test_random_roll_pads_the_texts_whose_spans_stay_whole(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS, random_roll=True)
    batch = loader.batch(range(200))
    for mask, tokens in [
        (batch.encoder_mask, batch.encoder_tokens),
        (batch.decoder_mask, batch.decoder_targets),
    ]:
        ends = mask.sum(1) - 1
        assert set((tokens.shape[1] - 1 - ends).tolist()) == {0, 1}
        assert torch.equal(mask, torch.arange(tokens.shape[1]) <= ends[:, None])
        assert bool((tokens[torch.arange(200), ends] == 1).all())
    assert torch.equal(batch.encoder_mask.all(1), batch.decoder_mask.all(1))


def test_the_pad_id_within_a_text_is_no_padding():
    tokens = torch.tensor([[5, 0, 0, 7, 1, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.int32)
    assert text_mask(tokens).sum(1).tolist() == [5, 3]


@pytest.mark.parametrize("dtype", ["<u2", "<i2", "<i4", "<i8"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_equal_the_oracle(make_corpus, dtype, shuffle):
    prefix = make_corpus(3_000, dtype=dtype)
    loader = SpanCorruptionLoader(prefix, **SETTINGS, decoder_length=12, shuffle=shuffle)
    store = TokenStore(prefix)
    per_epoch = loader.samples_per_epoch
    indices = [0, 5, per_epoch - 1, per_epoch, 3 * per_epoch + 2]
    batch = loader.batch(indices)
    noise, spans = span_counts(RAW, 0.15, 3.0)
    for row, index in enumerate(indices):
        epoch, position = divmod(index, per_epoch)
        start = position * RAW
        if shuffle:
            order = KeyedPermutation(per_epoch, seed=7, epoch=epoch)
            choices = min(RAW - 1, 3_000 - per_epoch * RAW) + 1
            offset = Random(7, epoch, Stream.EPOCH_OFFSET).below(choices)
            start = offset + order[position] * RAW
        assert loader.sample_start(index) == start
        expected = corrupt(
            store.tokens(start, RAW),
            noise_tokens=noise,
            spans=spans,
            sentinel_top=1100,
            encoder_length=32,
            decoder_length=12,
            seed=7,
            sample_index=index,
        )
        for field, tokens in zip(FIELDS, expected, strict=False):
            assert np.array_equal(getattr(batch, field)[row].numpy(), tokens)
    assert torch.equal(batch.encoder_mask, batch.encoder_tokens != 0)
    assert torch.equal(batch.decoder_mask, batch.decoder_targets != 0)
    assert batch.sample_index.tolist() == indices


def test_a_sample_depends_on_its_index_alone(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    together = loader.batch(range(700))
    again = SpanCorruptionLoader(prefix, **SETTINGS)
    shuffled = np.random.default_rng(0).permutation(700).tolist()
    apart = again.batch(shuffled)
    for field in FIELDS:
        assert torch.equal(getattr(together, field)[shuffled], getattr(apart, field))
    single = again.batch([699])
    assert torch.equal(single.encoder_tokens[0], together.encoder_tokens[699])
    assert len(loader.batch([])) == 0


def test_threads_do_not_disturb_each_other(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    expected = [loader.batch(range(i * 200, i * 200 + 200)).encoder_tokens for i in range(8)]
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = loader.batch(range(i * 200, i * 200 + 200)).encoder_tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_an_epoch_reads_every_chunk_once(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    count = loader.samples_per_epoch
    assert count == (10_000 - (RAW - 1)) // RAW
    offsets = set()
    orders = []
    for epoch in range(8):
        starts = [loader.sample_start(epoch * count + k) for k in range(count)]
        offsets.add(min(starts))
        assert sorted(starts) == list(range(min(starts), min(starts) + count * RAW, RAW))
        assert max(starts) + RAW <= 10_000
        orders.append(tuple(np.argsort(starts)))
    assert len(set(orders)) == 8
    assert len(offsets) > 4
    assert max(offsets) < RAW


def test_validation_reads_in_order_and_to_the_end(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS, shuffle=False)
    assert loader.samples_per_epoch == 10_000 // RAW
    assert [loader.sample_start(i) for i in range(3)] == [0, RAW, 2 * RAW]
    assert loader.sample_start(loader.samples_per_epoch) == 0


def test_epochs_mask_differently(make_corpus):
    loader = SpanCorruptionLoader(make_corpus(RAW), **SETTINGS)
    assert loader.samples_per_epoch == 1
    batch = loader.batch(range(10))
    assert [loader.sample_start(i) for i in range(10)] == [0] * 10
    assert len({tuple(row.tolist()) for row in batch.encoder_tokens}) > 5


def test_indices_beyond_32_bits(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    far = loader.batch([(1 << 40) + 1, (1 << 62) + 3, 1])
    assert len({tuple(row.tolist()) for row in far.encoder_tokens}) == 3


def test_sentinels_count_from_the_tokenizers_top(make_corpus):
    prefix = make_corpus(1_000, tokenizer=info())
    batch = SpanCorruptionLoader(prefix, **{**SETTINGS, "vocab_size": 1152}).batch([0])
    assert int(batch.encoder_tokens.max()) == 1099
    without = make_corpus(1_000, name="bare")
    batch = SpanCorruptionLoader(without, **{**SETTINGS, "vocab_size": 1152}).batch([0])
    assert int(batch.encoder_tokens.max()) == 1151


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"vocab_size": 1000}, "are the sentinels, which text must not contain"),
        ({"vocab_size": 900}, "token id 999, outside the model's vocabulary of 900"),
        ({"vocab_size": 103}, "a vocabulary of 103 ids has no room"),
        ({"decoder_length": 7}, "needs 8 decoder positions"),
        ({"encoder_length": 2}, "encoder_length is 2"),
        ({"encoder_length": 512, "num_sentinels": 27}, "28 masked spans but the tokenizer only 27"),
        ({"encoder_length": 9999}, "has 10000 tokens, fewer than the"),
        ({"noise_density": 1.5}, "noise_density is 1.5"),
        ({"prefix": "/nowhere/corpus"}, "cannot open '/nowhere/corpus.idx'"),
    ],
)
def test_mistakes_are_explained(prefix, changes, message):
    arguments = {"prefix": prefix, **SETTINGS, **changes}
    if arguments["encoder_length"] == 9999:
        arguments["num_sentinels"] = 600
        arguments["vocab_size"] = 1600
    with pytest.raises(UserError, match=message):
        SpanCorruptionLoader(arguments.pop("prefix"), **arguments)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (info(vocab_size=1101), "tokenizer of 1101 ids"),
        (info(num_extra_ids=50), "tokenizer of 50 sentinels"),
    ],
)
def test_another_tokenizer_is_refused(make_corpus, meta, message):
    with pytest.raises(UserError, match=message):
        SpanCorruptionLoader(make_corpus(1_000, tokenizer=meta), **SETTINGS)


def test_without_sidecar_the_named_tokenizer_counts(make_corpus, capsys):
    settings = {**SETTINGS, "vocab_size": 1152}
    bare = make_corpus(1_000, name="bare")
    loader = SpanCorruptionLoader(bare, **settings, tokenizer=info())
    assert loader.sentinel_top == 1100
    assert capsys.readouterr().err == ""
    beside = make_corpus(1_000, tokenizer=info())
    expected = SpanCorruptionLoader(beside, **settings, tokenizer=info())
    assert torch.equal(loader.batch([0]).encoder_tokens, expected.batch([0]).encoder_tokens)
    for tokenizer, message in [
        (info(vocab_size=1153), "vocab_size is 1152, but .* a tokenizer of 1153 ids"),
        (info(num_extra_ids=99), "num_sentinels is 100, but .* a tokenizer of 99 sentinels"),
        (info(vocab_size=1099), "data.tokenizer must be the one the corpus was made with"),
    ]:
        with pytest.raises(UserError, match=message):
            SpanCorruptionLoader(bare, **settings, tokenizer=tokenizer)


def test_a_tokenizer_that_contradicts_the_sidecar_is_refused(make_corpus):
    prefix = make_corpus(1_000, tokenizer=info())
    other = TokenizerInfo("1" * 64, 1100, 100)
    with pytest.raises(UserError, match=r"data\.tokenizer .* is not the tokenizer that '.*' was"):
        SpanCorruptionLoader(prefix, **SETTINGS, tokenizer=other)


def test_what_is_assumed_without_sidecar_and_tokenizer_is_said_once(prefix, capsys):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    loader.batch(range(3 * loader.samples_per_epoch))
    assert loader.sentinel_top == 1100
    printed = capsys.readouterr().err
    assert printed.count("warning:") == 1
    assert "taken to have exactly the model's 1100 ids, the top 100 of them" in printed


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_file_cut_while_it_is_open_is_refused(prefix, shuffle):
    # Within its last page a cut does not kill the process: it would be read as zeros.
    loader = SpanCorruptionLoader(prefix, **SETTINGS, shuffle=shuffle)
    loader.batch(range(loader.samples_per_epoch))
    os.truncate(f"{prefix}.bin", 19_998)
    with pytest.raises(UserError, match=r"corpus\.bin' had 20000 bytes .* now has 19998"):
        loader.batch([loader.samples_per_epoch])


def test_a_corpus_replaced_while_it_is_open_is_read_on(prefix, make_corpus):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    before = loader.batch(range(10))
    make_corpus(5_000)
    assert torch.equal(loader.batch(range(10)).encoder_tokens, before.encoder_tokens)


def test_an_empty_corpus_is_refused(tmp_path):
    with IndexedWriter(tmp_path / "c", "<u2"):
        pass
    with pytest.raises(UserError, match="holds no tokens"):
        SpanCorruptionLoader(tmp_path / "c", **SETTINGS)


def test_negative_ids_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "c", "<i4") as writer:
        writer.add_document([5] * 50 + [-3] + [5] * 50)
    with pytest.raises(UserError, match="token id -3; ids are never negative"):
        SpanCorruptionLoader(tmp_path / "c", **SETTINGS)


def test_a_bad_id_that_escapes_the_check_at_open_is_found_when_read(prefix, monkeypatch):
    with prefix.with_name("corpus.bin").open("r+b") as file:
        file.seek(2 * 9_000)
        file.write(b"\xff\xff")
    monkeypatch.setattr("megaswitch.data.corpus_checks._ID_CHECK_BUDGET", 1)
    loader = SpanCorruptionLoader(prefix, **SETTINGS, shuffle=False)
    loader.batch(range(9_000 // RAW))
    with pytest.raises(UserError, match=r"token 9000 of '.*corpus.bin' is id 65535"):
        loader.batch(range(loader.samples_per_epoch))


def test_large_corpora_are_sampled_throughout(make_corpus):
    store = TokenStore(make_corpus(50_000, top=40_000)).native
    assert store.id_range(50_000) == (3, 39_999)
    assert store.id_range(1) == (3, 4_098)
    low, high = store.id_range(8_192)
    assert low == 3
    assert high > 25_000


def test_fingerprint_changes_with_data_and_order(prefix, make_corpus):
    base = SpanCorruptionLoader(prefix, **SETTINGS).fingerprint
    assert base == SpanCorruptionLoader(prefix, **SETTINGS).fingerprint
    assert base == SpanCorruptionLoader(prefix, **SETTINGS, decoder_length=DECODER).fingerprint
    assert len(base) == 16
    others = [{"seed": 8}, {"encoder_length": 33}, {"decoder_length": 9}, {"shuffle": False}]
    others += [{"vocab_size": 1101}, {"mean_span_length": 1.0}, {"noise_density": 0.3}]
    prints = {SpanCorruptionLoader(prefix, **{**SETTINGS, **o}).fingerprint for o in others}
    prints.add(SpanCorruptionLoader(make_corpus(9_999, name="b"), **SETTINGS).fingerprint)
    prints.add(SpanCorruptionLoader(make_corpus(10_000, top=900), **SETTINGS).fingerprint)
    assert len(prints | {base}) == len(others) + 3


def test_fingerprint_sees_the_digest_of_the_sidecar(make_corpus):
    prefix = make_corpus(10_000, tokenizer=info())
    base = SpanCorruptionLoader(prefix, **SETTINGS).fingerprint
    sidecar = prefix.with_name("corpus.meta.json")
    meta = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**meta, "content_sha256": "f" * 64}))
    assert SpanCorruptionLoader(prefix, **SETTINGS).fingerprint != base


def test_the_core_refuses_wrong_buffers(prefix):
    loader = SpanCorruptionLoader(prefix, **SETTINGS)
    index = np.zeros(2, dtype=np.int64)
    good = [np.empty((2, width), dtype=np.int32) for width in (32, DECODER, DECODER)]
    loader.sampler.fill(index, *good)
    with pytest.raises(ValueError, match="encoder_tokens has the wrong shape"):
        loader.sampler.fill(index, good[1], *good[1:])
    with pytest.raises(TypeError):
        loader.sampler.fill(index, good[0].astype(np.int64), *good[1:])
    with pytest.raises(ValueError, match="segments go with samplers that pack documents"):
        loader.sampler.fill(index, *good, good[0], good[1])
    with pytest.raises(ValueError, match="negative sample index"):
        loader.batch([-1])
