"""Rules of layouts: what may be spread over how many ranks. Needs no process group."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from megaswitch.presets import PRESETS
from megaswitch.rules_distill import teacher_has_experts

if TYPE_CHECKING:
    from megaswitch.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig

# Read by `config.py`: keys that people of other trainers look for, and what to do instead.
REFUSED = {
    "parallel.cp": "context parallelism is not supported; parallel.tp with sequence_parallel, or "
    "a shorter data.encoder_length, saves activations"
}


def check_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    """Problems of the layout `config.parallel` over `world_size` ranks."""
    yield from _check_ranks(config.parallel, world_size)
    yield from _check_tensor(config, world_size)
    yield from check_sequence_parallel(config, "encoder", config.data.encoder_length)
    if config.data.decoder_length is not None:
        yield from check_sequence_parallel(config, "decoder", config.data.decoder_length)
    yield from _check_experts(config, world_size)
    yield from _check_pipeline(config, world_size)
    yield from _check_zero(config.parallel, world_size)


def check_options(config: RunConfig, world_size: int) -> Iterator[str]:
    """Problems of the layout that a trained model is to be loaded in, in words of --ep and --tp.

    Args:
        config: of the model, with `parallel` as the options say.
        world_size: ranks.
    """
    parallel = config.parallel
    for problem in (
        *_check_ranks(parallel, world_size),
        *_check_tensor(config, world_size),
        *_check_experts(config, world_size),
    ):
        # These commands have no pipeline, and cannot give a trained model other sizes.
        text = problem.replace("parallel.pp × ep × tp = 1 × ", "--ep × --tp = ")
        text = re.sub(r"use ep=1, or set num_experts .*", "use --ep=1", text)
        yield re.sub(r"\bparallel\.(ep|tp)\b", r"--\1", text)


def data_parallel_ranks(parallel: ParallelConfig, world_size: int) -> int | None:
    """Ranks that read different samples, or None if the layout does not fit the ranks."""
    if world_size % _layout(parallel):
        return None
    return world_size // (parallel.pp * parallel.tp)


def check_sequence_parallel(config: RunConfig, stack: str, length: int) -> Iterator[str]:
    """Problems of slicing a micro-batch's tokens over tp.

    The decoder's length is often known only when the data are, so this is called then, too.

    Args:
        config: of the run.
        stack: "encoder" or "decoder".
        length: tokens of a row there.
    """
    tp, rows = config.parallel.tp, config.train.micro_batch_size
    if tp == 1 or not config.parallel.sequence_parallel or rows * length % tp == 0:
        return
    step = tp // math.gcd(length, tp)
    yield (
        f"train.micro_batch_size × {stack} length = {rows} × {length} = {rows * length} must be a "
        f"multiple of parallel.tp={tp}, as sequence parallelism slices these tokens; use a "
        f"micro_batch_size that is a multiple of {step}, or parallel.sequence_parallel=false"
    )


def _check_ranks(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    needed = _layout(parallel)
    if world_size % needed:
        yield (
            f"parallel.pp × ep × tp = {parallel.pp} × {parallel.ep} × {parallel.tp} = {needed} "
            f"must divide the number of ranks, {world_size}; start a multiple of {needed} ranks "
            f"with torchrun, or use values whose product is {_either(_divisors(world_size))}"
        )


def _check_tensor(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    sliced = ["num_heads", "d_ff"]
    if parallel.ep > 1:  # each tensor-parallel rank sends its slice of a token to the experts
        sliced.append("d_model")
    common = math.gcd(*(getattr(model, name) for name in sliced))
    if parallel.sequence_parallel:
        lengths = config.data.encoder_length, config.data.decoder_length or 0
        common = math.gcd(common, *(config.train.micro_batch_size * n for n in lengths))
    fitting = [n for n in _divisors(common) if n <= model.vocab_size]
    use = _options(fitting, "tp", parallel, world_size)
    for name in sliced:
        size = getattr(model, name)
        if size % parallel.tp:
            why = " with parallel.ep > 1" if name == "d_model" else ""
            yield (
                f"parallel.tp={parallel.tp} must divide model.{name}={size}"
                f"{_preset(model, name)}{why}; use {use}"
            )
    if parallel.tp > model.vocab_size:
        yield (
            f"parallel.tp={parallel.tp} must not exceed model.vocab_size={model.vocab_size}, whose "
            f"rows it slices; use {use}"
        )


def _check_experts(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, experts = config.parallel, config.model.moe.num_experts
    ep, chunks = parallel.ep, parallel.ep_chunks
    if ep > 1 and not experts and not teacher_has_experts(config):
        yield (
            f"parallel.ep={ep} needs experts to spread, and model.moe.num_experts=0 is a dense "
            f"model; use ep=1, or set num_experts to a multiple of {ep}"
        )
    elif ep > 1 and experts and experts % ep:
        yield (
            f"parallel.ep={ep} must divide model.moe.num_experts={experts}"
            f"{_preset(config.model, 'num_experts')}; "
            f"use {_options(_divisors(experts), 'ep', parallel, world_size)}"
        )
    if chunks > 1 and ep == 1:
        yield (
            f"parallel.ep_chunks={chunks} splits the exchange with the experts of other ranks, and "
            "with parallel.ep=1 there are none; use ep_chunks=1"
        )
    elif chunks > 1 and experts and experts % ep == 0 and (experts // ep) % chunks:
        yield (
            f"parallel.ep_chunks={chunks} must divide the {experts // ep} experts of a rank "
            f"(model.moe.num_experts / parallel.ep = {experts} / {ep}); "
            f"use {_either(_divisors(experts // ep))}"
        )


def _check_pipeline(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    if parallel.pp == 1:
        yield from (
            f"parallel.{key}={value!r} would be ignored because parallel.pp=1 makes no pipeline; "
            "remove it, or raise pp"
            for key, value in _pipeline_keys(parallel)
        )
        return
    blocks = model.num_encoder_layers + model.num_decoder_layers
    stages = parallel.pp * parallel.stages_per_rank
    if stages > blocks:
        yield (
            f"parallel.pp × stages_per_rank = {parallel.pp} × {parallel.stages_per_rank} = "
            f"{stages} stages must not exceed the {blocks} blocks of the model "
            f"(num_encoder_layers={model.num_encoder_layers}, num_decoder_layers="
            f"{model.num_decoder_layers}); use {_fewer_stages(parallel, blocks, world_size)}"
        )
    yield from _check_stages(parallel.layers_per_stage, stages, blocks)
    ranks = data_parallel_ranks(parallel, world_size)
    if ranks is not None:
        yield from _check_micro_batches(parallel, config.train, ranks)


def _pipeline_keys(parallel: ParallelConfig) -> list[tuple[str, object]]:
    """The keys that mean something in a pipeline alone, where they are set."""
    unset = {"schedule": "1f1b", "stages_per_rank": 1, "layers_per_stage": None}
    held = [(key, getattr(parallel, key)) for key in unset]
    return [(key, value) for key, value in held if value != unset[key]]


def _fewer_stages(parallel: ParallelConfig, blocks: int, world_size: int) -> str:
    per_rank = parallel.stages_per_rank
    least = 2 if _pipeline_keys(parallel) else 1  # with pp=1 those would be ignored
    ranks = _options(range(least, blocks // per_rank + 1), "pp", parallel, world_size)
    ways = [f"parallel.pp={ranks}"] if ranks else []
    if per_rank > 1 and parallel.pp <= blocks:
        ways.append(f"parallel.stages_per_rank={_either(range(1, blocks // parallel.pp + 1))}")
    return " or ".join(ways) or "a layout without a pipeline"


def _check_stages(layers: list[int] | None, stages: int, blocks: int) -> Iterator[str]:
    if layers is None or (len(layers) == stages and sum(layers) == blocks and min(layers) >= 1):
        return
    even = [blocks // stages + (place < blocks % stages) for place in range(stages)]
    yield (
        f"parallel.layers_per_stage={layers} must give each of the {stages} stages (parallel.pp × "
        f"stages_per_rank) at least one block, {blocks} in all; leave it unset"
        + (f", or use {even}" if stages <= blocks else "")
    )


def _check_micro_batches(parallel: ParallelConfig, train: TrainConfig, ranks: int) -> Iterator[str]:
    """torch's schedules refuse some numbers of micro-batches; so do we, before anything starts."""
    share, pp, schedule = train.micro_batch_size * ranks, parallel.pp, parallel.schedule
    for size in _batch_sizes(train):
        count, rest = divmod(size, share)
        rounds = max(1, count // pp)
        if rest or schedule == "gpipe":
            continue
        if schedule == "1f1b" and count < pp:
            needs = f"at least parallel.pp={pp}"
        elif schedule != "1f1b" and count % rounds:
            needs = f"equally many in each of {rounds} rounds (of parallel.pp={pp} or more)"
        else:
            continue
        unit = pp * share
        if train.rampup_batch_size is None:
            which, use = f"train.batch_size={size}", f"train.batch_size={-(-size // unit) * unit}"
        else:
            which = f"a batch of {size} (ramp-up from train.rampup_batch_size="
            which += f"{train.rampup_batch_size} by {train.rampup_increment})"
            use = f"multiples of {unit} for batch_size, rampup_batch_size and rampup_increment"
        other = ", or parallel.schedule='gpipe'" if parallel.stages_per_rank == 1 else ""
        yield (
            f"{which} makes {count} micro-batches (of train.micro_batch_size × data-parallel ranks "
            f"= {train.micro_batch_size} × {ranks}) and parallel.schedule={schedule!r} needs "
            f"{needs}; use {use}{other}"
        )
        return


def _check_zero(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    needed = _layout(parallel)
    if parallel.zero == "none" or world_size % needed:
        return
    copies = world_size // needed
    if copies % parallel.replicas:
        yield (
            f"parallel.replicas={parallel.replicas} must divide the {copies} ranks that hold the "
            f"same experts (edp = ranks / (pp × ep × tp) = {world_size} / {needed}); "
            f"use {_either(_divisors(copies))}"
        )


def _layout(parallel: ParallelConfig) -> int:
    return parallel.pp * parallel.ep * parallel.tp


def _batch_sizes(train: TrainConfig) -> Sequence[int]:
    """Every batch size of a run; of a ramp-up that is wrong in itself, the last alone."""
    start, increment = train.rampup_batch_size, train.rampup_increment
    if start is None or increment is None or (train.batch_size - start) % increment:
        return [train.batch_size]
    return range(start, train.batch_size + 1, increment)


def _preset(model: ModelConfig, name: str) -> str:
    """The preset's name in brackets where the value comes from it."""
    table = PRESETS.get(model.preset or "", {})
    table = table.get("moe", {}) if name == "num_experts" else table
    value = model.moe.num_experts if name == "num_experts" else getattr(model, name)
    return f" ({model.preset})" if table.get(name) == value else ""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _options(values: Sequence[int], axis: str, parallel: ParallelConfig, world_size: int) -> str:
    """Those of `values` that leave the layout a divisor of the ranks, if it is one; "" for none."""
    needed = _layout(parallel)
    others = needed // getattr(parallel, axis)
    if world_size % needed:
        return _either(values)
    return _either(value for value in values if world_size % (others * value) == 0)


def _either(values: Iterable[int]) -> str:
    *most, last = [*map(str, values)] or [""]
    return f"{', '.join(most)} or {last}" if most else last
