"""Memory of one layout, put together from profiles of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megaswitch.model.stages import Stage
from megaswitch.scale.layout import Layout
from megaswitch.scale.profile import Profile
from megaswitch.scale.sizes import Sized, of_stage

_BUCKET = 32 << 20  # as in `parallel.gradients`, two of which are under way
# Gradients of a block's activations that are there at once, as a share of what it kept.
_BACKWARD = 0.75
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
        own = [s for s in self.stages if s.index % self.pp == rank]
        held = self.held(rank)
        sliced = {p.name: self.sliced(p) for p in held}
        sharded = {p.name: sliced[p.name] / self.shards_of(p) for p in held}
        zero = self.config.parallel.zero
        weights = 4.0 * sum(sharded.values())
        gradients = 4.0 * sum(sliced.values() if self._whole_gradients else sharded.values())
        optimizer = sum(self.states(p) for p in held)
        gathered = 0.0
        if zero != "none":
            parts = [sliced[p.name] * self.word for p in held if self.shards_of(p) > 1]
            by_block = self._largest_block(held, sliced)
            ahead = 2 + self.config.parallel.prefetch
            gathered = sum(parts) if zero == "optimizer" else min(sum(parts), ahead * by_block)
        largest = max(sliced.values())
        kept, block = self._kept(own, profile, sliced)
        kept += self._unevenly_kept(own, busiest)
        # The first stages wait longest for the gradients of what they computed.
        waiting = min(self.micro, self._waiting(rank)) if self.pp > 1 else 1
        ends = profile.work * self.rows if any(s.last for s in own) else 0.0
        work = max(6.0 * largest, ends, block)
        buffers = gathered + self._pipeline_buffers(rank)
        if zero == "none" and self.dp > 1:
            sums = 4.0 * sum(sliced.values())
            buckets = 2 * max(_BUCKET, 4.0 * largest)
            work = max(work, min(sums, buckets))
        spare = _SPARE * self.hardware.memory
        return Memory(weights, gradients, optimizer, kept * waiting + work, buffers, spare)

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
        own = [s for s in self.stages if s.index % self.pp == rank]
        return carry * sum(2 - s.first - s.last for s in own)

    def _kept(
        self, own: list[Stage], profile: Profile, sliced: Mapping[str, float]
    ) -> tuple[float, float]:
        """Bytes that a micro-batch leaves for its backward pass; what a block's takes."""
        casts = self.bf16 and self.config.parallel.zero == "none"
        kinds = [self.kind(b) for s in own for b in s.blocks]
        each = [profile.blocks[kind].kept * self.rows for kind in kinds]
        matrices = {b: 0.0 for s in own for b in s.blocks}
        for p in (p for s in own for p in of_stage(self.config.model, s)):
            if p.block is not None and casts:
                matrices[p.block] += 2.0 * sliced[p.name]
        ends = profile.ends.kept * self.rows if any(s.last for s in own) else 0.0
        if any(s.last for s in own) and casts:
            names_of_head = ("head.weight", "embedding.weight")
            ends += 2.0 * next((sliced[n] for n in names_of_head if n in sliced), 0.0)
        whole = [a + b for a, b in zip(each, matrices.values(), strict=True)]
        if not self.config.train.activation_checkpointing:
            # Where the head is, its work is the most, and done before any block's.
            return sum(whole) + ends, 0.0 if own[-1].last else _BACKWARD * max(each)
        width = 4.0 * self.rows * self.config.model.d_model
        if self.config.parallel.sequence_parallel:
            width /= self.tp
        inputs = [width * self.lengths[kind[0] == "decoder"] for kind in kinds]
        return sum(inputs) + ends, max(whole) + _BACKWARD / 2 * max(each)

    def _unevenly_kept(self, own: list[Stage], busiest: Mapping[str, float]) -> float:
        """Bytes of a micro-batch that the busiest rank's experts keep beyond an even share.

        With a capacity buffers are as large whoever fills them.
        """
        model = self.config.model
        if model.moe.capacity_mode != "dropless" or self.ep == 1:
            return 0.0
        gated = model.activation.startswith("gated")
        width = 2 * model.d_model + (3 if gated else 1) * model.d_ff / self.tp
        lengths = dict(zip(("encoder", "decoder"), self.lengths, strict=True))
        kinds = [self.kind(b) for s in own for b in s.blocks]
        rows = sum(
            (busiest.get(stack, 1.0) - 1.0) * self.rows * lengths[stack]
            for stack, sparse in kinds
            if sparse
        )
        return rows * width * self.word

    def _largest_block(self, held: Iterable[Sized], sliced: Mapping[str, float]) -> float:
        sizes: dict[object, float] = {}
        for p in held:
            key = p.name if p.block is None else p.block
            sizes[key] = sizes.get(key, 0.0) + sliced[p.name] * self.word
        return max(sizes.values())
