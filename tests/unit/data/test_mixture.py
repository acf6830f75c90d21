import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch import native
from megaswitch.data.indexed import TokenizerInfo
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.data.mixture import Mixture, MixtureOrder, quotas, size_weights, source_seed
from megaswitch.data.samples import Segment
from megaswitch.log import UserError

SETTINGS = {"vocab_size": 1100, "encoder_length": 32}
SIZES = {"big": 40_000, "middle": 9_000, "small": 1_200}
FIELDS = ["encoder_tokens", "decoder_tokens", "decoder_targets", "encoder_mask", "decoder_mask"]


def info(number=0):
    return TokenizerInfo(f"{number:064}", 1100, 100)


@pytest.fixture
def sources(make_corpus):
    return {
        name: SpanCorruptionLoader(
            make_corpus(tokens, name=name, tokenizer=info()), seed=source_seed(3, name), **SETTINGS
        )
        for name, tokens in SIZES.items()
    }


def located(order, indices):
    return list(
        zip(*(a.tolist() for a in order.locate(np.array(indices, dtype=np.int64))), strict=True)
    )


def core(seed, block, segments):
    return native.MixtureOrder(seed, block, [(s.start, s.quotas) for s in segments])


# ---------------------------------------------------------------- proportions


@pytest.mark.parametrize("block", [1 << 12, 1 << 16, 1 << 20])
def test_101_languages_with_exponent_03_get_their_exact_quotas(block):
    draw = random.Random(0)
    sizes = sorted((round(10 ** draw.uniform(3, 9)) for _ in range(101)), reverse=True)
    shares = [n**0.3 / sum(m**0.3 for m in sizes) for n in sizes]
    found = quotas(size_weights(sizes, exponent=0.3), block)
    assert sum(found) == block
    assert all(abs(q - share * block) < 1 for q, share in zip(found, shares, strict=True))
    order = core(5, block, [Segment(0, found)])
    blocks = 3 if block < 1 << 20 else 1
    for number in range(blocks):
        where, _ = order.locate(np.arange(number * block, (number + 1) * block))
        assert np.bincount(where, minlength=101).tolist() == list(found)


def root(number, degree):
    """The greatest integer whose power is not above `number`."""
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle)
    return low


def largest_remainders(sizes, block):
    """Exact quotas at exponent 3/10, in whole numbers: size^0.3 to 60 digits is a tenth root."""
    weights = [root(n**3 * 10**600, 10) for n in sizes]
    total = sum(weights)
    shares = [Fraction(weight * block, total) for weight in weights]
    whole = [share.numerator // share.denominator for share in shares]
    rests = sorted(range(len(sizes)), key=lambda d: (whole[d] - shares[d], d))
    for source in rests[: block - sum(whole)]:
        whole[source] += 1
    return tuple(whole)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(1, 10**10), min_size=90, max_size=110),
    st.sampled_from([1 << 14, 1 << 16, 1 << 20]),
)
def test_quotas_of_a_hundred_languages_are_exact(sizes, block):
    assert quotas(size_weights(sizes, exponent=0.3), block) == largest_remainders(sizes, block)


def test_a_hundred_languages_are_drawn_by_exact_quotas_block_by_block(make_corpus):
    """Corpora whose sizes span two orders of magnitude, through the loaders themselves."""
    draw = random.Random(1)
    names = [f"l{number:03}" for number in range(100)]
    loaders = {
        name: SpanCorruptionLoader(
            make_corpus(round(10 ** draw.uniform(2.1, 4.1)), name=name, tokenizer=info()),
            seed=source_seed(3, name),
            **SETTINGS,
        )
        for name in names
    }
    block = 1 << 12
    mixture = Mixture(loaders, seed=3, block=block, exponent=0.3)
    exact = largest_remainders([loaders[name].samples_per_epoch for name in names], block)
    assert mixture.segments == (Segment(0, exact),)
    for number in (0, 1, 1_000_000):
        batch = mixture.batch(range(number * block, (number + 1) * block))
        assert torch.bincount(batch.source, minlength=100).tolist() == list(exact)
    counters = mixture.counters(2 * block)
    assert [counters[f"samples/{name}"] for name in names] == [2 * quota for quota in exact]


def test_shares_by_hand():
    assert size_weights([10, 1_000]) == [10, 1_000]
    assert size_weights([10, 1_000], cap=100) == [10, 100]
    assert size_weights([10, 1_000], exponent=0.0) == [1, 1]
    assert [round(float(w), 6) for w in size_weights([16, 81], exponent=0.25)] == [2.0, 3.0]
    assert size_weights([16, 10_000], exponent=0.5, cap=81) == [4, 9]


@pytest.mark.parametrize(
    ("weights", "block", "expected"),
    [
        ([1, 1, 1], 10, (4, 3, 3)),  # of equal remainders the first
        ([5, 3, 2], 10, (5, 3, 2)),
        ([0.5, 0.25, 0.25], 3, (1, 1, 1)),
        ([41, 33, 26], 10, (4, 3, 3)),  # 4.1, 3.3, 2.6
        ([1, 0], 7, (7, 0)),
    ],
)
def test_quotas_are_those_of_the_largest_remainders(weights, block, expected):
    assert quotas([Fraction(w).limit_denominator(100) for w in weights], block) == expected


# ---------------------------------------------------------------- order


@st.composite
def histories(draw):
    block = draw(st.one_of(st.integers(1, 300), st.sampled_from([1 << 16, 70_000])))
    count = draw(st.integers(1, 12))
    segments, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        weights = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
        weights[draw(st.integers(0, count - 1))] += 1
        segments.append(Segment(start, quotas(size_weights(weights), block)))
        start += draw(st.integers(1, 3 * block))
    return draw(st.integers(0, 2**64 - 1)), block, segments, start


@settings(deadline=None, max_examples=150)
@given(histories(), st.randoms(use_true_random=False))
def test_the_core_equals_the_oracle(history, draw):
    seed, block, segments, end = history
    indices = [draw.randrange(end + 3 * block) for _ in range(40)] + [0, end, (1 << 61) + 5]
    oracle = MixtureOrder(seed, block, segments)
    assert located(core(seed, block, segments), indices) == [oracle.locate(i) for i in indices]


@settings(deadline=None, max_examples=100)
@given(histories())
def test_no_sample_comes_twice_and_counters_count(history):
    seed, block, segments, end = history
    end = min(end + block, 100_000)
    order = core(seed, block, segments)
    where, positions = order.locate(np.arange(end))
    assert len(set(zip(where.tolist(), positions.tolist(), strict=True))) == end
    for count in {0, 1, end // 3, end}:
        expected = Counter(where[:count].tolist())
        assert order.seen(count) == [expected[d] for d in range(len(segments[0].quotas))]


@settings(deadline=None, max_examples=50)
@given(histories())
def test_a_segment_leaves_what_came_before_it(history):
    seed, block, segments, _ = history
    last = segments[-1].start
    before = range(max(0, last - 500), last)
    assert located(core(seed, block, segments), before) == located(
        core(seed, block, segments[:-1] or segments), before
    )


def test_whole_blocks_read_each_source_from_its_start_without_a_gap():
    order = core(1, 100, [Segment(0, (70, 30)), Segment(1_000, (10, 90))])
    where, positions = order.locate(np.arange(3_000))
    assert sorted(positions[where == 0]) == list(range(700 + 200))
    assert sorted(positions[where == 1]) == list(range(300 + 1_800))


def test_blocks_are_in_different_orders_and_so_are_seeds():
    order, other = (core(seed, 64, [Segment(0, (32, 32))]) for seed in (1, 2))
    rows = order.locate(np.arange(64 * 50))[0].reshape(50, 64)
    assert len({tuple(row) for row in rows.tolist()}) == 50
    assert not np.array_equal(other.locate(np.arange(64))[0], rows[0])
    assert (abs(rows.mean(0) - 0.5) < 0.35).all()


@pytest.mark.parametrize(
    ("block", "segments"),
    [
        (0, [(0, [0])]),
        (10, []),
        (10, [(0, [])]),
        (10, [(1, [10])]),
        (10, [(0, [9])]),
        (10, [(0, [5, 6])]),
        (10, [(0, [2**64 - 1, 11])]),
        (10, [(0, [10]), (0, [10])]),
        (10, [(0, [10]), (5, [5, 5])]),
        (10, [(0, [10]), (2**62, [10])]),
    ],
)
def test_the_core_refuses_impossible_mixtures(block, segments):
    with pytest.raises(ValueError):
        native.MixtureOrder(0, block, segments)


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_rows_are_those_of_the_sources(sources, pieces):
    mixture = Mixture(sources, seed=3, block=50, exponent=0.5)
    assert mixture.source_names == ("big", "middle", "small")
    order = MixtureOrder(3, 50, mixture.segments)
    epochs = set()
    for start in range(900, 1_000, pieces):
        indices = range(start, start + pieces)
        batch = mixture.batch(indices)
        for row, index in enumerate(indices):
            source, position = order.locate(index)
            assert batch.source[row] == source
            loader = mixture.sources[source]
            epochs.add((source, position // loader.samples_per_epoch))
            one = loader.batch([position])
            for field in FIELDS:
                assert torch.equal(getattr(batch, field)[row], getattr(one, field)[0])
    assert (2, 2) in epochs, "a small source comes round often"


def test_streams_and_thread_counts_change_nothing(sources):
    mixture = Mixture(sources, seed=3, block=50, exponent=0.3)
    whole = mixture.batch(range(1_200))
    for threads, size in [(1, 8), (3, 5), (4, 40)]:
        plan = (range(i, i + size) for i in range(0, 1_200, size))
        with mixture.stream(plan, threads=threads, ahead=6) as stream:
            batches = list(stream)
        for field in [*FIELDS, "sample_index", "source"]:
            assert torch.equal(torch.cat([getattr(b, field) for b in batches]),
                               getattr(whole, field))  # fmt: skip


def test_a_source_gives_the_same_samples_whatever_it_is_mixed_with(sources):
    alone = Mixture({"small": sources["small"]}, seed=3)
    listed = Mixture(dict(reversed(sources.items())), seed=3, block=1 << 10)
    assert listed.fingerprint == Mixture(sources, seed=3, block=1 << 10).fingerprint
    mixed = listed.batch(range(3_000))
    _, positions = listed._order.locate(np.arange(3_000))
    rows = (mixed.source == 2).nonzero()[:, 0]
    assert len(rows) > 50
    expected = alone.sources[0].batch(positions[rows.numpy()].tolist())
    assert torch.equal(mixed.encoder_tokens[rows], expected.encoder_tokens)
    seeds = {source_seed(seed, name) for seed in (0, 1) for name in ("a", "b", "c")}
    assert len(seeds) == 6


def test_new_weights_begin_where_a_run_stands_and_old_samples_stay(sources):
    old = Mixture(sources, seed=3, block=64, weights={"big": 2, "middle": 1, "small": 1})
    new = Mixture(sources, seed=3, block=64, weights={"big": 0, "middle": 0.5, "small": 0.5})
    assert old.fingerprint == new.fingerprint
    new.go_on(old.segments, 1_000)
    assert new.segments == (Segment(0, (32, 16, 16)), Segment(1_000, (0, 32, 32)))
    before, after = old.batch(range(1_000)), new.batch(range(1_000))
    assert torch.equal(before.encoder_tokens, after.encoder_tokens)
    assert torch.bincount(new.batch(range(1_000, 1_064)).source).tolist() == [0, 32, 32]
    again = Mixture(sources, seed=3, block=64, weights={"big": 0, "middle": 1, "small": 1})
    again.go_on(new.segments, 1_500)
    assert again.segments == new.segments, "the same proportions go on as they are"
    again.go_on(new.segments, 1_000)
    assert again.segments == new.segments, "nothing was drawn from the last segment yet"
    back = Mixture(sources, seed=3, block=64, weights={"big": 2, "middle": 1, "small": 1})
    back.go_on(new.segments, 1_000)
    assert back.segments == old.segments


def test_counters_tell_samples_and_epochs(sources):
    mixture = Mixture(sources, seed=3, block=64, weights={"big": 2, "middle": 1, "small": 1})
    counters = mixture.counters(640)
    assert counters["samples/big"] == 320
    assert counters["samples/small"] == 160
    assert counters["epochs/small"] == 160 / sources["small"].samples_per_epoch
    assert mixture.samples_per_epoch == sum(s.samples_per_epoch for s in sources.values())


def test_the_fingerprint_knows_the_sources(sources):
    prints = {
        Mixture(sources, seed=3).fingerprint,
        Mixture(sources, seed=4).fingerprint,
        Mixture(sources, seed=3, block=1 << 10).fingerprint,
        Mixture({**sources, "big": sources["small"]}, seed=3).fingerprint,
        Mixture({"x": sources["big"], "y": sources["small"]}, seed=3).fingerprint,
        Mixture({"x": sources["small"], "y": sources["big"]}, seed=3).fingerprint,
    }
    assert len(prints) == 6


def test_sources_of_two_tokenizers_are_refused(sources, make_corpus):
    prefix = make_corpus(2_000, name="other", tokenizer=info(1))
    other = SpanCorruptionLoader(prefix, seed=1, **SETTINGS)
    with pytest.raises(UserError, match="'big' and 'other' cannot be mixed: their tokenizer"):
        Mixture({**sources, "other": other}, seed=3)
    longer = SpanCorruptionLoader(prefix, seed=1, **{**SETTINGS, "encoder_length": 40})
    with pytest.raises(UserError, match="'big' and 'longer' cannot be mixed: their"):
        Mixture({"big": sources["big"], "longer": longer}, seed=3)


def test_a_source_that_would_never_be_read_is_refused(sources):
    weights = {"big": 1_000_000, "middle": 1_000_000, "small": 1}
    with pytest.raises(UserError, match=r"'small' has a share of 5.0e-7, less than one sample in"):
        Mixture(sources, seed=3, weights=weights)
    assert Mixture(sources, seed=3, weights={**weights, "small": 0}).segments[0].quotas[2] == 0


@pytest.mark.parametrize(
    ("start", "stored"),
    [(0, (64,)), (0, (1, 2, 3)), (5, (32, 16, 16)), (0, (-1, 64, 1)), (0, (2**70, 1, 1))],
)
def test_proportions_of_other_sources_are_refused(sources, start, stored):
    mixture = Mixture(sources, seed=3, block=64)
    with pytest.raises(UserError, match="do not fit the 3 sources"):
        mixture.go_on([Segment(start, stored)], 100)
