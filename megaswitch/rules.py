"""Rules between configuration keys. Each problem states the value, the rule and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megaswitch.rules_distill import check_distill
from megaswitch.rules_moe import check_moe
from megaswitch.rules_parallel import check_parallel, data_parallel_ranks

if TYPE_CHECKING:
    from megaswitch.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
    from megaswitch.schema_data import MixtureConfig


def check(config: RunConfig, world_size: int = 1) -> list[str]:
    """Problems between keys, each with value, rule and remedy. Needs no process group."""
    return [
        *check_model(config.model),
        *check_moe(config),
        *check_parallel(config, world_size),
        *_check_batch(config, world_size),
        *check_groups(config),
        *_check_data(config.data),
        *_check_tuning(config),
        *_check_kernels(config),
        *_check_rest(config),
        *check_distill(config),
    ]


def check_model(model: ModelConfig) -> Iterator[str]:
    """Problems of a model by itself."""
    if model.relative_buckets % 4:
        yield (
            f"model.relative_buckets={model.relative_buckets} must be a multiple of 4 "
            "(two directions, exact and logarithmic halves); use 32"
        )
    if model.relative_max_distance <= model.relative_buckets // 2:
        yield (
            f"model.relative_max_distance={model.relative_max_distance} must be greater than the "
            f"{model.relative_buckets // 2} distances with a bucket of their own (half of "
            "model.relative_buckets); use 128"
        )
    for stack in ("encoder", "decoder"):
        step = getattr(model.moe, f"{stack}_sparse_step")
        layers = model.num_layers(stack)
        if model.moe.num_experts and step > layers:
            yield (
                f"model.moe.{stack}_sparse_step={step} must not exceed model.num_{stack}_layers="
                f"{layers}, or no layer is sparse; use 1 … {layers}, or 0 for a dense {stack}"
            )
    if model.moe.num_experts and not (
        model.moe.encoder_sparse_step or model.moe.decoder_sparse_step
    ):
        yield (
            f"model.moe.num_experts={model.moe.num_experts} but both sparse steps are 0; "
            "give one, or set num_experts=0 for a dense model"
        )


def _check_batch(config: RunConfig, world_size: int) -> Iterator[str]:
    train, ranks = config.train, data_parallel_ranks(config.parallel, world_size)
    if ranks is None:
        return  # the layout itself is refused, so nobody knows who shares the batch
    share = train.micro_batch_size * ranks
    if train.batch_size % share:
        yield (
            f"train.batch_size={train.batch_size} must be a multiple of train.micro_batch_size × "
            f"data-parallel ranks = {train.micro_batch_size} × {ranks} = {share}; "
            f"use {max(1, round(train.batch_size / share)) * share}"
        )
    if train.rampup_batch_size is not None:
        yield from _check_rampup(train, share)


def check_groups(config: RunConfig) -> Iterator[str]:
    """Problems of routing groups: whole rows make a group, whole groups a micro-batch."""
    train, moe = config.train, config.model.moe
    if not moe.num_experts or moe.capacity_mode == "hf":
        return
    length = config.data.encoder_length
    if moe.group_size % length:
        yield (
            f"model.moe.group_size={moe.group_size} must be a multiple of data.encoder_length="
            f"{length}, so that a routing group holds whole rows; "
            f"use {max(1, round(moe.group_size / length)) * length}"
        )
    elif train.micro_batch_size % (rows := moe.group_size // length):
        yield (
            f"train.micro_batch_size={train.micro_batch_size} must be a multiple of the {rows} "
            f"rows of a routing group (model.moe.group_size={moe.group_size} / "
            f"data.encoder_length={length}); use {max(1, train.micro_batch_size // rows) * rows} "
            f"or a smaller group_size"
        )


def _check_data(data: DataConfig) -> Iterator[str]:
    for key, sources in (("train", data.train), ("valid", data.valid)):
        if not isinstance(sources, dict):
            continue
        if not 1 <= len(sources) <= 1000:
            yield f"data.{key} names {len(sources)} sources; it must name 1 … 1000"
        for name in sources:
            if not re.fullmatch(r"[\w-]{1,64}", name):
                yield (
                    f"data.{key} has a source named {name!r}; a name must be 1 … 64 letters, "
                    "digits, _ and -, as metrics carry it"
                )
    if isinstance(data.train, dict) and data.mixture.weights is not None:
        yield from _check_weights(data.train, data.mixture, data.mixture.weights)
    if data.loader_threads > data.prefetch_batches:
        yield (
            f"data.loader_threads={data.loader_threads} must not exceed data.prefetch_batches="
            f"{data.prefetch_batches}, as each thread makes one batch at a time; use "
            f"loader_threads={data.prefetch_batches}, or prefetch more"
        )
    if data.objective == "text-to-text" and data.decoder_length is None:
        yield (
            "data.decoder_length is not set, and data.objective='text-to-text' needs it, as "
            "targets have no natural length; set it, e.g. to 114"
        )
    if data.objective == "prefix-lm" and data.packing:
        yield (
            "data.packing=True does not go with data.objective='prefix-lm': where a document is "
            "split is drawn anew each epoch, so no two are sure to fit into a row; set it to false"
        )


def _check_tuning(config: RunConfig) -> Iterator[str]:
    data, optim = config.data, config.optim
    sources = {
        name: where
        for part in (data.train, data.valid)
        if isinstance(part, dict)
        for name, where in part.items()
    }
    for name in (data.tasks or {}).keys() - sources.keys():
        yield (
            f"data.tasks names {name!r}, which is no source; give its files as data.train.{name} "
            f"or data.valid.{name}"
        )
    if data.tasks and data.tokenizer is None:
        yield (
            "data.tokenizer is not set, and data.tasks are texts that it must read; give the "
            "SentencePiece model of the pre-training"
        )
    if data.tasks and data.valid and config.train.valid_metrics and config.parallel.pp > 1:
        yield (
            f"train.valid_metrics=True needs all layers on each rank, and parallel.pp="
            f"{config.parallel.pp} spreads them; use train.valid_metrics=false (losses alone) and "
            "score checkpoints with `megaswitch evaluate RUN --task`, or pp=1"
        )
    for key in ("train_only", "freeze"):
        if getattr(optim, key) == []:
            yield f"optim.{key}=[] matches no parameter; leave it unset, or give patterns"
    if config.model.lora.rank and not config.model.lora.targets:
        yield "model.lora.targets=[] adapts nothing; give patterns, or model.lora.rank=0"


def _check_kernels(config: RunConfig) -> Iterator[str]:
    fp8 = config.train.fp8
    if fp8.keep == []:
        yield "train.fp8.keep=[] keeps no map in train.precision; leave it unset, or give patterns"
    moe = config.model.moe
    if fp8.recipe != "none" and moe.num_experts and moe.router_precision == "fp32":
        yield (
            f"train.fp8.recipe={fp8.recipe!r} rounds experts that model.moe.router_precision="
            "'fp32' wants in fp32; use router_precision='selective', or recipe='none'"
        )
    if config.train.loss_tokens and config.distill.teacher is not None:
        yield (
            f"train.loss_tokens={config.train.loss_tokens} keeps no logits to compare with those "
            "of distill.teacher; leave it unset"
        )
    if config.train.backend == "te" and config.train.activation_checkpointing == "selective":
        yield (
            "train.activation_checkpointing='selective' keeps products that torch sees, and "
            "train.backend='te' hides its own; use true, or backend='torch'"
        )
    if config.train.backend == "te" and config.parallel.schedule == "zero-bubble":
        yield (
            "train.backend='te' computes weight gradients at once, and parallel.schedule="
            "'zero-bubble' puts them off; use schedule='1f1b', or backend='torch'"
        )


def _check_weights(
    sources: dict[str, str], mixture: MixtureConfig, weights: dict[str, float]
) -> Iterator[str]:
    for names, what in (
        (sources.keys() - weights.keys(), "lacks"),
        (weights.keys() - sources.keys(), "names"),
    ):
        if names:
            yield (
                f"data.mixture.weights {what} {', '.join(map(repr, sorted(names)))}; it must have "
                "the names of data.train, no more and no less (0 leaves a source out)"
            )
    wrong = [f"{name}={weight}" for name, weight in weights.items() if weight < 0]
    if wrong or not any(weights.values()):
        yield (
            f"data.mixture.weights has {', '.join(wrong) or 'only zeros'}; weights must not be "
            "negative, and one must be positive"
        )
    for key in ("size", "exponent", "cap"):
        if (value := getattr(mixture, key)) is not None:
            yield (
                f"data.mixture.{key}={value} would be ignored because data.mixture.weights gives "
                "the shares; remove one of the two"
            )


def _check_rampup(train: TrainConfig, share: int) -> Iterator[str]:
    start, increment = train.rampup_batch_size, train.rampup_increment
    assert start is not None
    if increment is None or train.rampup_samples is None:
        yield (
            f"train.rampup_batch_size={start} needs train.rampup_increment and "
            "train.rampup_samples too"
        )
    elif start % share or increment % share or (train.batch_size - start) % increment:
        yield (
            f"train.rampup_batch_size={start} must be a multiple of {share} (micro batch × "
            f"data-parallel ranks) and reach train.batch_size={train.batch_size} in steps of "
            f"train.rampup_increment={increment}, itself a multiple of {share}"
        )
    elif start > train.batch_size:
        yield (
            f"train.rampup_batch_size={start} must not exceed train.batch_size="
            f"{train.batch_size}; the batch only grows"
        )


def _check_rest(config: RunConfig) -> Iterator[str]:
    optim, train = config.optim, config.train
    peak = optim.learning_rate
    if optim.schedule == "rsqrt":
        peak /= max(optim.warmup_steps, 1) ** 0.5
    limit, usual = (1.0, "1e-3 … 1e-2") if optim.name == "adafactor" else (0.1, "1e-4 … 1e-3")
    if peak >= limit:
        yield (
            f"optim.learning_rate={optim.learning_rate} with optim.schedule={optim.schedule!r} "
            f"reaches {peak:g}; {optim.name} needs less than {limit:g}, {usual} is common"
        )
    if optim.schedule == "wsd" and optim.decay_steps is None:
        yield "optim.schedule='wsd' needs optim.decay_steps; a tenth of train.steps is common"
    if optim.schedule in ("linear", "cosine", "wsd"):
        used = optim.warmup_steps + (optim.decay_steps or 0)
        if used > train.steps:
            yield (
                f"optim.warmup_steps={optim.warmup_steps} (and decay) must fit in train.steps="
                f"{train.steps} with optim.schedule={optim.schedule!r}; use fewer"
            )
    if optim.min_learning_rate > optim.learning_rate:
        yield (
            f"optim.min_learning_rate={optim.min_learning_rate} must not exceed "
            f"optim.learning_rate={optim.learning_rate}"
        )
