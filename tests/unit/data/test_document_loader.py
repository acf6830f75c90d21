"""Samples of whole documents: equal to the oracle, and a pure function of (seed, index)."""

import os
from collections import Counter

import numpy as np
import pytest
import torch

from megaswitch import native
from megaswitch.data import documents
from megaswitch.data.document_loader import DocumentLoader
from megaswitch.data.indexed import IndexedWriter, TokenizerInfo, TokenStore
from megaswitch.data.packing import cut
from megaswitch.data.philox import KeyedPermutation
from megaswitch.data.span_corruption import EOS_ID, span_counts, text_lengths
from megaswitch.log import UserError

VOCAB = 1000
SETTINGS = {"seed": 7, "vocab_size": VOCAB, "encoder_length": 48, "num_sentinels": 20}
INFO = TokenizerInfo("ab" * 32, VOCAB, 20)
OBJECTIVES = [
    ("span-corruption", True),
    ("prefix-lm", False),
    ("text-to-text", False),
    ("text-to-text", True),
]
objectives = pytest.mark.parametrize(("objective", "packing"), OBJECTIVES)


def write(prefix, count, *, eos, seed=0, mean=3.2, dtype="<u2"):
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype, tokenizer=INFO) as writer:
        for _ in range(count):
            length = int(random.lognormal(mean, 1.0))
            ids = random.integers(0, 980, length)  # the pad and EOS ids may occur in a text
            if len(ids):
                ids[-1] = 3 + ids[-1] % 900
            writer.add_document([*ids, EOS_ID] if eos else ids)
    return prefix


def make(folder, objective, packing, *, count=400, eos=False, seed=0, **changes):
    prefix = folder / "c"
    if objective == "text-to-text":
        write(folder / "c_inputs", count, eos=eos, seed=seed)
        write(folder / "c_targets", count, eos=eos, seed=seed + 1, mean=1.5)
        changes = {"decoder_length": 14} | changes
    else:
        write(prefix, count, eos=eos, seed=seed)
    return DocumentLoader(
        prefix, objective=objective, packing=packing, tokenizer=INFO, **SETTINGS | changes
    )


def oracle(loader, objective, eos, sample, rows, roll=False):
    """What a sample must be, from the documents alone."""
    lengths = {"encoder_length": loader.encoder_length, "decoder_length": loader.decoder_length}

    def whole(store, number):
        ids = store.document(number).tolist()
        return ids[:-1] if eos else ids

    def piece(document, part):
        if objective == "text-to-text":
            return tuple(whole(store, document) for store in loader.stores)
        text = whole(loader.stores[0], document)
        longest = min(lengths.values()) if objective == "prefix-lm" else longest_span(loader, roll)
        start, count = cut(len(text), longest)[part]
        return text[start : start + count]

    writers = {
        "span-corruption": lambda raw, random: documents.corrupt_piece(
            raw,
            random,
            noise_density=0.15,
            mean_span_length=3.0,
            sentinel_top=VOCAB,
            random_roll=roll,
        ),
        "prefix-lm": documents.split_piece,
        "text-to-text": lambda raw, _: documents.truncate_pair(*raw, **lengths),
    }
    epoch, place = divmod(sample, len(rows))
    row = KeyedPermutation(len(rows), seed=7, epoch=epoch)[place]
    return documents.row(
        [piece(*p) for p in rows[row]], writers[objective], **lengths, seed=7, sample_index=sample
    )


def longest_span(loader, roll=False):
    fits = [n for n in range(2, 200) if fits_in(loader, text_lengths(n, 0.15, 3.0, roll))]
    return max(fits)


def fits_in(loader, lengths):
    return lengths[0] <= loader.encoder_length and lengths[1] <= loader.decoder_length


def rows_of(loader):
    """The rows as the file has them."""
    index = loader.rows
    return [index.row(r) for r in range(index.rows)]


@objectives
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_core_equals_the_oracle(tmp_path, objective, packing, eos, seed):
    loader = make(tmp_path, objective, packing, eos=eos, seed=seed)
    rows = rows_of(loader)
    total = loader.samples_per_epoch
    samples = [*range(0, 3 * total, 7), 3 * total - 1, 10**12 + seed]
    batch = loader.batch(samples)
    for number, sample in enumerate(samples):
        encoder, decoder, targets, *segments = oracle(loader, objective, eos, sample, rows)
        assert batch.encoder_tokens[number].tolist() == encoder.tolist()
        assert batch.decoder_tokens[number].tolist() == decoder.tolist()
        assert batch.decoder_targets[number].tolist() == targets.tolist()
        assert batch.encoder_mask[number].tolist() == (segments[0] > 0).tolist()
        assert batch.decoder_mask[number].tolist() == (segments[1] > 0).tolist()
        if packing:
            assert batch.encoder_segments[number].tolist() == segments[0].tolist()
            assert batch.decoder_segments[number].tolist() == segments[1].tolist()
        else:
            assert batch.encoder_segments is None
            assert batch.decoder_segments is None


def test_a_rotated_mask_equals_the_oracle(tmp_path):
    loader = make(tmp_path, "span-corruption", True, random_roll=True)
    rows = rows_of(loader)
    batch = loader.batch(range(200))
    for sample in range(200):
        encoder, decoder, targets, *segments = oracle(
            loader, "span-corruption", False, sample, rows, roll=True
        )
        assert batch.encoder_tokens[sample].tolist() == encoder.tolist()
        assert batch.decoder_tokens[sample].tolist() == decoder.tolist()
        assert batch.decoder_targets[sample].tolist() == targets.tolist()
        assert batch.encoder_segments[sample].tolist() == segments[0].tolist()
        assert batch.decoder_segments[sample].tolist() == segments[1].tolist()
    begins = (batch.encoder_tokens[:, 0] >= VOCAB - 20).double().mean()
    assert 0.05 < float(begins) < 0.5, "some documents begin with a masked span"


@objectives
def test_an_epoch_has_every_piece_once_and_epochs_differ(tmp_path, objective, packing):
    loader = make(tmp_path, objective, packing)
    total = loader.samples_per_epoch
    sampler = loader.sampler
    orders = [[sampler.row(i) for i in range(e * total, (e + 1) * total)] for e in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(total))
    assert orders[0] != orders[1]
    found = Counter(piece for row in rows_of(loader) for piece in row)
    assert set(found.values()) == {1}
    assert len(found) == loader.pieces_per_epoch
    for document in range(loader.stores[0].num_documents):
        length = len(loader.stores[0].document(document))
        assert ((document, 0) in found) == (objective == "text-to-text" or length >= 2)


@objectives
def test_a_batch_is_the_same_in_any_pieces_and_after_a_restart(tmp_path, objective, packing):
    loader = make(tmp_path, objective, packing)
    whole = loader.batch(range(50, 74))
    again = DocumentLoader(
        tmp_path / "c", objective=objective, packing=packing, tokenizer=INFO,
        **SETTINGS | {"decoder_length": loader.decoder_length},
    )  # fmt: skip
    parts = [again.batch(range(i, i + 8)) for i in (66, 50, 58)]
    for name in ("encoder_tokens", "decoder_tokens", "decoder_targets", "encoder_mask"):
        joined = torch.cat([getattr(parts[i], name) for i in (1, 2, 0)])
        assert torch.equal(joined, getattr(whole, name))
    assert again.fingerprint == loader.fingerprint


def test_without_shuffling_every_epoch_is_alike(tmp_path):
    loader = make(tmp_path, "span-corruption", True, shuffle=False)
    total = loader.samples_per_epoch
    sampler = loader.sampler
    order = [sampler.row(i) for i in range(total)]
    assert order == [sampler.row(i) for i in range(total, 2 * total)]
    assert order != sorted(order), "rows of few pieces come first in the file"


def test_packed_documents_reassemble_to_their_sources(tmp_path):
    loader = make(tmp_path, "span-corruption", True, eos=True)
    found = []
    batch = loader.batch(range(loader.samples_per_epoch))
    columns = (
        batch.encoder_tokens, batch.decoder_targets, batch.encoder_segments, batch.decoder_segments
    )  # fmt: skip
    for encoder, targets, e, d in zip(*columns, strict=True):
        for segment in range(1, int(e.max()) + 1):
            spans, text = {}, []
            for token in targets[d == segment].tolist()[:-1]:
                if token >= VOCAB - 20:
                    spans[token] = current = []
                else:
                    current.append(token)
            for token in encoder[e == segment].tolist()[:-1]:
                text += spans.pop(token) if token >= VOCAB - 20 else [token]
            assert not spans
            found.append(tuple(text))
    longest = longest_span(loader)
    store, expected = loader.stores[0], []
    for number in range(store.num_documents):
        ids = store.document(number)[:-1].tolist()
        expected += [tuple(ids[s : s + n]) for s, n in cut(len(ids), longest)]
    assert Counter(found) == Counter(expected)


def test_splits_of_a_prefix_are_uniform_and_change_with_the_epoch(tmp_path):
    with IndexedWriter(tmp_path / "c", "<u2", tokenizer=INFO) as writer:
        for _ in range(50):
            writer.add_document(range(3, 9))
    loader = DocumentLoader(
        tmp_path / "c", objective="prefix-lm", packing=False, tokenizer=INFO, **SETTINGS
    )
    assert loader.decoder_length == loader.encoder_length
    counts = Counter(loader.batch(range(2500)).encoder_mask.sum(1).tolist())
    assert sorted(counts) == [2, 3, 4, 5, 6]  # 1 to 5 tokens, and EOS
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 25  # 4 degrees of freedom


def test_a_pair_too_long_loses_its_end_and_keeps_its_eos(tmp_path):
    for side, length in (("inputs", 100), ("targets", 30)):
        with IndexedWriter(tmp_path / f"c_{side}", "<u2", tokenizer=INFO) as writer:
            writer.add_document(range(3, 3 + length))
    loader = DocumentLoader(
        tmp_path / "c", objective="text-to-text", packing=False, tokenizer=INFO,
        **SETTINGS | {"decoder_length": 10},
    )  # fmt: skip
    batch = loader.batch([0])
    assert batch.encoder_tokens[0].tolist() == [*range(3, 50), EOS_ID]
    assert batch.decoder_targets[0].tolist() == [*range(3, 12), EOS_ID]
    assert batch.decoder_tokens[0].tolist() == [0, *range(3, 12)]


def test_rows_are_fuller_packed(tmp_path):
    packed = make(tmp_path, "text-to-text", True, decoder_length=40)
    single = make(tmp_path, "text-to-text", False, decoder_length=40)
    assert packed.samples_per_epoch < single.samples_per_epoch
    assert packed.fill_rate[0] > 0.93 > 0.7 > single.fill_rate[0]
    batch = packed.batch(range(packed.samples_per_epoch))
    assert float(batch.encoder_mask.double().mean()) == pytest.approx(packed.fill_rate[0])
    assert float(batch.decoder_mask.double().mean()) == pytest.approx(packed.fill_rate[1])


@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<i8"])
def test_the_type_on_disk_does_not_matter(tmp_path, dtype):
    write(tmp_path / "a", 60, eos=True)
    write(tmp_path / "b", 60, eos=True, dtype=dtype)
    one, other = (
        DocumentLoader(
            tmp_path / name, objective="span-corruption", packing=True, tokenizer=INFO, **SETTINGS
        ).batch(range(20))
        for name in "ab"
    )
    assert torch.equal(one.encoder_tokens, other.encoder_tokens)


# ---------------------------------------------------------------- refusals


def open_corpus(prefix, objective="span-corruption", packing=True, **changes):
    return DocumentLoader(
        prefix, objective=objective, packing=packing, tokenizer=INFO, **SETTINGS | changes
    )


def test_pairs_that_are_no_pairs_are_refused(tmp_path):
    write(tmp_path / "c_inputs", 5, eos=False)
    with pytest.raises(UserError, match="c_targets"):
        open_corpus(tmp_path / "c", "text-to-text", decoder_length=9)
    write(tmp_path / "c_targets", 6, eos=False)
    with pytest.raises(UserError, match=r"5 documents and .* 6, and document k"):
        open_corpus(tmp_path / "c", "text-to-text", decoder_length=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "data seed is -1"),
        ({"vocab_size": 900}, "vocab_size is 900"),
        ({"decoder_length": 2}, "too short"),
        ({"encoder_length": 3}, "too short"),
        ({"objective": "text-to-text"}, "c_inputs"),
        ({"objective": "prefix-lm", "packing": False, "decoder_length": 2}, "too short"),
        ({"encoder_length": 600}, "33 masked spans but the tokenizer only 20 sentinels"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    write(tmp_path / "c", 50, eos=True)
    with pytest.raises(UserError, match=message):
        open_corpus(tmp_path / "c", **changes)


def test_text_to_text_without_a_decoder_length_is_refused(tmp_path):
    with pytest.raises(UserError, match="decoder_length is not set"):
        make(tmp_path, "text-to-text", True, decoder_length=None)


def test_documents_of_which_only_some_end_in_eos_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "c", "<u2", tokenizer=INFO) as writer:
        for number in range(10):
            writer.add_document([5, 6, 7, EOS_ID if number < 4 else 8])
    with pytest.raises(UserError, match=r"of 10 documents of .*, 4 end in EOS"):
        open_corpus(tmp_path / "c")


def test_a_rare_document_without_eos_is_refused_when_it_is_read(tmp_path):
    with IndexedWriter(tmp_path / "c", "<u2", tokenizer=INFO) as writer:
        for number in range(5000):
            writer.add_document([5, 6, 7, EOS_ID if number != 3 else 8])
    loader = open_corpus(tmp_path / "c")
    with pytest.raises(UserError, match=r"document 3 of .* ends in id 8"):
        loader.batch(range(loader.samples_per_epoch))


def test_ids_outside_the_vocabulary_are_refused_when_they_are_read(tmp_path):
    loader = make(tmp_path, "span-corruption", True)
    texts = native.Texts(loader.stores[0].native, ends_in_eos=False, vocab_size=500)
    counts = [
        (0, 0),
        (0, 0),
        *(span_counts(n, 0.15, 3.0) for n in range(2, longest_span(loader) + 1)),
    ]
    noise, spans = map(list, zip(*counts, strict=True))
    pieces = native.SpanDocuments(texts, noise=noise, spans=spans, sentinel_top=VOCAB)
    shape = native.RowShape(
        encoder_length=loader.encoder_length, decoder_length=loader.decoder_length, packed=True
    )
    sampler = native.DocumentSampler(pieces, loader.rows, shape, seed=0, shuffle=True)
    wide = [np.empty((50, loader.encoder_length), dtype=np.int32) for _ in range(2)]
    narrow = [np.empty((50, loader.decoder_length), dtype=np.int32) for _ in range(3)]
    with pytest.raises(native.DataError, match="outside the model's vocabulary of 500"):
        sampler.fill(np.arange(50), wide[0], *narrow[:2], wide[1], narrow[2])


@pytest.mark.parametrize("name", ["c.bin", "rows"])
def test_a_file_cut_while_it_is_open_is_an_error_and_no_crash(tmp_path, name):
    loader = make(tmp_path, "span-corruption", True)
    path = tmp_path / name if name == "c.bin" else next(tmp_path.glob("c.*.rows"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="must not be overwritten in place"):
        loader.batch([0])


@objectives
def test_fingerprints_tell_data_settings_and_seeds_apart(tmp_path, objective, packing):
    base = make(tmp_path, objective, packing)
    length = {"decoder_length": base.decoder_length}
    prints = {base.fingerprint}
    for change in ({"seed": 8}, {"encoder_length": 40}, {"shuffle": False}):
        prints.add(open_corpus(tmp_path / "c", objective, packing, **length | change).fingerprint)
    prints.add(make(tmp_path, objective, packing, seed=9).fingerprint)
    assert len(prints) == 5


def test_buffers_of_other_shapes_are_refused(tmp_path):
    loader = make(tmp_path, "span-corruption", True)
    shapes = [(2, loader.encoder_length), (2, loader.decoder_length), (2, loader.decoder_length)]
    good = [np.empty(shape, dtype=np.int32) for shape in shapes]
    with pytest.raises(ValueError, match="segments go with samplers that pack"):
        loader.sampler.fill(np.arange(2), *good)
    with pytest.raises(ValueError, match="wrong shape"):
        loader.sampler.fill(np.arange(3), *good, good[0], good[1])


def test_a_corpus_without_a_sidecar_packs_by_its_index(tmp_path):
    with IndexedWriter(tmp_path / "c", "<u2") as writer:
        for length in (5, 9, 30):
            writer.add_document(np.arange(3, 3 + length))
    loader = open_corpus(tmp_path / "c")
    assert TokenStore(tmp_path / "c").meta is None
    assert loader.samples_per_epoch == 1
