"""A configuration on a machine: the sizes that memory and time both depend on."""

from __future__ import annotations

import math

from megaswitch.config import RunConfig
from megaswitch.model.stages import plan_stages
from megaswitch.scale.hardware import Hardware
from megaswitch.scale.sizes import Sized, balanced, of_stage


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
        self.word = 2 if self.bf16 else 4

    def held(self, rank: int) -> list[Sized]:
        """Parameters of a pipeline rank, each once."""
        own = [s for s in self.stages if s.index % self.pp == rank]
        return list({p.name: p for s in own for p in of_stage(self.config.model, s)}.values())

    def kind(self, block: int) -> tuple[str, bool]:
        """Stack of a block, and whether it is sparse."""
        model = self.config.model
        encoder = block < model.num_encoder_layers
        index = block if encoder else block - model.num_encoder_layers
        stack = "encoder" if encoder else "decoder"
        return stack, model.is_sparse(stack, index)  # type: ignore[arg-type]

    def sliced(self, p: Sized) -> float:
        """Numbers of a rank's slice over ep and tp."""
        slices = (self.ep if p.spec.is_expert else 1) * (self.tp if "tp" in p.spec.axes else 1)
        return math.prod(p.shape) / slices

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
        matrix = p.shape[1:] if p.spec.is_expert else p.shape
        if len(matrix) == 2 and min(matrix) >= optim.factored_min_dim:
            sizes = list(p.shape) if whole else self._local_shape(p)
            return 4.0 * math.prod(sizes[:-2]) * (sizes[-2] + sizes[-1])
        return 4.0 * local

    def _local_shape(self, p: Sized) -> list[float]:
        """Of a rank's block; ZeRO cuts the first dimension that divides evenly."""
        ranks = {"ep": self.ep, "tp": self.tp, None: 1}
        pieces = [ranks[axis] for axis in p.spec.axes]
        shards = self.shards_of(p)
        even = [d for d, size in enumerate(p.shape) if size % (pieces[d] * shards) == 0]
        pieces[even[0] if even else 0] *= shards
        return [size / n for size, n in zip(p.shape, pieces, strict=True)]
