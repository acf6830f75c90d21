"""T5 span corruption: the shape of a sample, the batch type, and the oracle of the C++ core.

A raw chunk of L tokens is cut into spans, alternately kept and masked, beginning with a kept one.
The encoder reads the kept text with one sentinel in the place of each masked span; the decoder
writes each sentinel followed by the tokens it stands for. Both end in EOS.

Source: Raffel et al. 2020 and t5's `random_spans_noise_mask`, `random_spans_helper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from megaswitch.data.philox import Random, Stream
from megaswitch.data.special_ids import EOS_ID, PAD_ID
from megaswitch.log import UserError

# The greatest raw sample: beyond it float32, in which T5 counts, no longer holds every integer.
MAX_RAW_LENGTH = 1 << 24


def span_counts(raw_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many tokens of a sample are masked, in how many spans.

    T5 computes both in float32 and rounds half to even, so 190 tokens at 0.15 give 29 (float64
    would give 28). The number of spans is limited so that each kept and each masked one has a
    token.

    Args:
        raw_length: tokens of the sample, 2 to `MAX_RAW_LENGTH`.
        density: share of masked tokens, in (0, 1).
        mean_span: mean masked tokens per span, at least 1.

    Returns:
        (noise tokens, spans).
    """
    assert 2 <= raw_length <= MAX_RAW_LENGTH
    noise = int(np.round(np.float32(raw_length) * np.float32(density)))
    noise = min(max(noise, 1), raw_length - 1)
    spans = int(np.round(np.float32(noise) / np.float32(mean_span)))
    return noise, min(max(spans, 1), noise, raw_length - noise)


def text_lengths(
    raw_length: int, density: float, mean_span: float, random_roll: bool = False
) -> tuple[int, int]:
    """Most tokens of a sample of `raw_length` in the encoder and in the decoder, with EOS.

    With `random_roll` the rotation may cut a masked span in two, which takes a sentinel more in
    each; a sample in which it does not is shorter by that one. Otherwise all are equally long.
    """
    noise, spans = span_counts(raw_length, density, mean_span)
    return raw_length - noise + spans + random_roll + 1, noise + spans + random_roll + 1


def span_shape(
    encoder_length: int, density: float, mean_span: float, random_roll: bool = False
) -> tuple[int, int]:
    """The greatest raw sample whose encoder text fits, as t5's `random_spans_helper` finds it.

    At a density of exactly 0.5 t5 takes one token less so that both lengths are equal; this
    exception is not made here.

    Args:
        encoder_length: tokens of the encoder, EOS included; 512 gives (568, 114) by default.
        density: share of masked tokens, in (0, 1).
        mean_span: mean masked tokens per span, at least 1.
        random_roll: whether the mask is rotated; its longest texts must fit.

    Returns:
        (raw length, decoder length needed).

    Raises:
        UserError: at a value out of range, or where no or only an enormous sample fits.
    """
    if not 0.0 < density < 1.0:
        raise UserError(f"noise_density is {density}; it must lie between 0 and 1 (T5: 0.15).")
    if not 1.0 <= mean_span < float("inf"):
        raise UserError(f"mean_span_length is {mean_span}; it must be at least 1 (T5: 3.0).")
    shortest = text_lengths(2, density, mean_span, random_roll)[0]
    if encoder_length < shortest:
        raise UserError(
            f"encoder_length is {encoder_length}; the shortest span-corrupted sample takes "
            f"{shortest} (a token, its sentinels, EOS). Raise it."
        )
    if text_lengths(MAX_RAW_LENGTH, density, mean_span, random_roll)[0] <= encoder_length:
        raise UserError(
            f"encoder_length {encoder_length} with noise_density {density} and mean_span_length "
            f"{mean_span} asks for samples of more than {MAX_RAW_LENGTH} raw tokens. Lower them."
        )
    # The encoder's length never falls as the sample grows, so the greatest fit can be bisected.
    fits, too_long = 2, MAX_RAW_LENGTH
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if text_lengths(middle, density, mean_span, random_roll)[0] <= encoder_length:
            fits = middle
        else:
            too_long = middle
    return fits, text_lengths(fits, density, mean_span, random_roll)[1]


def draw_composition(random: Random, tokens: int, segments: int) -> list[int]:
    """Split `tokens` into non-empty segments, uniformly over all splits.

    The cuts are a uniform subset of the places between two tokens (Floyd's algorithm).

    Args:
        random: consumed by segments - 1 bounded draws.
        tokens: total of the segments.
        segments: 1 to `tokens`.

    Returns:
        lengths of the segments in order.
    """
    cuts: set[int] = set()
    for newest in range(tokens - segments, tokens - 1):
        cut = random.below(newest + 1)
        cuts.add(newest if cut in cuts else cut)
    ends = [cut + 1 for cut in sorted(cuts)] + [tokens]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def mask_spans(
    raw: Sequence[int] | NDArray[np.int64],
    random: Random,
    noise_tokens: int,
    spans: int,
    *,
    sentinel_top: int,
    random_roll: bool,
) -> tuple[list[int], list[int]]:
    """Both texts of a sample, without EOS; see `corrupt`."""
    noise_lengths = draw_composition(random, noise_tokens, spans)
    text_segments = draw_composition(random, len(raw) - noise_tokens, spans)
    mask: list[bool] = []
    for kept, masked in zip(text_segments, noise_lengths, strict=True):
        mask += [False] * kept + [True] * masked
    if random_roll:
        start = len(raw) - random.below(len(raw))
        mask = mask[start:] + mask[:start]
    encoder_text: list[int] = []
    target_text: list[int] = []
    sentinel = sentinel_top
    for token, masked, before in zip(raw, mask, [False, *mask], strict=False):
        if masked and not before:
            sentinel -= 1
            encoder_text.append(sentinel)
            target_text.append(sentinel)
        (target_text if masked else encoder_text).append(int(token))
    return encoder_text, target_text


def corrupt(
    raw: NDArray[np.int64],
    *,
    noise_tokens: int,
    spans: int,
    sentinel_top: int,
    encoder_length: int,
    decoder_length: int,
    seed: int,
    sample_index: int,
    random_roll: bool = False,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """One sample in plain Python; the C++ core gives the same, bit for bit.

    Args:
        raw: token ids [L].
        noise_tokens: of them masked.
        spans: masked spans.
        sentinel_top: the first sentinel is this id less one, the next one below, and so on.
        encoder_length: padded length of the encoder text.
        decoder_length: padded length of the targets.
        seed: 64 bits.
        sample_index: global index of the sample.
        random_roll: rotate the mask (t5's option). Otherwise a sample begins with kept text and
            ends with a masked span, and the middle is masked more often than the beginning.

    Returns:
        (encoder tokens [encoder_length], decoder input and targets [decoder_length] each).
    """
    random = Random(seed, sample_index, Stream.SPANS)
    encoder_text, target_text = mask_spans(
        raw, random, noise_tokens, spans, sentinel_top=sentinel_top, random_roll=random_roll
    )
    encoder = np.full(encoder_length, PAD_ID, dtype=np.int32)
    targets = np.full(decoder_length, PAD_ID, dtype=np.int32)
    encoder[: len(encoder_text) + 1] = [*encoder_text, EOS_ID]
    targets[: len(target_text) + 1] = [*target_text, EOS_ID]
    decoder = np.concatenate([[np.int32(PAD_ID)], targets[:-1]])
    return encoder, decoder, targets


@dataclass(frozen=True, eq=False)
class Seq2SeqBatch:
    """Samples for an encoder-decoder; B rows, Le encoder and Ld decoder positions.

    Attributes:
        encoder_tokens: [B, Le] int32 as they come from a loader, int64 on a device.
        decoder_tokens: [B, Ld] likewise, the targets shifted right behind a pad id.
        decoder_targets: [B, Ld] likewise.
        encoder_mask: [B, Le] bool, True at a real token.
        decoder_mask: [B, Ld] bool, True where there is a target.
        sample_index: [B] int64, global indices of the samples.
        encoder_segments: [B, Le] likewise, of rows that hold several documents: 0 on padding, else
            which of the row's documents a token belongs to, from 1. None: a row is one document.
        decoder_segments: [B, Ld] likewise.
        source: [B] int64, which source of a mixture each comes from; None without a mixture.
    """

    encoder_tokens: torch.Tensor
    decoder_tokens: torch.Tensor
    decoder_targets: torch.Tensor
    encoder_mask: torch.Tensor
    decoder_mask: torch.Tensor
    sample_index: torch.Tensor
    encoder_segments: torch.Tensor | None = None
    decoder_segments: torch.Tensor | None = None
    source: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.encoder_tokens.shape[0]

    def to(self, device: torch.device | str) -> Seq2SeqBatch:
        """The same batch on another device, where tokens are widened to int64.

        Half the bytes travel, and from pinned memory they travel while the host goes on.
        """
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: t.to(device, non_blocking=True) for k, t in held.items() if t is not None}
        wide = {name: t.long() for name, t in moved.items() if t.dtype == torch.int32}
        return replace(self, **moved | wide)
