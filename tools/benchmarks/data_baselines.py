"""Other projects' ways from tokens to span-corrupted samples, for `data.py` to measure ours by.

Each maker returns a function that makes the next batch and says how many raw tokens are in it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaswitch.data.indexed import TokenStore
from megaswitch.data.span_corruption import EOS_ID, PAD_ID, span_counts

MakeBatch = Callable[[], int]
Ids = NDArray[np.int64]

ENCODER, DECODER, RAW = 512, 114, 568  # T5's shape
NOISE, SPANS = span_counts(RAW, 0.15, 3.0)
VOCABULARY, SENTINELS = 32_128, 100


class Unavailable(Exception):
    """A baseline that cannot be measured here; the message says why."""


# ---------------------------------------------------------------- numpy


def numpy_collator(prefix: Path, rows: int) -> MakeBatch:
    """The algorithm of the collators of HF's T5 example and of nanoT5, written anew.

    As there, examples come as lists, here already cut to the right length, and become arrays; per
    row the mask is drawn by shuffling and counting; arithmetic over the batch then puts sentinels
    in and takes the rest out.
    """
    texts, random = _pieces(prefix).tolist(), np.random.RandomState(0)
    place = 0

    def make() -> int:
        nonlocal place
        examples = [texts[(place + row) % len(texts)] for row in range(rows)]
        place += rows
        batch = np.array([np.array(example) for example in examples])
        mask = np.asarray([_mask(random) for _ in range(rows)])
        encoder = _written(batch, _sentinels(mask.astype(np.int8)))
        targets = _written(batch, _sentinels((~mask).astype(np.int8)))
        decoder = np.zeros_like(targets)
        decoder[:, 1:] = targets[:, :-1]
        decoder[:, 0] = PAD_ID
        assert (encoder.shape, decoder.shape) == ((rows, ENCODER), (rows, DECODER))
        return rows * RAW

    return make


def _mask(random: np.random.RandomState) -> NDArray[np.bool_]:
    """[RAW] bool: which tokens are masked."""
    runs = np.stack((_composition(random, RAW - NOISE), _composition(random, NOISE)), 1)
    starts = np.zeros(RAW, dtype=np.int8)
    starts[np.cumsum(runs.reshape(-1))[:-1]] = True
    return np.equal(np.cumsum(starts) % 2, 1)


def _composition(random: np.random.RandomState, tokens: int) -> Ids:
    """Lengths of `SPANS` runs that sum to `tokens`."""
    cuts = np.arange(tokens - 1) < SPANS - 1
    random.shuffle(cuts)
    run = np.cumsum(np.pad(cuts, [[1, 0]]))
    return np.unique(run, return_counts=True)[1]


def _sentinels(mask: NDArray[np.int8]) -> Ids:
    """Where a masked run begins its sentinel, in the rest of the run -1, else 0."""
    first = mask - np.roll(mask, 1, axis=-1) * mask
    first[:, 0] = mask[:, 0]
    ids = np.where(first != 0, np.cumsum(first, axis=-1), first)
    return np.where(ids != 0, VOCABULARY - ids, 0) - (mask - first)


def _written(batch: Ids, sentinels: Ids) -> Ids:
    """The texts with their sentinels, without what those stand for, and EOS."""
    ids = np.where(sentinels != 0, sentinels, batch)
    kept = ids[ids >= 0].reshape(len(batch), -1)
    return np.concatenate((kept, np.full((len(batch), 1), EOS_ID, dtype=np.int32)), axis=-1)


def numpy_whole_batches(prefix: Path, rows: int) -> MakeBatch:
    """The best that we could do in numpy: the same, from arrays and without a loop over rows."""
    texts, random = _pieces(prefix), np.random.default_rng(0)
    place = 0
    row = np.arange(rows)[:, None]

    def compositions(tokens: int) -> Ids:
        cuts = random.random((rows, tokens - 1), dtype=np.float32).argpartition(SPANS - 1, 1)
        ends = np.full((rows, SPANS), tokens)
        ends[:, :-1] = np.sort(cuts[:, : SPANS - 1], 1) + 1
        return np.diff(ends, prepend=0)

    def make() -> int:
        nonlocal place
        batch = texts[np.arange(place, place + rows) % len(texts)]
        place += rows
        runs = np.stack((compositions(RAW - NOISE), compositions(NOISE)), 2).reshape(rows, -1)
        starts = np.zeros((rows, RAW), dtype=np.int8)
        starts[row, np.cumsum(runs, 1)[:, :-1]] = 1
        mask = (np.cumsum(starts, 1, dtype=np.int8) & 1).astype(bool)
        written(batch, mask)
        targets = written(batch, ~mask)
        np.concatenate((np.full((rows, 1), PAD_ID), targets[:, :-1]), 1)
        return rows * RAW

    def written(batch: Ids, masked: NDArray[np.bool_]) -> Ids:
        first = masked.copy()
        first[:, 1:] &= ~masked[:, :-1]
        ids = np.where(first, VOCABULARY - np.cumsum(first, 1), batch)
        kept = ids[first | ~masked].reshape(rows, -1)
        return np.concatenate((kept, np.full((rows, 1), EOS_ID)), 1)

    return make


def _pieces(prefix: Path) -> Ids:
    store = TokenStore(prefix)
    count = store.num_tokens // RAW
    return store.tokens(0, count * RAW).reshape(count, RAW)


# ---------------------------------------------------------------- Megatron


class _WordPieces:
    """As much of a WordPiece tokenizer as Megatron's data set asks for; every third id goes on."""

    bos, eos, cls, sep, mask, pad = 1, 1, 32_020, 32_021, 32_022, -1

    def __init__(self) -> None:
        self.additional_special_tokens_ids = list(range(32_127, 32_027, -1))
        self.inv_vocab = {i: f"##{i}" if i % 3 == 0 else str(i) for i in range(VOCABULARY)}
        self.unique_identifiers = {"class": "benchmark"}


def megatron_t5(prefix: Path, rows: int) -> MakeBatch:
    """Megatron-core's T5 data set on the same files, whose sequences are sentences.

    A sample's raw tokens are counted in its favour: all of the encoder's and decoder's ids that are
    no padding, sentinels included.

    Raises:
        Unavailable: without megatron-core.
    """
    data_set = megatron_data_set(prefix, samples=50_000)
    place = 0

    def make() -> int:
        nonlocal place
        batch = [data_set[(place + row) % len(data_set)] for row in range(rows)]
        place += rows
        return sum(int((s["enc_mask"]).sum() + s["dec_mask"].sum()) for s in batch)

    return make


def megatron_data_set(prefix: Path, samples: int) -> Any:
    """The data set, with its index built in a folder beside the corpus."""
    t5 = _module("megatron.core.datasets.t5_dataset")
    indexed = _module("megatron.core.datasets.indexed_dataset")
    split = _module("megatron.core.datasets.utils").Split
    distributed = _module("torch.distributed")
    if not distributed.is_initialized():  # it asks for its rank before it builds an index
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = t5.T5MaskedWordPieceDatasetConfig(
        random_seed=1,
        sequence_length=ENCODER,
        sequence_length_decoder=128,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent / "megatron"),
        tokenizer=_WordPieces(),
        masking_probability=0.15,
        short_sequence_probability=0.1,
        masking_max_ngram=10,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=True,
    )
    files = indexed.IndexedDataset(str(prefix))
    documents = np.arange(len(files.document_indices) - 1, dtype=np.int32)
    return t5.T5MaskedWordPieceDataset(files, str(prefix), documents, samples, split.train, config)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name} cannot be imported: {error}") from error


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


MAKERS: dict[str, Callable[[Path, int], MakeBatch]] = {
    "Megatron-core T5": megatron_t5,
    "numpy collator (HF, nanoT5)": numpy_collator,
    "numpy, our best": numpy_whole_batches,
}
PACKAGES = ("megatron-core", "numpy")
NOT_MEASURED = {"t5 and seqio": "they need TensorFlow, which this benchmark does without"}
