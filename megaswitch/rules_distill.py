"""Rules of distillation. Needs no process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaswitch.schema import RunConfig


def check_distill(config: RunConfig) -> Iterator[str]:
    """Problems between `distill` and the rest of the configuration."""
    distill, train = config.distill, config.train
    if distill.teacher is None:
        return
    if distill.start_step >= train.steps:
        yield (
            f"distill.start_step={distill.start_step} must be less than train.steps={train.steps}, "
            "or the teacher is never heard; lower it, or remove distill.teacher"
        )
    if config.train.init_from is not None and distill.copy_weights:
        yield (
            f"train.init_from={config.train.init_from!r} and distill.copy_weights=True both give "
            "the student its first weights; set distill.copy_weights=false, or remove init_from"
        )
    if distill.logits is None and config.parallel.pp > 1:
        yield (
            f"distill.teacher does not run along in a pipeline, and parallel.pp="
            f"{config.parallel.pp}; use pp=1, or keep its probabilities first (set distill.logits, "
            "and run `megaswitch distill --cache` with pp=1)"
        )
    if distill.logits is not None and distill.top_k > config.model.vocab_size:
        yield (
            f"distill.top_k={distill.top_k} must not exceed model.vocab_size="
            f"{config.model.vocab_size}; use fewer"
        )


def teacher_has_experts(config: RunConfig) -> bool:
    """Whether parallel.ep may spread a teacher's experts where the model itself has none."""
    return config.distill.teacher is not None
