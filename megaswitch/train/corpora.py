"""Which data a run reads, and which samples each rank gets when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megaswitch.config import RunConfig
from megaswitch.data.mixture import Mixture, source_seed
from megaswitch.data.samples import Corpus, Samples
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.validation import Validation, open_corpus


def build_loader(config: RunConfig, split: str) -> Samples:
    """The samples of `data.train` (shuffled, perhaps a mixture) or of `data.valid` (in order)."""
    prefix: str | Mapping[str, str] | None = getattr(config.data, split)
    if prefix is None:
        raise UserError(
            f"data.{split} is not set; it must name the .bin/.idx pair that `megaswitch "
            f"preprocess` wrote, without suffix: --data.{split}=PREFIX"
        )
    if isinstance(prefix, str):
        return _open(config, {split: prefix}, shuffle=split == "train")[split]
    if split == "valid":
        raise UserError(
            f"data.valid names {len(prefix)} corpora, and one is needed here; give the prefix of "
            f"one: --data.valid={next(iter(prefix.values()))}"
        )
    mixture = config.data.mixture
    return Mixture(
        _open(config, prefix, shuffle=True, own_seeds=True),
        seed=config.train.seed,
        block=mixture.block,
        weights=mixture.weights,
        exponent=1.0 if mixture.exponent is None else mixture.exponent,
        cap=mixture.cap,
        by_tokens=mixture.size == "tokens",
    )


def build_validation(config: RunConfig) -> list[Validation]:
    """Validation on the corpora of `data.valid`, by name; one without a name, or none."""
    valid = config.data.valid or {}
    prefixes = {"": valid} if isinstance(valid, str) else valid
    return [
        Validation(
            loader,
            samples=config.train.valid_samples,
            micro_batch_size=config.train.micro_batch_size,
            name=name,
        )
        for name, loader in _open(config, prefixes, shuffle=False).items()
    ]


def _open(
    config: RunConfig, prefixes: Mapping[str, str], *, shuffle: bool, own_seeds: bool = False
) -> dict[str, Corpus]:
    tokenizer = Tokenizer(config.data.tokenizer).info if config.data.tokenizer else None
    seed = config.train.seed
    return {
        name: open_corpus(
            config,
            prefix,
            tokenizer,
            shuffle=shuffle,
            seed=source_seed(seed, name) if own_seeds else seed,
        )
        for name, prefix in prefixes.items()
    }


def batch_size(config: RunConfig, samples: int) -> int:
    """Sequences of the step that begins after `samples` sequences were consumed."""
    train = config.train
    if train.rampup_batch_size is None:
        return train.batch_size
    assert train.rampup_increment
    assert train.rampup_samples
    increments = (train.batch_size - train.rampup_batch_size) // train.rampup_increment
    done = min(increments, samples * increments // train.rampup_samples)
    return train.rampup_batch_size + done * train.rampup_increment


def micro_batches(config: RunConfig, mesh: Mesh, samples: int) -> Iterator[range]:
    """Sample indices of all micro-batches of this rank after so many samples, without end.

    Every step's samples are dealt out in runs to the data-parallel ranks in their order.
    """
    size = config.train.micro_batch_size
    while True:
        whole = batch_size(config, samples)
        share = whole // mesh.dp.size
        start = samples + mesh.dp.rank * share
        for first in range(start, start + share, size):
            yield range(first, first + size)
        samples += whole
