"""The keys of `distill`."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from megaswitch.schema_keys import STRICT, only_if

_ON = only_if("distill.teacher")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig:
    """What a student learns from a teacher (paper §4.2)."""

    teacher: str | None = Field(
        default=None, description="checkpoint or run folder of the teacher; unset: none"
    )
    logits: str | None = Field(
        default=None,
        description="folder of the teacher's probabilities, written by `distill --cache`; unset: "
        "the teacher runs along",
        json_schema_extra=_ON,
    )
    soft_weight: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="f in (1 - f)·hard + f·T²·soft loss; the paper's is 0.25",
        json_schema_extra=_ON,
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="T, which divides both models' logits in the soft loss",
        json_schema_extra=_ON,
    )
    start_step: int = Field(
        default=0,
        ge=0,
        description="steps of hard loss alone before the teacher is heard",
        json_schema_extra=_ON,
    )
    copy_weights: bool = Field(
        default=True,
        description="start with the teacher's weights, but for experts, wherever names and shapes "
        "agree",
        json_schema_extra=_ON,
    )
    top_k: int = Field(
        default=64,
        gt=0,
        description="probabilities kept per target; the others count as one outcome",
        json_schema_extra=only_if("distill.logits"),
    )
