"""Configuration keys of `fault`: what a run does when something goes wrong."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megaswitch.schema_keys import STRICT, only_if


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FaultConfig:
    """Bad steps, ranks that disagree or lag, and how long a run may take to stop.

    A step is bad if its loss or gradient is not finite, or if its loss is a spike that counts as
    one. Bad steps never change the weights.
    """

    skip: int = Field(
        default=0, ge=0, description="bad steps in a row that are left out; after them the run "
        "goes back, or ends"
    )  # fmt: skip
    rewinds: int = Field(
        default=0, ge=0, description="times that a run may go back to its newest checkpoint; past "
        "the data since then if steps were bad, over the same data if replicas differed"
    )  # fmt: skip
    spike: float | None = Field(
        default=None, gt=0, description="a loss so many deviations (robust ones) above the median "
        "of recent steps is a spike; unset: not looked for"
    )  # fmt: skip
    spike_window: int = Field(
        default=64, ge=8, le=4096, description="recent steps that a loss is compared with",
        json_schema_extra=only_if("fault.spike"),
    )  # fmt: skip
    spike_action: Literal["report", "bad"] = Field(
        default="report", description="what a spike is: an event to report, or a bad step",
        json_schema_extra=only_if("fault.spike"),
    )  # fmt: skip
    replica_interval: int | None = Field(
        default=None, gt=0, description="steps between comparisons of the weights that several "
        "ranks hold, also made before every checkpoint; unset: never"
    )  # fmt: skip
    stop_seconds: int | None = Field(
        default=None, gt=0, description="seconds from SIGTERM, SIGINT or SIGUSR1 until the run has "
        "saved and ended; if it has not by then it ends without; unset: no limit"
    )  # fmt: skip
