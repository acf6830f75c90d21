"""Rows of whole documents in plain Python: the oracle of `csrc/document_sampler.h`.

Nothing here runs in training. The C++ core gives the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megaswitch.data.philox import Random, Stream
from megaswitch.data.span_corruption import EOS_ID, PAD_ID, mask_spans, span_counts

# What a piece becomes: ids of the encoder's text and of the decoder's, without EOS.
Texts = tuple[list[int], list[int]]
Raw = TypeVar("Raw")


def corrupt_piece(
    raw: Sequence[int],
    random: Random,
    *,
    noise_density: float,
    mean_span_length: float,
    sentinel_top: int,
    random_roll: bool = False,
) -> Texts:
    """A piece span-corrupted by itself; its sentinels begin at the top."""
    counts = span_counts(len(raw), noise_density, mean_span_length)
    return mask_spans(raw, random, *counts, sentinel_top=sentinel_top, random_roll=random_roll)


def split_piece(raw: Sequence[int], random: Random) -> Texts:
    """A prefix for the encoder and the rest for the decoder, split between any two tokens."""
    split = 1 + random.below(len(raw) - 1)
    return list(raw[:split]), list(raw[split:])


def truncate_pair(
    inputs: Sequence[int], targets: Sequence[int], encoder_length: int, decoder_length: int
) -> Texts:
    """Both texts as they fit into a row with their EOS; what is too long loses its end."""
    return list(inputs[: encoder_length - 1]), list(targets[: decoder_length - 1])


def row(
    pieces: Sequence[Raw],
    write: Callable[[Raw, Random], Texts],
    *,
    encoder_length: int,
    decoder_length: int,
    seed: int,
    sample_index: int,
) -> tuple[NDArray[np.int32], ...]:
    """A row of pieces, one behind another, each text with its EOS.

    Args:
        pieces: token ids of each, or a pair of such.
        write: what becomes of a piece; the numbers that it draws follow those of the one before.
        encoder_length: positions of the row.
        decoder_length: likewise.
        seed: 64 bits.
        sample_index: global index of the sample.

    Returns:
        encoder tokens, decoder input, decoder targets, encoder segments, decoder segments.
    """
    random = Random(seed, sample_index, Stream.SPANS)
    encoder, encoder_segments = np.full((2, encoder_length), PAD_ID, dtype=np.int32)
    decoder, targets, decoder_segments = np.full((3, decoder_length), PAD_ID, dtype=np.int32)
    e = d = 0
    for segment, raw in enumerate(pieces, 1):
        source, target = ([*text, EOS_ID] for text in write(raw, random))
        encoder[e : e + len(source)] = source
        encoder_segments[e : e + len(source)] = segment
        targets[d : d + len(target)] = target
        decoder[d : d + len(target)] = [PAD_ID, *target[:-1]]
        decoder_segments[d : d + len(target)] = segment
        e += len(source)
        d += len(target)
    return encoder, decoder, targets, encoder_segments, decoder_segments
