from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswitch.data import native
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
    encoder_length=st.integers(3, 3000),
    density=st.floats(0.01, 0.95),
    mean_span=st.floats(1.0, 20.0),
)
def test_shape_is_the_greatest_that_fits(encoder_length, density, mean_span):
    raw_length, decoder_length = span_shape(encoder_length, density, mean_span)
    fits, needed = text_lengths(raw_length, density, mean_span)
    assert fits <= encoder_length
    assert needed == decoder_length
    for longer in range(raw_length + 1, raw_length + 10):
        assert text_lengths(longer, density, mean_span)[0] > encoder_length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((512, 0.0, 3.0), "noise_density is 0.0"),
        ((512, 1.0, 3.0), "noise_density is 1.0"),
        ((512, float("nan"), 3.0), "noise_density is nan"),
        ((512, 0.15, 0.5), "mean_span_length is 0.5"),
        ((2, 0.15, 3.0), "encoder_length is 2"),
        ((512, 0.99999999, 1e9), "more than 16777216 raw tokens"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        span_shape(*arguments)


@st.composite
def samples(draw):
    raw_length = draw(st.integers(2, 700))
    density = draw(st.floats(0.01, 0.95))
    noise, spans = span_counts(raw_length, density, draw(st.floats(1.0, 12.0)))
    shape = {
        "noise_tokens": noise,
        "spans": spans,
        "sentinel_top": 32_100,
        "encoder_length": raw_length - noise + spans + 1 + draw(st.integers(0, 3)),
        "decoder_length": noise + spans + 1 + draw(st.integers(0, 3)),
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
        assert np.array_equal(ours, theirs)


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
    assert sentinels == [32_099 - span for span in range(shape["spans"])]
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
