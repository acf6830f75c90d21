"""What ranks tell each other in a training step: counted, and by formula.

The formulas are those of `megaswitch/parallel/README.md`, which says what a byte of each kind of
collective is. Totals are over all ranks, of fp64 training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megaswitch.config import ModelConfig, RunConfig
from megaswitch.model.count import meta_model
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.shard import spec_of

WORD = 8  # bytes of a number, floating or not
# The first of several axes that have the same ranks names them all.
AXES = ("tp", "ep", "pp", "edp", "dp", "world")
# Newer torch has other names for two of them, and FSDP2 uses those.
ALIASES = {"all_gather_single": "all_gather", "reduce_scatter_single": "reduce_scatter",
           "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
           "all_reduce": "all_reduce", "all_to_all_single": "all_to_all"}  # fmt: skip


class Traffic:
    """Collectives by (operation, axis): how many calls of ranks, and how many bytes."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, operation: str, axis: str, size: float, calls: float = 1) -> None:
        """Count `calls` collectives, of `size` bytes each."""
        if calls:
            assert size * calls == int(size * calls)
            self.calls[operation, axis] += int(calls)
            self.bytes[operation, axis] += int(size * calls)

    def include(self, other: Traffic) -> None:
        """Add up."""
        for (operation, axis), calls in other.calls.items():
            self.calls[operation, axis] += calls
            self.bytes[operation, axis] += other.bytes[operation, axis]

    def named_once(self, sizes: dict[str, int]) -> Traffic:
        """With one name for axes that have the same ranks."""
        result = Traffic()
        inside = {"dp": ("ep", "edp"), "world": ("tp", "ep", "pp", "edp", "dp")}
        for (operation, axis), calls in self.calls.items():
            size = sizes[axis]
            name = next((n for n in inside.get(axis, ()) if sizes[n] == size), axis)
            result.calls[operation, name] += calls
            result.bytes[operation, name] += self.bytes[operation, axis]
        return result

    def table(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Both numbers, to compare."""
        return {key: (calls, self.bytes[key]) for key, calls in sorted(self.calls.items())}


@contextmanager
def counted(mesh: Mesh) -> Iterator[Traffic]:
    """Count what this rank calls: ours and torch's (FSDP2, pipelines) alike."""
    traffic = Traffic()

    def axis(group: Any) -> str:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        groups = ((name, mesh.axis(name).group) for name in AXES)
        return next(n for n, g in groups if g and dist.get_process_group_ranks(g) == ranks)

    def wrapped(operation: str) -> Any:
        original = getattr(dist, operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            size = max(tensor.nbytes for tensor in tensors)
            if operation == "all_to_all_single":
                size = tensors[1].nbytes
            traffic.add(ALIASES[operation], axis(kwargs.get("group")), size)
            return original(*args, **kwargs)

        return mock.patch.object(dist, operation, call)

    make = dist.P2POp.__init__

    def send(self: dist.P2POp, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.op is dist.isend:
            traffic.add("send", axis(self.group), self.tensor.nbytes)

    with ExitStack() as stack:
        for operation in ALIASES:
            if hasattr(dist, operation):
                stack.enter_context(wrapped(operation))
        stack.enter_context(mock.patch.object(dist.P2POp, "__init__", send))
        yield traffic


def expected(config: RunConfig, ranks: int, lengths: tuple[int, int], real: list[int]) -> Traffic:
    """The whole step by formula.

    Args:
        config: of the run; whose pipeline, if any, is its only axis.
        ranks: how many.
        lengths: of encoder and decoder rows.
        real: tokens of the global batch's encoder and decoder rows that are no padding.
    """
    parallel = config.parallel
    total = Traffic()
    total.add("all_reduce", "world", WORD, ranks)  # the gradient norm
    dp = ranks // (parallel.pp * parallel.tp)
    micro = config.train.batch_size // dp // config.train.micro_batch_size
    tokens = [config.train.micro_batch_size * length for length in lengths]
    each = Traffic()  # of a rank and micro-batch
    if parallel.tp > 1:
        tensor_parallel(each, config, tokens)
    if parallel.ep > 1:
        for stack, count in enumerate(switch_layers(config.model)):
            rows = _rows(config, lengths[stack])
            if config.model.moe.capacity_mode == "dropless":  # on average of ranks
                rows = real[stack] / dp / micro
            expert_parallel(each, config, rows, tokens[stack], count)
    for _ in range(ranks * micro):
        total.include(each)
    if parallel.pp > 1:
        pipeline(total, config, tokens, micro)
    gradients(total, config, ranks, micro)
    return total.named_once(sizes_of(config, ranks))


def sizes_of(config: RunConfig, ranks: int) -> dict[str, int]:
    """Of all axes."""
    pp, ep, tp = config.parallel.pp, config.parallel.ep, config.parallel.tp
    dp = ranks // (pp * tp)
    return {"tp": tp, "ep": ep, "pp": pp, "edp": dp // ep, "dp": dp, "world": ranks}


def switch_layers(model: ModelConfig) -> tuple[int, int]:
    """Of encoder and decoder."""
    names = model.switch_layers()
    return sum(n.startswith("enc") for n in names), sum(n.startswith("dec") for n in names)


def _rows(config: RunConfig, length: int) -> float:
    """Rows that a rank sends, filled or not: experts × slots of all groups of a micro-batch."""
    moe = config.model.moe
    rows_per_group = moe.group_size // config.data.encoder_length
    size = rows_per_group * length
    slots = math.floor(size * moe.train_capacity_factor / moe.num_experts)
    groups = config.train.micro_batch_size // rows_per_group
    return moe.num_experts * groups * max(min(size, slots), moe.min_capacity)


def tensor_parallel(each: Traffic, config: RunConfig, tokens: list[int]) -> None:
    """All around matrices but experts of other ranks; the loss; routers."""
    model, parallel = config.model, config.parallel
    whole = [count * model.d_model * WORD for count in tokens]
    switches = switch_layers(model)
    layers = model.num_encoder_layers, model.num_decoder_layers
    for stack, matrices in enumerate((2, 3)):  # pairs of matrices in a block
        pairs = matrices * layers[stack]
        if parallel.ep > 1:
            pairs -= switches[stack]
        if parallel.sequence_parallel:
            # Into a pair and out of it, forward and backward; out of the embedding.
            each.add("all_gather", "tp", whole[stack], 2 * pairs + 1)
            each.add("reduce_scatter", "tp", whole[stack], 2 * pairs + 1)
            _routers(each, config, tokens[stack], switches[stack])
        else:
            each.add("all_reduce", "tp", whole[stack], 2 * pairs + 1)
    for size in whole:  # the encoder's output for all of the decoder; the decoder's for the head
        if parallel.sequence_parallel:
            each.add("all_gather", "tp", size)
            each.add("reduce_scatter", "tp", size)
        else:
            each.add("all_reduce", "tp", size)
    each.add("all_gather", "tp", parallel.tp * 4 * tokens[1] * WORD)


def _routers(each: Traffic, config: RunConfig, tokens: int, layers: int) -> None:
    """Chosen experts, and for metrics gates and entropies; sums over groups for the losses."""
    moe = config.model.moe
    groups = tokens // (moe.group_size * tokens // config.train.micro_batch_size
                        // config.data.encoder_length)  # fmt: skip
    each.add("all_gather", "tp", tokens * WORD, 3 * layers)
    each.add("all_reduce", "tp", groups * (moe.num_experts + 1) * WORD, layers)


def expert_parallel(
    each: Traffic, config: RunConfig, rows: float, tokens: int, layers: int
) -> None:
    """Rows there and back, forward and backward, each rank with its slice of the features."""
    model, parallel = config.model, config.parallel
    tp, chunks = parallel.tp, parallel.ep_chunks
    part = rows * model.d_model // tp * WORD
    each.add("all_to_all", "ep", model.moe.num_experts * WORD, layers)  # how many
    each.add("all_to_all", "ep", part / chunks, 4 * chunks * layers)
    if model.dropout:
        each.add("all_to_all", "ep", rows * WORD / chunks, chunks * layers)
    if tp == 1:
        return
    whole = tokens * model.d_model * WORD
    if parallel.sequence_parallel:
        each.add("all_to_all", "tp", whole // tp, 4 * layers)
    else:
        each.add("all_gather", "tp", whole, 2 * layers)
    for operation in ("all_gather", "reduce_scatter"):
        each.add(operation, "tp", part * tp / chunks, 2 * chunks * layers)


def pipeline(total: Traffic, config: RunConfig, tokens: list[int], micro: int) -> None:
    """Both streams and their gradients between stages; ties."""
    model, parallel = config.model, config.parallel
    counts = parallel.layers_per_stage
    assert counts is not None
    for count in tokens:
        size = count * model.d_model * WORD
        total.add("send", "pp", size, 2 * micro * (len(counts) - 1))
    first = [sum(counts[:i]) for i in range(len(counts))]
    encoder = sum(start < model.num_encoder_layers for start in first)
    decoder = sum(
        start + count > model.num_encoder_layers for start, count in zip(first, counts, strict=True)
    )
    bias = model.relative_buckets * model.num_heads * WORD
    for holders in (encoder, decoder):
        total.add("send", "pp", bias, holders * (holders - 1))
    if model.tie_embeddings:
        total.add("send", "pp", model.vocab_size * model.d_model * WORD, 2)


def gradients(total: Traffic, config: RunConfig, ranks: int, micro: int) -> None:
    """Sums over data-parallel ranks, or FSDP2's gathering and scattering; sums over tp."""
    parallel = config.parallel
    tp, ep = parallel.tp, parallel.ep
    plain: dict[str, float] = defaultdict(float)
    for name, p in meta_model(config.model).named_parameters():
        spec = spec_of(p)
        size = p.numel() * WORD / (tp if "tp" in spec.axes else 1) / (ep if spec.is_expert else 1)
        if "tp" not in spec.axes and parallel.sequence_parallel and tp > 1:
            plain["tp"] += size
        if parallel.zero == "none" or p.ndim == 1 or spec.is_bias:
            plain["edp" if spec.is_expert else "dp"] += size
        elif parallel.zero != "none":
            _sharded(total, config, name, size, ranks * micro)
    sizes = sizes_of(config, ranks)
    for axis, size in plain.items():
        if size and sizes[axis] > 1:
            total.add("all_reduce", axis, size, ranks)


def _sharded(total: Traffic, config: RunConfig, name: str, size: float, times: int) -> None:
    """A matrix is gathered for the forward pass and, if it was freed since, for the backward."""
    again = config.parallel.zero == "full" and ".layers." in name
    gathers = 2 if again else 1
    # Matrices that FSDP2 gathers together are one call: those of a block but for router, experts.
    total.bytes["all_gather", "dp"] += int(size * gathers * times)
    total.bytes["reduce_scatter", "dp"] += int(size * times)
    leads = name.endswith((".self_attention.q.weight", ".router.weight", "experts.wi.weight"))
    if leads or name == "embedding.weight":
        total.calls["all_gather", "dp"] += gathers * times
        total.calls["reduce_scatter", "dp"] += times
