"""Rows by global sample index, and a stream of batches that are made ahead of their use.

`Samples` is all that training, validation and mixtures know of data, whatever its kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megaswitch import native
from megaswitch.data.span_corruption import PAD_ID, Seq2SeqBatch
from megaswitch.log import UserError


@dataclass(frozen=True)
class Segment:
    """From sample `start` on, every block of a mixture holds `quotas` samples of each source.

    Attributes:
        start: global index of the segment's first sample.
        quotas: of the sources in the mixture's order; their sum is the block.
    """

    start: int
    quotas: tuple[int, ...]


class Samples:
    """Samples for an encoder-decoder, each a pure function of its global index.

    There is no shuffle index and no state: sample i is the same whoever asks for it, in whatever
    batch. Where training stands is the one integer of the next index.

    Attributes:
        sampler: the C++ side.
        encoder_length: encoder positions Le.
        decoder_length: decoder positions Ld.
        packed: whether several documents share a row, told apart by segments.
        samples_per_epoch: after so many samples all of the data was read once.
        fingerprint: 16 hex digits, equal where all samples are equal: data, tokenizer, seed and
            shapes. A resume on another one must be refused.
        source_names: of a mixture.
        segments: of a mixture, since when each proportion holds.
    """

    sampler: native.Sampler
    encoder_length: int
    decoder_length: int
    samples_per_epoch: int
    fingerprint: str
    packed: bool = False
    source_names: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()

    def batch(self, indices: range | Sequence[int]) -> Seq2SeqBatch:
        """The samples of these global indices, one row each, made here and now.

        Args:
            indices: global sample indices, each in [0, 2^62).

        Returns:
            batch of len(indices) rows.

        Raises:
            UserError: at a token id outside the model's vocabulary, or if a file was cut.
        """
        rows = _Rows.empty(self, indices)
        try:
            self.sampler.fill(*rows.arrays())
        except native.DataError as error:
            raise UserError(str(error)) from None
        return self._finish(rows)

    def stream(
        self, plan: Iterable[range], *, threads: int = 1, ahead: int = 8, pin: bool = False
    ) -> BatchStream:
        """The batches of `plan`, in its order, made ahead of their use.

        Args:
            plan: sample indices of each batch; may be endless.
            threads: that make them.
            ahead: batches made before they are asked for.
            pin: whether the rows lie in pinned memory, from which a CUDA device copies by itself.
        """
        return BatchStream(self, plan, threads=threads, ahead=ahead, pin=pin)

    def go_on(self, stored: Sequence[Segment], samples: int) -> None:
        """Go on after so many samples, drawn as `stored` says. Only mixtures are of several minds.

        Raises:
            UserError: if that cannot have been drawn from these sources.
        """

    def counters(self, samples: int) -> dict[str, float]:
        """What each source of a mixture gave to the first so many samples."""
        return {}

    def source_of(self, indices: torch.Tensor) -> torch.Tensor | None:
        """Which of `source_names` each sample [B] comes from, [B] int64; None without a mixture."""
        return None

    def _finish(self, rows: _Rows) -> Seq2SeqBatch:
        segments = rows.encoder_segments, rows.decoder_segments
        texts = rows.encoder_tokens, rows.decoder_targets
        encoder_mask, decoder_mask = (
            text_mask(text) if segment is None else segment > 0
            for text, segment in zip(texts, segments, strict=True)
        )
        return Seq2SeqBatch(
            encoder_tokens=rows.encoder_tokens,
            decoder_tokens=rows.decoder_tokens,
            decoder_targets=rows.decoder_targets,
            encoder_mask=encoder_mask,
            decoder_mask=decoder_mask,
            sample_index=rows.sample_index,
            encoder_segments=segments[0],
            decoder_segments=segments[1],
            source=self.source_of(rows.sample_index),
        )


class Corpus(Samples):
    """Samples of one corpus.

    Attributes:
        sentinel_top: the id above the first sentinel.
        num_sentinels: that samples may use.
        num_tokens: of all its texts, as stored.
        tokenizer_sha256: of the tokenizer that the corpus was made with, if it is known.
    """

    num_tokens: int
    sentinel_top: int
    num_sentinels: int
    tokenizer_sha256: str | None


def text_mask(tokens: torch.Tensor) -> torch.Tensor:
    """[B, L] bool, True up to and with the EOS that ends the text of each row [B, L].

    The pad id may occur in a text, so it is the last other id that counts.
    """
    if bool((tokens[:, -1:] != PAD_ID).all()):  # as a rule no row is padded
        return torch.ones_like(tokens, dtype=torch.bool)
    positions = torch.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype)
    ends = torch.where(tokens != PAD_ID, positions, 0).amax(1, keepdim=True)
    return positions <= ends


class BatchStream:
    """An iterator of batches that threads of the C++ core make ahead. `close` ends them.

    A batch that could not be made raises when it is its turn, and those behind it can still be had.
    It belongs to the process that made it: a forked child is refused.
    """

    def __init__(
        self, samples: Samples, plan: Iterable[range], *, threads: int, ahead: int, pin: bool
    ) -> None:
        self._samples, self._plan, self._pin = samples, iter(plan), pin
        self._waiting: deque[_Rows] = deque()
        try:
            self._loader = native.Loader(samples.sampler, threads=threads, capacity=ahead)
        except native.DataError as error:
            raise UserError(str(error)) from None
        for _ in range(ahead):
            self._submit()

    def __iter__(self) -> Iterator[Seq2SeqBatch]:
        return self

    def __next__(self) -> Seq2SeqBatch:
        if not self._waiting:
            raise StopIteration
        try:
            self._loader.next()
        except native.DataError as error:
            self._advance()
            raise UserError(str(error)) from None
        except Exception:
            self.close()
            raise
        return self._samples._finish(self._advance())

    def close(self) -> None:
        """Stop the threads; what they were making just now is finished first, the rest dropped."""
        self._waiting.clear()
        self._loader.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _advance(self) -> _Rows:
        rows = self._waiting.popleft()
        self._submit()
        return rows

    def _submit(self) -> None:
        indices = next(self._plan, None)
        if indices is not None:
            rows = _Rows.empty(self._samples, indices, pin=self._pin)
            try:
                self._loader.submit(*rows.arrays())
            except native.DataError as error:
                raise UserError(str(error)) from None
            self._waiting.append(rows)


@dataclass(frozen=True)
class _Rows:
    """Memory for a batch, allocated by torch and filled by the core.

    Pinned memory comes from torch's cache of it, which gives no block away before the copies out of
    it are done.
    """

    sample_index: torch.Tensor
    encoder_tokens: torch.Tensor
    decoder_tokens: torch.Tensor
    decoder_targets: torch.Tensor
    encoder_segments: torch.Tensor | None = None
    decoder_segments: torch.Tensor | None = None

    @classmethod
    def empty(cls, samples: Samples, indices: range | Sequence[int], *, pin: bool = False) -> _Rows:
        rows = len(indices)
        encoder, decoder = samples.encoder_length, samples.decoder_length
        lengths = [encoder, decoder, decoder, *((encoder, decoder) if samples.packed else ())]
        tokens = (torch.empty(rows, n, dtype=torch.int32, pin_memory=pin) for n in lengths)
        index = np.fromiter(indices, dtype=np.int64, count=rows)
        return cls(torch.from_numpy(index), *tokens)

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """As the core takes them."""
        tokens = self.encoder_tokens, self.decoder_tokens, self.decoder_targets
        segments = self.encoder_segments, self.decoder_segments
        filled = [t for t in (*tokens, *segments) if t is not None]
        return self.sample_index.numpy(), *(t.numpy() for t in filled)
