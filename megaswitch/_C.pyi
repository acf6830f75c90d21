"""Types of the C++ core (`csrc/bindings.cpp`). Only `megaswitch.native` imports it."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

class DataError(ValueError):
    """A file that cannot be used, in words for the user."""

class IndexedTokens:
    """A memory-mapped `.bin/.idx` pair, validated in full at construction."""

    def __init__(self, prefix: str, *, pread: bool = False) -> None: ...
    @property
    def type_code(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    def document(self, index: int) -> tuple[int, int]:
        """(start, count) of a document in the flat stream."""

    def document_lengths(self, first: int, out: NDArray[np.int64]) -> None:
        """Tokens of as many documents as `out` holds."""

    def sequence_lengths(self, first: int, out: NDArray[np.int64]) -> None:
        """Tokens of as many sequences as `out` holds."""

    def document_starts(self, first: int, out: NDArray[np.int64]) -> None:
        """First sequences of documents; that of document `num_documents` is their number."""

    def read(self, start: int, out: NDArray[np.int64]) -> None:
        """Widen tokens from `start` into `out`."""

    def id_range(self, budget: int) -> tuple[int, int]:
        """Smallest and largest id, of about `budget` evenly spread tokens if there are more."""

class SpanLayout:
    """What all span-corrupted samples of a run have in common."""

    def __init__(
        self,
        *,
        raw_length: int,
        noise_tokens: int,
        spans: int,
        encoder_length: int,
        decoder_length: int,
        sentinel_top: int,
        random_roll: bool = False,
    ) -> None: ...

class Sampler:
    """Rows by global sample index; `csrc/sampler.h` says what every sampler promises."""

    @property
    def encoder_length(self) -> int: ...
    @property
    def decoder_length(self) -> int: ...
    @property
    def packs_documents(self) -> bool: ...
    def fill(
        self,
        sample_indices: NDArray[np.int64],
        encoder_tokens: NDArray[np.int32],
        decoder_tokens: NDArray[np.int32],
        decoder_targets: NDArray[np.int32],
        encoder_segments: NDArray[np.int32] | None = None,
        decoder_segments: NDArray[np.int32] | None = None,
    ) -> None:
        """Write one row per index; runs without the GIL."""

class SpanSampler(Sampler):
    """Samples of a corpus as a pure function of (seed, global sample index)."""

    def __init__(
        self,
        tokens: IndexedTokens,
        layout: SpanLayout,
        *,
        seed: int,
        vocab_size: int,
        samples_per_epoch: int,
        offset_choices: int,
        shuffle: bool,
    ) -> None: ...
    def sample_start(self, sample_index: int) -> int:
        """First raw token of a sample."""

class MixtureOrder:
    """Which sample of which source each global sample is."""

    def __init__(
        self, seed: int, block: int, segments: Sequence[tuple[int, Sequence[int]]]
    ) -> None: ...
    def locate(
        self, sample_indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and position within it of each sample."""

    def seen(self, count: int) -> list[int]:
        """Samples of each source among the first `count`."""

class MixtureSampler(Sampler):
    """Samples of several sources in the order of a mixture."""

    def __init__(self, sources: Sequence[Sampler], order: MixtureOrder) -> None: ...

class Loader:
    """Threads that fill batches ahead of their use."""

    def __init__(self, sampler: Sampler, *, threads: int, capacity: int) -> None: ...
    def submit(
        self,
        sample_indices: NDArray[np.int64],
        encoder_tokens: NDArray[np.int32],
        decoder_tokens: NDArray[np.int32],
        decoder_targets: NDArray[np.int32],
        encoder_segments: NDArray[np.int32] | None = None,
        decoder_segments: NDArray[np.int32] | None = None,
    ) -> None:
        """Queue a batch; the arrays are filled by the time that `next` returns for it."""

    def next(self) -> None:
        """Wait for the oldest batch; raises what its thread raised."""

    def close(self) -> None:
        """Stop the threads."""

class Texts:
    """A corpus as its documents' texts; with `ends_in_eos` the last token of each is left out."""

    def __init__(self, tokens: IndexedTokens, *, ends_in_eos: bool, vocab_size: int) -> None: ...

class RowShape:
    """Size of rows, and whether several documents may share one."""

    def __init__(self, *, encoder_length: int, decoder_length: int, packed: bool) -> None: ...

class Pieces:
    """A corpus cut into pieces, and how a piece becomes an encoder and a decoder text."""

class SpanDocuments(Pieces):
    """Pieces span-corrupted; `noise` and `spans` by their length, from 0 on."""

    def __init__(
        self,
        texts: Texts,
        *,
        noise: list[int],
        spans: list[int],
        sentinel_top: int,
        random_roll: bool = False,
    ) -> None: ...

class PrefixDocuments(Pieces):
    """Pieces of at most `longest` tokens, split in two."""

    def __init__(self, texts: Texts, *, longest: int) -> None: ...

class TextPairs(Pieces):
    """Document k of both corpora."""

    def __init__(
        self, inputs: Texts, targets: Texts, *, encoder_length: int, decoder_length: int
    ) -> None: ...

def count_rows(pieces: Pieces, shape: RowShape) -> list[int]:
    """How many rows hold 1, 2, 3, … pieces."""

def write_rows(pieces: Pieces, shape: RowShape, counts: list[int], out: NDArray[np.uint64]) -> None:
    """Write the pieces of all rows, by the number of pieces; each document << 24 | part."""

class RowIndex:
    """A file of rows, checked in full at construction."""

    def __init__(self, path: str, key: bytes, pieces: Pieces, shape: RowShape) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def pieces(self) -> int: ...
    @property
    def encoder_tokens(self) -> int: ...
    @property
    def decoder_tokens(self) -> int: ...
    def row(self, row: int) -> list[tuple[int, int]]:
        """(document, part) of each piece."""

class DocumentSampler(Sampler):
    """Rows of pieces as a pure function of (seed, global sample index)."""

    def __init__(
        self, pieces: Pieces, rows: RowIndex, shape: RowShape, *, seed: int, shuffle: bool
    ) -> None: ...
    def row(self, sample_index: int) -> int:
        """Row of a sample."""

def corrupt(
    raw: NDArray[np.int64], layout: SpanLayout, *, seed: int, sample_index: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """One sample: encoder tokens, decoder tokens, decoder targets."""

def permute(positions: NDArray[np.int64], *, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Elements of the keyed permutation of [0, size) at `positions`."""

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """One block of Philox4x32-10."""

_Numbers = TypeVar("_Numbers", np.float32, np.float64)

def adafactor(
    parameter: NDArray[_Numbers],
    gradient: NDArray[_Numbers],
    row: NDArray[_Numbers],
    column: NDArray[_Numbers],
    *,
    learning_rate: float,
    beta2: float,
    clip_threshold: float,
    epsilon1: float,
    epsilon2: float,
    keep: float,
    scale_by_parameter: bool,
    threads: int,
) -> None:
    """Update each matrix of `parameter` […, rows, columns] and its moments, in place."""

def draw(keys: NDArray[np.int64], first: int, out: NDArray[np.float32], *, threads: int) -> None:
    """Fill `out` [N, n] with draws first … first + n of each of N keys."""
