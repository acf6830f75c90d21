"""Memory of one layout, put together from profiles of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megaswitch.model.stages import Stage
from megaswitch.scale.layout import Layout
from megaswitch.scale.profile import Profile
from megaswitch.scale.sizes import Held, Sized

_BUCKET = 32 << 20  # as in `parallel.gradients`, two of which are under way
_SPARE = 0.06  # of a GPU's memory: what the allocator cannot use, CUDA's context, NCCL


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at its peak. `buffers`: gathered weights, sums, pipeline."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    spare: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


class Holdings(Layout):
    """What each rank of a layout holds."""

    def memory(self, rank: int, profile: Profile, busiest: Mapping[str, float]) -> Memory:
        """Of a pipeline rank.

        Args:
            rank: its place in the pipeline.
            profile: of the blocks.
            busiest: by stack, rows of the busiest expert-parallel rank by an even share.
        """
        own, held = self.own(rank), self.held(rank)
        zero = self.config.parallel.zero
        gathered = 0.0
        if zero != "none":
            gathered = self.word * self.total(self._gathered, held)
            if zero == "full":
                ahead = 2 + self.config.parallel.prefetch
                gathered = min(gathered, ahead * self._largest_block(held))
        largest = max(self.sliced(p) for group in held.groups for p in group)
        kept, block = self._kept(own, held, profile)
        kept += self._unevenly_kept(held, busiest)
        # The first stages wait longest for the gradients of what they computed.
        waiting = min(self.micro, self._waiting(rank)) if self.pp > 1 else 1
        ends = profile.work * self.rows if any(s.last for s in own) else 0.0
        work = max(6.0 * largest, ends, block)
        buffers = gathered + self._pipeline_buffers(rank)
        if zero == "none" and self.dp > 1:
            sums = 4.0 * self.total(self.sliced, held)
            buckets = 2 * max(_BUCKET, 4.0 * largest)
            work = max(work, min(sums, buckets))
        return replace(self.least(rank), activations=kept * waiting + work, buffers=buffers)

    def least(self, rank: int) -> Memory:
        """Of a pipeline rank, without what depends on its blocks' profiles."""
        held = self.held(rank)
        return Memory(
            weights=4.0 * self.total(self.sharded, held),
            gradients=4.0
            * self.total(self.sliced if self._whole_gradients else self.sharded, held),
            optimizer=self.total(self.states, held),
            activations=0.0,
            buffers=0.0,
            spare=_SPARE * self.hardware.memory,
        )

    @property
    def _whole_gradients(self) -> bool:
        zero = self.config.parallel.zero
        return zero == "none" or (self.pp > 1 and self.micro > 1)

    def _waiting(self, rank: int) -> float:
        """Micro-batches under way on a pipeline rank, in units of all its stages."""
        parallel = self.config.parallel
        stages = parallel.stages_per_rank
        if parallel.schedule == "gpipe":
            return self.micro
        if stages == 1:
            return self.pp - rank
        return ((stages - 1) * self.pp + 2 * (self.pp - 1 - rank) + 1) / stages

    def _pipeline_buffers(self, rank: int) -> float:
        """What torch keeps to receive each micro-batch of a step."""
        if self.pp == 1:
            return 0.0
        tokens: float = self.rows * sum(self.lengths)
        if self.config.parallel.sequence_parallel:
            tokens /= self.tp
        carry = 4.0 * tokens * self.config.model.d_model * self.micro
        return carry * sum(2 - s.first - s.last for s in self.own(rank))

    def _gathered(self, p: Sized) -> float:
        """Numbers that ZeRO puts together from all ranks."""
        return self.sliced(p) if self.shards_of(p) > 1 else 0.0

    def _kept(self, own: Sequence[Stage], held: Held, profile: Profile) -> tuple[float, float]:
        """Bytes that a micro-batch leaves for its backward pass; what a block's takes."""
        casts = 2.0 if self.bf16 and self.config.parallel.zero == "none" else 0.0
        last = any(s.last for s in own)
        costs = [profile.blocks[a.kind] for a in held.blocks]
        each = [cost.kept * self.rows for cost in costs]
        transient = [cost.transient * self.rows for cost in costs]
        whole = [
            kept + casts * self._sum(self.sliced, a.parameters)
            for kept, a in zip(each, held.blocks, strict=True)
        ]
        ends = profile.ends.kept * self.rows if last else 0.0
        if last and casts:
            names = {p.name: p for p in held.ends}
            heads = (names[n] for n in ("head.weight", "embedding.weight") if n in names)
            ends += casts * next(map(self.sliced, heads), 0.0)
        width = 4.0 * self.rows * self.config.model.d_model
        if self.config.parallel.sequence_parallel:
            width /= self.tp
        if own[0].first and not last:
            ends += width * sum(self.lengths)  # what was looked up travels on
        if self.config.train.activation_checkpointing is not True:
            # Where the head is, its work is the most, and done before any block's.
            kept = sum(a.number * size for a, size in zip(held.blocks, whole, strict=True))
            return kept + ends, 0.0 if own[-1].last else max(transient)
        # Inputs are kept; while a block is made again, its output's gradient waits.
        streams = [width * self.length_of[a.kind[0]] for a in held.blocks]
        inputs = sum(a.number * size for a, size in zip(held.blocks, streams, strict=True))
        return inputs + ends, max(map(sum, zip(whole, transient, streams, strict=True)))

    def _unevenly_kept(self, held: Held, busiest: Mapping[str, float]) -> float:
        """Bytes of a micro-batch that the busiest rank's experts keep beyond an even share.

        With a capacity buffers are as large whoever fills them.
        """
        model = self.config.model
        if model.moe.capacity_mode != "dropless" or self.ep == 1:
            return 0.0
        gated = model.activation.startswith("gated")
        width = 2 * model.d_model + (3 if gated else 1) * model.d_ff / self.tp
        return self.rows_beyond(held, busiest) * width * self.word

    def _largest_block(self, held: Held) -> float:
        """Bytes of what is gathered together."""
        blocks = [self._sum(self.sliced, a.parameters) for a in held.blocks]
        return self.word * max(*blocks, *map(self.sliced, held.ends), 0.0)
