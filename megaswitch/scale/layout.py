"""A configuration on a machine: the sizes that memory and time both depend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from megaswitch.config import RunConfig
from megaswitch.model.stages import Stage, plan_stages
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.sizes import Held, Sized, balanced, held_by, parameters, sums_of
from megaswitch.scale.updates import is_factored


class Layout:
    """Of a configuration that fits `world` ranks.

    Args:
        config: of the run.
        world: ranks.
        lengths: of encoder and decoder rows.
        hardware: of each rank.
    """

    def __init__(
        self, config: RunConfig, world: int, lengths: tuple[int, int], hardware: Hardware
    ) -> None:
        parallel = config.parallel
        self.config, self.lengths, self.hardware = config, lengths, hardware
        self.world = world
        self.pp, self.ep, self.tp = parallel.pp, parallel.ep, parallel.tp
        self.dp = world // (self.pp * self.tp)
        self.edp = self.dp // self.ep
        self.shards = self.edp // parallel.replicas if parallel.zero != "none" else 1
        self.rows = config.train.micro_batch_size
        self.micro = config.train.batch_size // (self.dp * self.rows)
        number = self.pp * parallel.stages_per_rank
        counts = parallel.layers_per_stage or balanced(config.model, number, lengths)
        self.stages = plan_stages(counts if self.pp > 1 else [sum(counts)])
        self.bf16 = config.train.precision == "bf16"
        self.length_of = dict(zip(("encoder", "decoder"), lengths, strict=True))
        self.word = 2 if self.bf16 else 4
        zero = parallel.zero != "none"
        cuts = self.ep, self.tp, self.shards, zero
        self._sums = sums_of(config.model, cuts, config.optim, hardware.device)

    def own(self, rank: int) -> tuple[Stage, ...]:
        """Stages of a pipeline rank."""
        return tuple(s for s in self.stages if s.index % self.pp == rank)

    def held(self, rank: int) -> Held:
        """Parameters of a pipeline rank, each once."""
        return held_by(self.config.model, self.own(rank))

    def total(self, size: Callable[[Sized], float], held: Held) -> float:
        """Of all parameters, each with its `size`, a method of this class."""
        blocks = (a.number * self._sum(size, a.parameters) for a in held.blocks)
        return sum(blocks) + self._sum(size, held.ends)

    def _sum(self, size: Callable[[Sized], float], parameters: tuple[Sized, ...]) -> float:
        """Remembered, as ranks and layouts share sorts of blocks, which `sizes` keeps alive."""
        key = size.__name__, id(parameters)
        if key not in self._sums:
            self._sums[key] = sum(map(size, parameters))
        known: float = self._sums[key]
        return known

    def sliced(self, p: Sized) -> float:
        """Numbers of a rank's slice over ep and tp."""
        slices = (self.ep if p.spec.is_expert else 1) * (self.tp if "tp" in p.spec.axes else 1)
        return math.prod(p.shape) / slices

    def sharded(self, p: Sized) -> float:
        """Numbers that a rank keeps between steps."""
        return self.sliced(p) / self.shards_of(p)

    def shards_of(self, p: Sized) -> int:
        """Parts that ZeRO cuts a slice into; see `parts._shard`."""
        if self.config.parallel.zero == "none" or len(p.shape) == 1 or p.spec.is_bias:
            return 1
        return self.shards if p.spec.is_expert else self.shards * self.ep

    def states(self, p: Sized, *, whole: bool = False) -> float:
        """Bytes of the optimizer's states: a rank's, or those of the whole parameter."""
        optim = self.config.optim
        local = math.prod(p.shape) if whole else self.sliced(p) / self.shards_of(p)
        if optim.name == "adamw":
            return 8.0 * local
        if is_factored(p, self.config):
            sizes = list(p.shape) if whole else self._local_shape(p)
            return 4.0 * math.prod(sizes[:-2]) * (sizes[-2] + sizes[-1])
        return 4.0 * local

    def rows_beyond(self, held: Held, busiest: Mapping[str, float]) -> float:
        """Tokens of a micro-batch that the busiest rank's experts get beyond an even share.

        Args:
            held: blocks.
            busiest: by stack, rows of the busiest expert-parallel rank by an even share.
        """
        return sum(
            a.number * (busiest.get(stack, 1.0) - 1.0) * self.rows * self.length_of[stack]
            for a in held.blocks
            for stack, sparse in [a.kind]
            if sparse
        )

    def can_shard(self) -> bool:
        """Whether ZeRO can cut all parameters; see `parallel.distribute`."""
        every = parameters(self.config.model)
        return not self._sum(self._uneven, every)

    def _uneven(self, p: Sized) -> float:
        """1 if the parameter is sliced already and cannot be cut, which takes an even dimension."""
        sliced = self.sliced(p) < math.prod(p.shape)
        return float(sliced and self.shards_of(p) > 1 and not self._even(p))

    def _pieces(self, p: Sized) -> list[int]:
        ranks = {"ep": self.ep, "tp": self.tp, None: 1}
        return [ranks[axis] for axis in p.spec.axes]

    def _even(self, p: Sized) -> list[int]:
        """Dimensions that ZeRO can cut evenly after slicing."""
        pieces, shards = self._pieces(p), self.shards_of(p)
        return [d for d, size in enumerate(p.shape) if size % (pieces[d] * shards) == 0]

    def _local_shape(self, p: Sized) -> list[float]:
        """Of a rank's block; ZeRO cuts the first dimension that divides evenly."""
        pieces, even = self._pieces(p), self._even(p)
        pieces[even[0] if even else 0] *= self.shards_of(p)
        return [size / n for size, n in zip(p.shape, pieces, strict=True)]
