"""Samples that keep to documents: packed span corruption, prefix language modelling, text pairs.

As in `loader.py`, sample i is the same whoever asks for it. What stands in a row is settled once by
`packing.py`; the order of the rows and the choice of spans are drawn from (seed, i).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megaswitch import native
from megaswitch.data.corpus_checks import (
    check_ids,
    check_sentinels,
    check_vocabulary,
    ends_in_eos,
    fingerprint,
)
from megaswitch.data.indexed import TokenizerInfo, TokenStore, companion
from megaswitch.data.packing import SHORTEST, open_rows
from megaswitch.data.samples import Corpus
from megaswitch.data.span_corruption import span_counts, text_lengths
from megaswitch.log import UserError

Objective = Literal["span-corruption", "prefix-lm", "text-to-text"]


class DocumentLoader(Corpus):
    """Samples of the documents of one corpus, a pure function of global sample indices.

    Each row is one or, with `packing`, several pieces: documents, or parts of those that are longer
    than a row. Every epoch sees each piece once, in rows of an order keyed by (seed, epoch);
    without `shuffle` in the same order always. Where documents end in EOS, that one is left out:
    both texts of every piece get their own.

    - "span-corruption": T5's, of each piece by itself; its sentinels begin at the top.
    - "prefix-lm": the encoder reads a prefix and the decoder writes the rest; the split is drawn
      anew each epoch, uniformly. A piece has at most as many tokens as the shorter of both rows, so
      that any split fits.
    - "text-to-text": document k of `prefix`_inputs is the input and document k of
      `prefix`_targets the target. What is too long for a row, with its EOS, loses its end.

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.
        objective: as above.
        packing: several documents to a row, told apart by segments.
        seed: 0 to 2^64 - 1.
        vocab_size: of the model.
        encoder_length: encoder positions Le.
        decoder_length: decoder positions Ld; None takes what a full encoder row needs.
        noise_density: share of masked tokens.
        mean_span_length: mean masked tokens per span.
        num_sentinels: sentinels the tokenizer has.
        random_roll: rotate the mask, so that every position is masked equally often.
        shuffle: False for validation.
        tokenizer: what the user names as the corpus's; one that the sidecar contradicts is refused.
        pread: read by pread() instead of a mapping, for parallel file systems.

    Attributes:
        stores: the corpus, or both of a corpus of pairs.
        rows: which pieces each row holds.
        samples_per_epoch: rows.
        pieces_per_epoch: documents and parts of documents in them.
        decoder_length: Ld.
        sentinel_top: the id above the first sentinel.
        fill_rate: shares of encoder and decoder positions that are not padding (of prefix-lm and
            with random_roll, at the most).
        fingerprint: 16 hex digits, equal where all samples are equal.

    Raises:
        UserError: if files are missing or damaged, or the corpus, the tokenizer, the vocabulary or
            the lengths do not fit each other.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        objective: Objective,
        packing: bool,
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
        self.objective, self.packed = objective, packing
        self.encoder_length, self.num_sentinels = encoder_length, num_sentinels
        self.stores = _open(prefix, objective, pread=pread)
        self.num_tokens = sum(store.num_tokens for store in self.stores)
        endings = self._check_corpora(vocab_size, tokenizer)
        texts = [
            native.Texts(store.native, ends_in_eos=ending, vocab_size=vocab_size)
            for store, ending in zip(self.stores, endings, strict=True)
        ]
        corruption = (noise_density, mean_span_length, random_roll)
        pieces = self._pieces(texts, decoder_length, corruption)
        shape = native.RowShape(
            encoder_length=encoder_length, decoder_length=self.decoder_length, packed=packing
        )
        settings: dict[str, object] = {
            "objective": objective,
            "packing": packing,
            "encoder_length": encoder_length,
            "decoder_length": self.decoder_length,
            "ends_in_eos": endings,
        }
        if objective == "span-corruption":
            settings["corruption"] = corruption
        # Of a corpus without a sidecar, the index holds all that rows depend on.
        digests = [s.meta.content_sha256 if s.meta else _digest_of_index(s) for s in self.stores]
        rows = open_rows(prefix, pieces, shape, {**settings, "content": digests})
        self.rows = rows
        self.samples_per_epoch, self.pieces_per_epoch = rows.rows, rows.pieces
        self.fill_rate = (
            rows.encoder_tokens / (rows.rows * encoder_length),
            rows.decoder_tokens / (rows.rows * self.decoder_length),
        )
        self.sampler = native.DocumentSampler(pieces, rows, shape, seed=seed, shuffle=shuffle)
        settings |= {"seed": seed, "shuffle": shuffle, "sentinel_top": self.sentinel_top}
        self.fingerprint = fingerprint(self.stores, self.tokenizer_sha256, settings)

    def _check_corpora(self, vocab_size: int, tokenizer: TokenizerInfo | None) -> list[bool]:
        """Set `sentinel_top`; whether the documents of each corpus end in EOS."""
        for store in self.stores:
            top, self.tokenizer_sha256 = check_vocabulary(
                store, vocab_size, self.num_sentinels, tokenizer
            )
            # Pairs may be about sentinels: filling blanks is a task like any other.
            pairs = self.objective == "text-to-text"
            check_ids(store, vocab_size, None if pairs else top - self.num_sentinels)
            self.sentinel_top = top
        return [ends_in_eos(store) for store in self.stores]

    def _pieces(
        self,
        texts: Sequence[native.Texts],
        decoder_length: int | None,
        corruption: tuple[float, float, bool],
    ) -> native.Pieces:
        """Set `decoder_length`; the pieces of the corpus."""
        if self.objective == "text-to-text":
            if decoder_length is None:
                raise UserError(
                    "decoder_length is not set, and text-to-text has no natural one: targets are "
                    "as long as the task wants. Set it."
                )
            self.decoder_length = decoder_length
            return native.TextPairs(
                *texts, encoder_length=self.encoder_length, decoder_length=decoder_length
            )
        if self.objective == "prefix-lm":
            self.decoder_length = decoder_length or self.encoder_length
            longest = min(self.encoder_length, self.decoder_length)
            if longest <= SHORTEST:
                raise UserError(
                    f"a prefix-lm row of {longest} positions is too short; give encoder and "
                    f"decoder at least {SHORTEST + 1}."
                )
            return native.PrefixDocuments(texts[0], longest=longest)
        noise, spans = _tables(self.encoder_length, decoder_length, corruption)
        roll = corruption[2]
        check_sentinels(spans[-1] + roll, self.num_sentinels)
        self.decoder_length = decoder_length or noise[-1] + spans[-1] + roll + 1
        return native.SpanDocuments(
            texts[0], noise=noise, spans=spans, sentinel_top=self.sentinel_top, random_roll=roll
        )


def _open(prefix: str | Path, objective: Objective, *, pread: bool) -> list[TokenStore]:
    """The corpora that the objective reads, none of them empty."""
    pair = objective == "text-to-text"
    prefixes = [companion(prefix, s) for s in ("_inputs", "_targets")] if pair else [Path(prefix)]
    stores = [TokenStore(p, pread=pread) for p in prefixes]
    for store in stores:
        if store.num_tokens == 0:
            raise UserError(
                f"'{store.prefix}' holds no tokens. Preprocess a text that is not empty."
            )
    documents = [store.num_documents for store in stores]
    if len(set(documents)) > 1:
        raise UserError(
            f"'{prefixes[0]}' has {documents[0]} documents and '{prefixes[1]}' {documents[1]}, and "
            "document k of one must belong to document k of the other. Write both anew with "
            "`preprocess_pairs`."
        )
    return stores


def _tables(
    encoder_length: int, decoder_length: int | None, corruption: tuple[float, float, bool]
) -> tuple[list[int], list[int]]:
    """Masked tokens and spans of a piece of 0, 1, 2, … tokens, up to the longest that fits."""
    noise, spans = [0, 0], [0, 0]
    while True:
        encoder, decoder = text_lengths(len(noise), *corruption)
        if encoder > encoder_length or decoder > (decoder_length or decoder):
            break
        counts = span_counts(len(noise), *corruption[:2])
        noise.append(counts[0])
        spans.append(counts[1])
    if len(noise) <= SHORTEST + 1:
        raise UserError(
            f"encoder_length {encoder_length} and decoder_length {decoder_length} are too short: a "
            "span-corrupted document takes at least 4 positions of the encoder and 3 of the "
            "decoder. Raise them."
        )
    return noise, spans


def _digest_of_index(store: TokenStore) -> str:
    with companion(store.prefix, ".idx").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
