"""Span-corrupted samples straight from the token files, by global sample index."""

from __future__ import annotations

from pathlib import Path

from megaswitch import native
from megaswitch.data.corpus_checks import check_ids, check_sentinels, check_vocabulary, fingerprint
from megaswitch.data.indexed import TokenizerInfo, TokenStore
from megaswitch.data.samples import Corpus
from megaswitch.data.span_corruption import span_counts, span_shape
from megaswitch.log import UserError


class SpanCorruptionLoader(Corpus):
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
        random_roll: rotate the mask, so that every position is masked equally often; texts then
            differ by a sentinel.
        shuffle: False for validation.
        tokenizer: what the user names as the corpus's; one that the sidecar contradicts is refused.
        pread: read by pread() instead of a mapping, for parallel file systems.

    Attributes:
        store: the corpus.
        tokens_per_sample: raw tokens a sample is made of.
        sentinel_top: the id above the first sentinel.
        tokenizer_sha256: of the tokenizer that the corpus was made with, if it is known.

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
        random_roll: bool = False,
        shuffle: bool = True,
        tokenizer: TokenizerInfo | None = None,
        pread: bool = False,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise UserError(f"the data seed is {seed}; it must lie in [0, 2^64).")
        self.store = TokenStore(prefix, pread=pread)
        self.num_tokens = self.store.num_tokens
        self.encoder_length = encoder_length
        self.num_sentinels = num_sentinels
        corruption = noise_density, mean_span_length
        raw_length, needed = span_shape(encoder_length, *corruption, random_roll)
        self.tokens_per_sample = raw_length
        self.decoder_length = needed if decoder_length is None else decoder_length
        if self.decoder_length < needed:
            raise UserError(
                f"decoder_length is {decoder_length}, but encoder_length {encoder_length} with "
                f"noise_density {noise_density} and mean_span_length {mean_span_length} needs "
                f"{needed} decoder positions. Raise it to {needed} or leave it out."
            )
        noise, spans = span_counts(raw_length, *corruption)
        check_sentinels(spans + random_roll, num_sentinels)
        self.sentinel_top, self.tokenizer_sha256 = check_vocabulary(
            self.store, vocab_size, num_sentinels, tokenizer
        )
        offset_choices = self._divide_corpus(shuffle)
        check_ids(self.store, vocab_size, self.sentinel_top - num_sentinels)
        layout = {
            "raw_length": raw_length,
            "noise_tokens": noise,
            "spans": spans,
            "encoder_length": self.encoder_length,
            "decoder_length": self.decoder_length,
            "sentinel_top": self.sentinel_top,
        }
        self.sampler = self._spans = native.SpanSampler(
            self.store.native,
            native.SpanLayout(**layout, random_roll=random_roll),
            seed=seed,
            vocab_size=vocab_size,
            samples_per_epoch=self.samples_per_epoch,
            offset_choices=offset_choices,
            shuffle=shuffle,
        )
        order = {"seed": seed, "shuffle": shuffle, "random_roll": random_roll}
        self.fingerprint = fingerprint([self.store], self.tokenizer_sha256, {**layout, **order})

    def sample_start(self, index: int) -> int:
        """Position in the flat token stream of the first raw token of a global sample index."""
        return self._spans.sample_start(index)

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
