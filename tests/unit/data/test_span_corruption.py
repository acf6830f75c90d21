from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch import native
from megaswitch.data.philox import Random, Stream
from megaswitch.data.span_corruption import (
    EOS_ID,
    PAD_ID,
    Seq2SeqBatch,
    corrupt,
    draw_composition,
    span_counts,
    span_shape,
    text_lengths,
)
from megaswitch.log import UserError


@pytest.mark.parametrize(
    ("raw_length", "noise", "spans"),
    [
        (2, 1, 1),
        (3, 1, 1),
        (10, 2, 1),  # 1.5 rounds to the even 2
        (30, 4, 1),  # 4.5 in float64; float32 rounds 30 * 0.15 to 4.5 as well: even 4
        (100, 15, 5),
        (190, 29, 10),  # 28.500002 in float32; 28.5 and so 28 in float64
        (512, 77, 26),
        (568, 85, 28),
        (1137, 171, 57),
        (2048, 307, 102),
    ],
)
def test_counts_are_those_of_t5(raw_length, noise, spans):
    assert span_counts(raw_length, 0.15, 3.0) == (noise, spans)


@pytest.mark.parametrize(
    ("encoder_length", "density", "mean_span", "expected"),
    [
        (512, 0.15, 3.0, (568, 114)),
        (256, 0.15, 3.0, (284, 58)),
        (1024, 0.15, 3.0, (1137, 229)),
        (512, 0.5, 3.0, (767, 513)),
        (3, 0.15, 3.0, (2, 3)),
    ],
)
def test_shape(encoder_length, density, mean_span, expected):
    assert span_shape(encoder_length, density, mean_span) == expected


@given(
    encoder_length=st.integers(4, 3000),
    density=st.floats(0.01, 0.95),
    mean_span=st.floats(1.0, 20.0),
    roll=st.booleans(),
)
def test_shape_is_the_greatest_that_fits(encoder_length, density, mean_span, roll):
    raw_length, decoder_length = span_shape(encoder_length, density, mean_span, roll)
    fits, needed = text_lengths(raw_length, density, mean_span, roll)
    assert fits <= encoder_length
    assert needed == decoder_length
    for longer in range(raw_length + 1, raw_length + 10):
        assert text_lengths(longer, density, mean_span, roll)[0] > encoder_length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((512, 0.0, 3.0), "noise_density is 0.0"),
        ((512, 1.0, 3.0), "noise_density is 1.0"),
        ((512, float("nan"), 3.0), "noise_density is nan"),
        ((512, 0.15, 0.5), "mean_span_length is 0.5"),
        ((2, 0.15, 3.0), "encoder_length is 2"),
        ((3, 0.15, 3.0, True), "encoder_length is 3; the shortest .* takes 4"),
        ((512, 0.99999999, 1e9), "more than 16777216 raw tokens"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        span_shape(*arguments)


@st.composite
def samples(draw):
    raw_length, roll = draw(st.integers(2, 700)), draw(st.booleans())
    density = draw(st.floats(0.01, 0.95))
    noise, spans = span_counts(raw_length, density, draw(st.floats(1.0, 12.0)))
    shape = {
        "noise_tokens": noise,
        "spans": spans,
        "sentinel_top": 32_100,
        "encoder_length": raw_length - noise + spans + roll + 1 + draw(st.integers(0, 3)),
        "decoder_length": noise + spans + roll + 1 + draw(st.integers(0, 3)),
        "random_roll": roll,
    }
    seed = draw(st.integers(0, (1 << 64) - 1))
    return np.arange(3, 3 + raw_length), shape, seed, draw(st.integers(0, (1 << 63) - 1))


@settings(deadline=None, max_examples=150)
@given(samples())
def test_the_core_equals_the_oracle(sample):
    raw, shape, seed, index = sample
    layout = native.SpanLayout(raw_length=len(raw), **shape)
    expected = corrupt(raw, seed=seed, sample_index=index, **shape)
    actual = native.corrupt(raw, layout, seed=seed, sample_index=index)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype == np.int32
        assert np.array_equal(ours, theirs)


def rolled(mask, offset):
    """t5's `tf.roll(mask, offset)`, written out."""
    return [mask[(i - offset) % len(mask)] for i in range(len(mask))]


def test_random_roll_rotates_the_mask_as_t5_does():
    """The rotation is the only difference: the spans are those drawn without it."""
    shape = {"noise_tokens": 5, "spans": 2, "sentinel_top": 100}
    shape |= {"encoder_length": 16, "decoder_length": 9}
    raw = np.arange(10, 26)
    offsets = Counter()
    for index in range(400):
        straight = corrupt(raw, seed=1, sample_index=index, **shape)
        roll = corrupt(raw, seed=1, sample_index=index, random_roll=True, **shape)
        masks = [[token in targets for token in raw] for _, _, targets in (straight, roll)]
        fitting = [offset for offset in range(16) if rolled(masks[0], offset) == masks[1]]
        assert fitting
        offsets.update(fitting if len(fitting) == 1 else ())
    assert set(offsets) == set(range(16))


def test_with_random_roll_every_position_is_masked_equally_often():
    raw = np.arange(10, 30)
    shape = {"noise_tokens": 3, "spans": 1, "sentinel_top": 100}
    shape |= {"encoder_length": 20, "decoder_length": 6}
    rates = {}
    for roll in (False, True):
        layout = native.SpanLayout(raw_length=20, random_roll=roll, **shape)
        masked = Counter()
        for index in range(4_000):
            _, _, targets = native.corrupt(raw, layout, seed=3, sample_index=index)
            masked.update(token for token in targets.tolist() if 10 <= token < 30)
        rates[roll] = [masked[token] / 4_000 for token in raw.tolist()]
    assert rates[False] == [0.0] * 17 + [1.0] * 3, "t5 without it masks the end alone"
    assert max(abs(rate - 0.15) for rate in rates[True]) < 0.03


SENTINELS_FROM = 1_000  # in these samples text stays below and sentinels above


def reassemble(encoder, targets):
    """The source text: every sentinel of the encoder replaced by what the decoder writes for it."""
    spans = {}
    for token in targets[: list(targets).index(EOS_ID)]:
        if token > SENTINELS_FROM:
            spans[token] = current = []
        else:
            current.append(token)
    text = []
    for token in encoder[: list(encoder).index(EOS_ID)]:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


@settings(deadline=None, max_examples=100)
@given(samples())
def test_a_sample_reassembles_to_its_source(sample):
    raw, shape, seed, index = sample
    encoder, decoder, targets = corrupt(raw, seed=seed, sample_index=index, **shape)
    assert reassemble(encoder, targets) == raw.tolist()
    sentinels = [token for token in encoder if token > SENTINELS_FROM]
    split = len(sentinels) - shape["spans"]
    assert split in ((0, 1) if shape["random_roll"] else (0,))
    assert sentinels == [32_099 - span for span in range(len(sentinels))]
    if not shape["random_roll"]:
        assert encoder[0] == raw[0], "a sample begins with kept text"
    assert decoder[0] == PAD_ID
    assert np.array_equal(decoder[1:], targets[:-1])


def test_one_sample_by_hand():
    encoder, decoder, targets = corrupt(
        np.arange(10, 14),
        noise_tokens=2,
        spans=2,
        sentinel_top=100,
        encoder_length=6,
        decoder_length=6,
        seed=0,
        sample_index=0,
    )
    assert encoder.tolist() == [10, 99, 12, 98, 1, 0]
    assert targets.tolist() == [99, 11, 98, 13, 1, 0]
    assert decoder.tolist() == [0, 99, 11, 98, 13, 1]


def test_all_compositions_are_equally_likely():
    counts = Counter(
        tuple(draw_composition(Random(0, index, Stream.SPANS), 6, 3)) for index in range(5000)
    )
    assert len(counts) == 10  # C(5, 2)
    assert sum((n - 500) ** 2 / 500 for n in counts.values()) < 40  # 9 degrees of freedom


def test_contradictory_layouts_are_refused():
    good = {
        "raw_length": 10,
        "noise_tokens": 3,
        "spans": 2,
        "encoder_length": 10,
        "decoder_length": 6,
        "sentinel_top": 100,
    }
    raw = np.arange(10)
    native.corrupt(raw, native.SpanLayout(**good), seed=0, sample_index=0)
    for change in [
        {"noise_tokens": 0},
        {"noise_tokens": 10},
        {"spans": 0},
        {"spans": 4},
        {"encoder_length": 9},
        {"decoder_length": 5},
        {"sentinel_top": 1},
    ]:
        layout = native.SpanLayout(**{**good, **change})
        with pytest.raises(ValueError, match="contradictory span layout"):
            native.corrupt(raw, layout, seed=0, sample_index=0)


def test_batch_moves_to_a_device():
    wide, narrow = torch.arange(12).view(4, 3), torch.arange(8).view(4, 2)
    batch = Seq2SeqBatch(wide, narrow, narrow, wide > 0, narrow > 0, torch.arange(4))
    assert len(batch) == 4
    assert batch.to("meta").decoder_mask.device.type == "meta"
