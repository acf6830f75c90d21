"""Span-corrupted batches straight from the token files, by global sample index.

There is no shuffle index and no state: sample i is the same whoever asks for it, in whatever
batch. Where training stands is the one integer of the next index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megaswitch.data import native
from megaswitch.data.indexed import TokenizerInfo, TokenStore
from megaswitch.data.span_corruption import Seq2SeqBatch, span_counts, span_shape, text_lengths
from megaswitch.log import UserError, warn

# Tokens whose ids are checked at open; of a larger corpus so many are sampled. Each sample is
# checked again when it is read.
_ID_CHECK_BUDGET = 1 << 24
_FIRST_TEXT_ID = 3  # pad, EOS and unknown come before it

_FINGERPRINT_WINDOWS = 64
_FINGERPRINT_WINDOW_TOKENS = 1024


class SpanCorruptionLoader:
    """T5 pre-training samples of one corpus, a pure function of global sample indices.

    The corpus is one flat stream. Sample k of an epoch is the k-th chunk of `tokens_per_sample`
    tokens behind the epoch's offset; with `shuffle` offset and order are keyed by (seed, epoch),
    without it the offset is 0 and the order natural. Global index i means sample i mod N of epoch
    i div N, N being `samples_per_epoch`, and also keys the choice of spans, so that an epoch masks
    otherwise than the one before.

    Sentinels count down from the top of the *tokenizer's* vocabulary, `sentinel_top`: the sidecar
    knows it, or else `tokenizer`. Without both a corpus is taken to be made for exactly
    `vocab_size` ids. A model's vocabulary may be larger than the tokenizer's (padding), never
    smaller.

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.
        seed: 0 to 2^64 - 1.
        vocab_size: of the model.
        encoder_length: encoder positions Le; decides how long a raw sample is.
        decoder_length: decoder positions Ld; None takes exactly what the sample needs.
        noise_density: share of masked tokens.
        mean_span_length: mean masked tokens per span.
        num_sentinels: sentinels the tokenizer has.
        shuffle: False for validation.
        tokenizer: what the user names as the corpus's; one that the sidecar contradicts is refused.

    Attributes:
        store: the corpus.
        tokens_per_sample: raw tokens a sample is made of.
        samples_per_epoch: N.
        decoder_length: Ld.
        sentinel_top: the id above the first sentinel.
        fingerprint: 16 hex digits, equal where all samples are equal: corpus, seed and shapes. A
            resume on another one must be refused.

    Raises:
        UserError: if files are missing or damaged, or the corpus, the tokenizer, the vocabulary or
            the lengths do not fit each other.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        seed: int,
        vocab_size: int,
        encoder_length: int,
        decoder_length: int | None = None,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        num_sentinels: int = 100,
        shuffle: bool = True,
        tokenizer: TokenizerInfo | None = None,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise UserError(f"the data seed is {seed}; it must lie in [0, 2^64).")
        self.store = TokenStore(prefix)
        self.encoder_length = encoder_length
        self.num_sentinels = num_sentinels
        raw_length, needed = span_shape(encoder_length, noise_density, mean_span_length)
        self.tokens_per_sample = raw_length
        self.decoder_length = needed if decoder_length is None else decoder_length
        if self.decoder_length < needed:
            raise UserError(
                f"decoder_length is {decoder_length}, but encoder_length {encoder_length} with "
                f"noise_density {noise_density} and mean_span_length {mean_span_length} needs "
                f"{needed} decoder positions. Raise it to {needed} or leave it out."
            )
        noise, spans = span_counts(raw_length, noise_density, mean_span_length)
        self._text_lengths = text_lengths(raw_length, noise_density, mean_span_length)
        if spans > num_sentinels:
            raise UserError(
                f"a sample has {spans} masked spans but the tokenizer only {num_sentinels} "
                "sentinels. Lower encoder_length or noise_density, raise mean_span_length, or use "
                "a tokenizer with more sentinels."
            )
        self.sentinel_top = self._check_vocabulary(vocab_size, num_sentinels, tokenizer)
        offset_choices = self._divide_corpus(shuffle)
        self._check_ids(vocab_size, num_sentinels)
        layout = {
            "raw_length": raw_length,
            "noise_tokens": noise,
            "spans": spans,
            "encoder_length": self.encoder_length,
            "decoder_length": self.decoder_length,
            "sentinel_top": self.sentinel_top,
        }
        self._sampler = native.SpanSampler(
            self.store.native,
            native.SpanLayout(**layout),
            seed=seed,
            vocab_size=vocab_size,
            samples_per_epoch=self.samples_per_epoch,
            offset_choices=offset_choices,
            shuffle=shuffle,
        )
        self.fingerprint = self._fingerprint({**layout, "seed": seed, "shuffle": shuffle})

    def batch(self, indices: range | Sequence[int]) -> Seq2SeqBatch:
        """The samples of these global indices, one row each.

        Args:
            indices: global sample indices, each in [0, 2^63).

        Returns:
            batch of len(indices) rows.

        Raises:
            UserError: at a token id outside the model's vocabulary, or if the file was cut.
        """
        rows = len(indices)
        sample_index = torch.from_numpy(np.fromiter(indices, dtype=np.int64, count=rows))
        encoder_tokens = torch.empty(rows, self.encoder_length, dtype=torch.int64)
        decoder_tokens = torch.empty(rows, self.decoder_length, dtype=torch.int64)
        decoder_targets = torch.empty_like(decoder_tokens)
        try:
            self._sampler.fill(
                sample_index.numpy(),
                encoder_tokens.numpy(),
                decoder_tokens.numpy(),
                decoder_targets.numpy(),
            )
        except native.DataError as error:
            raise UserError(str(error)) from None
        # Raw samples are equally long, so their texts are too.
        encoder_mask = torch.zeros(rows, self.encoder_length, dtype=torch.bool)
        encoder_mask[:, : self._text_lengths[0]] = True
        decoder_mask = torch.zeros(rows, self.decoder_length, dtype=torch.bool)
        decoder_mask[:, : self._text_lengths[1]] = True
        return Seq2SeqBatch(
            encoder_tokens=encoder_tokens,
            decoder_tokens=decoder_tokens,
            decoder_targets=decoder_targets,
            encoder_mask=encoder_mask,
            decoder_mask=decoder_mask,
            sample_index=sample_index,
        )

    def sample_start(self, index: int) -> int:
        """Position in the flat token stream of the first raw token of a global sample index."""
        return self._sampler.sample_start(index)

    def _check_vocabulary(
        self, vocab_size: int, num_sentinels: int, tokenizer: TokenizerInfo | None
    ) -> int:
        prefix, meta = self.store.prefix, self.store.meta
        if meta and tokenizer and meta.tokenizer_sha256 != tokenizer.tokenizer_sha256:
            raise UserError(
                f"data.tokenizer (sha256 {tokenizer.tokenizer_sha256[:12]}...) is not the "
                f"tokenizer that '{prefix}' was made with ({meta.tokenizer_sha256[:12]}...). Give "
                "that one, or preprocess again with this one."
            )
        made_with = meta or tokenizer
        if made_with is None:
            warn(
                f"'{prefix}' has no .meta.json and data.tokenizer is not set: its tokenizer is "
                f"taken to have exactly the model's {vocab_size} ids, the top {num_sentinels} of "
                "them sentinels. Set data.tokenizer if the model's vocabulary is padded."
            )
        elif made_with.vocab_size > vocab_size:
            raise UserError(
                f"the model's vocab_size is {vocab_size}, but '{prefix}' was made with a "
                f"tokenizer of {made_with.vocab_size} ids. Raise vocab_size to at least that; a "
                "model that is trained needs a corpus of its own tokenizer."
            )
        elif made_with.num_extra_ids < num_sentinels:
            raise UserError(
                f"num_sentinels is {num_sentinels}, but '{prefix}' was made with a tokenizer of "
                f"{made_with.num_extra_ids} sentinels. Lower it, or preprocess again with more."
            )
        top = vocab_size if made_with is None else made_with.vocab_size
        if top - num_sentinels <= _FIRST_TEXT_ID:
            raise UserError(
                f"a vocabulary of {top} ids has no room for text beside {num_sentinels} sentinels "
                f"and {_FIRST_TEXT_ID} control ids. Raise vocab_size or lower num_sentinels."
            )
        return top

    def _divide_corpus(self, shuffle: bool) -> int:
        """Set `samples_per_epoch`; return how many offsets an epoch may start at.

        Every epoch has equally many samples wherever it starts, so that index arithmetic needs no
        table: where possible a sample's length less one is left over for the offset.
        """
        length, tokens = self.tokens_per_sample, self.store.num_tokens
        if tokens == 0:
            raise UserError(
                f"'{self.store.prefix}' holds no tokens. Preprocess a text that is not empty."
            )
        if tokens < length:
            raise UserError(
                f"'{self.store.prefix}' has {tokens} tokens, fewer than the {length} of one sample "
                f"at encoder_length {self.encoder_length}. Use more text or a shorter encoder."
            )
        to_spare = length - 1 if shuffle else 0
        self.samples_per_epoch = max((tokens - to_spare) // length, 1)
        return min(length - 1, tokens - self.samples_per_epoch * length) + 1

    def _check_ids(self, vocab_size: int, num_sentinels: int) -> None:
        low, high = self.store.native.id_range(_ID_CHECK_BUDGET)
        where = f"'{self.store.prefix}' contains token id"
        if low < 0:
            raise UserError(f"{where} {low}; ids are never negative. Preprocess it again.")
        if high >= vocab_size:
            raise UserError(
                f"{where} {high}, outside the model's vocabulary of {vocab_size}. Raise vocab_size "
                "to that of the tokenizer the corpus was made with; a model that is trained needs "
                "a corpus of its own tokenizer."
            )
        if high >= self.sentinel_top - num_sentinels:
            raise UserError(
                f"{where} {high}, but [{self.sentinel_top - num_sentinels}, {self.sentinel_top}) "
                "are the sentinels, which text must not contain. data.tokenizer must be the one "
                "the corpus was made with; vocab_size must count the sentinels on top of the "
                f"text's ids (T5: 32,000 + 100), or num_sentinels ({num_sentinels}) is too high."
            )

    def _fingerprint(self, settings: dict[str, int | bool]) -> str:
        """Equal for equal data order: sizes, spot-checked content, digest, seed and shape."""
        store = self.store
        digest = hashlib.sha256()
        identity = {
            **settings,
            "tokens": store.num_tokens,
            "dtype": store.dtype.name,
            "content": None if store.meta is None else store.meta.content_sha256,
        }
        digest.update(json.dumps(identity, sort_keys=True).encode())
        count = min(_FINGERPRINT_WINDOW_TOKENS, store.num_tokens)
        last_start = store.num_tokens - count
        for window in range(_FINGERPRINT_WINDOWS):
            start = last_start * window // (_FINGERPRINT_WINDOWS - 1)
            digest.update(store.tokens(start, count).tobytes())
        return digest.hexdigest()[:16]
