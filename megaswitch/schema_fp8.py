"""Keys of `train.fp8`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megaswitch.schema_keys import STRICT, only_if

_SCALED = ("delayed", "current", "block", "mxfp8")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FP8Config:
    """8-bit floats in the products of linear maps: dense ones and experts', never routers or heads.

    Inputs and weights are rounded to e4m3, gradients of outputs to e5m2 (block and mxfp8: e4m3).
    """

    recipe: Literal["none", "delayed", "current", "block", "mxfp8"] = Field(
        default="none",
        description="scales: delayed, from the magnitudes of earlier steps; current, of the tensor "
        "itself; block, of 1×128 and 128×128 numbers; mxfp8, of 1×32",
    )
    amax_history: int = Field(
        default=1024,
        ge=2,
        description="entries of the history that scales are taken from; one a step, te's one a "
        "micro-batch",
        json_schema_extra=only_if("train.fp8.recipe", "delayed"),
    )
    margin: int = Field(
        default=0,
        ge=0,
        description="powers of two kept free above the largest magnitude",
        json_schema_extra=only_if("train.fp8.recipe", "delayed"),
    )
    keep: list[str] | None = Field(
        default=None,
        description="patterns of maps that stay in train.precision, such as encoder.layers.0.*",
        json_schema_extra=only_if("train.fp8.recipe", *_SCALED),
    )
