"""Types of the C++ data core (`csrc/bindings.cpp`). Only `megaswitch.data.native` imports it."""

import numpy as np
from numpy.typing import NDArray

class DataError(ValueError):
    """A file that cannot be used, in words for the user."""

class IndexedTokens:
    """A memory-mapped `.bin/.idx` pair, validated in full at construction."""

    def __init__(self, prefix: str) -> None: ...
    @property
    def type_code(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    def document(self, i: int, /) -> tuple[int, int]:
        """(start, count) of a document in the flat stream."""

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
    ) -> None: ...

class SpanSampler:
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

    def fill(
        self,
        sample_indices: NDArray[np.int64],
        encoder_tokens: NDArray[np.int64],
        decoder_tokens: NDArray[np.int64],
        decoder_targets: NDArray[np.int64],
    ) -> None:
        """Write one row per index; runs without the GIL."""

def corrupt(
    raw: NDArray[np.int64], layout: SpanLayout, *, seed: int, sample_index: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """One sample: encoder tokens, decoder tokens, decoder targets."""

def permute(positions: NDArray[np.int64], *, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Elements of the keyed permutation of [0, size) at `positions`."""

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """One block of Philox4x32-10."""
