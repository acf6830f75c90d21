"""Many sources in fixed proportions: how much of each, in which order, and since when.

Time is cut into blocks of consecutive samples. Every block holds exactly its quota of each source,
in an order of its own, so that any sample can be found without a table, and a longer run only adds
to a shorter one. New weights begin a new segment; what came before it stays as it was.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext
from itertools import accumulate

import torch

from megaswitch import native
from megaswitch.data.philox import KeyedPermutation, Random, Stream
from megaswitch.data.samples import Corpus, Samples, Segment
from megaswitch.log import UserError


def size_weights(
    sizes: Sequence[int], *, exponent: float = 1.0, cap: int | None = None
) -> list[Decimal]:
    """Weights by size, min(n, cap)^exponent for a source of n samples.

    An exponent of 1 mixes in proportion to the examples, 0.3 as mT5 does, 1/T at a temperature T.

    Args:
        sizes: samples per epoch of each source, at least 1.
        exponent: 0 mixes evenly.
        cap: samples beyond which a source counts as no larger (T5's artificial limit).
    """
    with localcontext(prec=40):  # the same digits on every machine, unlike floats' powers
        power = Decimal(str(exponent))
        return [Decimal(min(n, cap or n)) ** power for n in sizes]


def quotas(weights: Sequence[Decimal], block: int) -> tuple[int, ...]:
    """Whole samples of each source in a block, by the largest remainders.

    Args:
        weights: non-negative, one of them positive.
        block: samples to divide.

    Returns:
        integers that sum to `block`, each within 1 of its exact share.
    """
    with localcontext(prec=40):
        total = sum(weights)
        shares = [weight * block / total for weight in weights]
        whole = [int(share) for share in shares]
        by_rest = sorted(range(len(shares)), key=lambda d: (whole[d] - shares[d], d))
    for source in by_rest[: block - sum(whole)]:
        whole[source] += 1
    return tuple(whole)


class MixtureOrder:
    """Which sample of which source each global sample is: the oracle of `csrc/mixture.h`.

    Args:
        seed: 64 bits.
        block: samples of a block.
        segments: the first from 0, in order.
    """

    def __init__(self, seed: int, block: int, segments: Sequence[Segment]) -> None:
        self._seed, self._block, self._segments = seed, block, segments
        self._orders: dict[int, KeyedPermutation] = {}  # of blocks by their first sample

    def locate(self, index: int) -> tuple[int, int]:
        """(source, index of the sample within it) of a global sample index."""
        number = bisect_right([s.start for s in self._segments], index) - 1
        segment = self._segments[number]
        block, position = divmod(index - segment.start, self._block)
        start = index - position
        if start not in self._orders:
            self._orders[start] = KeyedPermutation(
                self._block, seed=self._seed, epoch=start, stream=Stream.MIXTURE
            )
        rank = self._orders[start][position]
        ends = list(accumulate(segment.quotas))
        source = bisect_right(ends, rank)
        quota = segment.quotas[source]
        before = self._first(number, source) + block * quota
        return source, before + rank - (ends[source] - quota)

    def _first(self, number: int, source: int) -> int:
        """Samples set aside for the segments before; a block cut short by the next counts whole."""
        pairs = zip(self._segments, self._segments[1:], strict=False)
        spans = [(a, -(-(b.start - a.start) // self._block)) for a, b in pairs]
        return sum(blocks * a.quotas[source] for a, blocks in spans[:number])


def source_seed(seed: int, name: str) -> int:
    """Seed of a source's own order and corruption: it depends on no other source."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return Random(seed, key, Stream.SOURCE).next64()


class Mixture(Samples):
    """Training samples drawn from several sources.

    Args:
        sources: by name, 1 to 1000, of equal lengths and vocabulary.
        seed: 0 to 2^64 - 1.
        block: samples in which the proportions are exact.
        weights: of the sources by name, for good or ill; None: by size.
        exponent: see `size_weights`.
        cap: see `size_weights`.
        by_tokens: sizes are tokens, of inputs and targets as stored, not samples.

    Attributes:
        segments: the proportions so far. A run that goes on takes its own from the checkpoint by
            `go_on`.

    Raises:
        UserError: if sources do not fit each other or a weight is too small for the block.
    """

    def __init__(
        self,
        sources: Mapping[str, Corpus],
        *,
        seed: int,
        block: int = 1 << 16,
        weights: Mapping[str, float] | None = None,
        exponent: float = 1.0,
        cap: int | None = None,
        by_tokens: bool = False,
    ) -> None:
        # By name, so that the order in which a configuration lists them means nothing.
        self.source_names = tuple(sorted(sources))
        self.sources = [sources[name] for name in self.source_names]
        self._seed, self._block = seed, block
        first = self.sources[0]
        self.encoder_length, self.decoder_length = first.encoder_length, first.decoder_length
        self.packed = first.packed
        self._check_alike()
        sizes = [source.samples_per_epoch for source in self.sources]
        self.samples_per_epoch = sum(sizes)
        if weights is None:
            sizes = [source.num_tokens for source in self.sources] if by_tokens else sizes
            shares = size_weights(sizes, exponent=exponent, cap=cap)
        else:
            shares = [Decimal(str(weights[name])) for name in self.source_names]
        self._set_segments([Segment(0, self._check_quotas(shares))])
        identity = {name: source.fingerprint for name, source in sources.items()}
        digest = hashlib.sha256(json.dumps([seed, block, identity], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def go_on(self, stored: Sequence[Segment], samples: int) -> None:
        """Go on where a run stands, with this mixture's proportions from there on.

        Args:
            stored: the proportions until now.
            samples: consumed until now.

        Raises:
            UserError: if `stored` does not fit these sources.
        """
        new = self.segments[-1].quotas
        kept = [segment for segment in stored if segment.start < samples]
        if not kept or kept[-1].quotas != new:
            kept.append(Segment(samples if kept else 0, new))
        try:
            self._set_segments(kept)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"the proportions in the checkpoint do not fit the {len(self.sources)} sources of "
                f"data.train ({error}); use another checkpoint"
            ) from error

    def source_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Which of `source_names` each sample [B] comes from, [B] int64."""
        return torch.from_numpy(self._order.locate(indices.numpy())[0])

    def counters(self, samples: int) -> dict[str, float]:
        """`samples/name` seen of each source among the first so many, and `epochs/name`.

        The cost is that of going through a block once, whatever the number of samples.
        """
        metrics: dict[str, float] = {}
        seen = self._order.seen(samples)
        for name, source, count in zip(self.source_names, self.sources, seen, strict=True):
            metrics[f"samples/{name}"] = count
            metrics[f"epochs/{name}"] = count / source.samples_per_epoch
        return metrics

    def _set_segments(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._order = native.MixtureOrder(
            self._seed, self._block, [(s.start, list(s.quotas)) for s in segments]
        )
        self.sampler = native.MixtureSampler([s.sampler for s in self.sources], self._order)

    def _check_alike(self) -> None:
        for key, what in (
            ("tokenizer_sha256", "tokenizer"),
            ("sentinel_top", "first sentinel"),
            ("encoder_length", "encoder length"),
            ("decoder_length", "decoder length"),
        ):
            names: dict[object, str] = {}
            for name, source in zip(self.source_names, self.sources, strict=True):
                if (value := getattr(source, key)) is not None:
                    names.setdefault(value, name)
            if len(names) > 1:
                (one, first), (two, second), *_ = names.items()
                raise UserError(
                    f"the sources '{first}' and '{second}' cannot be mixed: their {what} differs "
                    f"({one} and {two}). Preprocess all sources with one tokenizer, and give all "
                    "the same lengths."
                )

    def _check_quotas(self, shares: Sequence[Decimal]) -> tuple[int, ...]:
        found = quotas(shares, self._block)
        for name, share, quota in zip(self.source_names, shares, found, strict=True):
            if share and not quota:
                raise UserError(
                    f"source '{name}' has a share of {share / sum(shares):.2g}, less than one "
                    f"sample in a block of {self._block}, and would never be read. Raise its "
                    "weight (a lower exponent does so for small sources) or data.mixture.block, "
                    "or set its weight to 0."
                )
        return found
