"""The keys of `data`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megaswitch.schema_keys import STRICT, only_if, only_if_table

_MIXTURE = only_if_table("data.train")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureConfig:
    """How the sources of a `data.train` that names several are mixed."""

    weights: dict[str, float] | None = Field(
        default=None,
        description="shares of the sources by name; unset: by size",
        json_schema_extra=_MIXTURE,
    )
    size: Literal["samples", "tokens"] | None = Field(
        default=None,
        description="what a source's size is counted in; tokens: the paper's fine-tuning; unset: "
        "samples",
        json_schema_extra=_MIXTURE,
    )
    exponent: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="shares are min(size, cap)^exponent: 0.3 is mT5's, 1/T a temperature T; "
        "unset: 1",
        json_schema_extra=_MIXTURE,
    )
    cap: int | None = Field(
        default=None,
        gt=0,
        description="samples beyond which a source counts as no larger; unset: no limit",
        json_schema_extra=_MIXTURE,
    )
    block: int = Field(
        default=1 << 16,
        gt=0,
        le=1 << 24,
        description="consecutive samples in which the shares are exact",
        json_schema_extra=_MIXTURE,
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is read. Paths are prefixes of a `.bin`/`.idx` pair."""

    train: str | dict[str, str] | None = Field(
        default=None, description="training tokens; a table names several sources to mix"
    )
    valid: str | dict[str, str] | None = Field(
        default=None, description="held-out tokens; a table names several"
    )
    tasks: dict[str, str] | None = Field(
        default=None,
        description="sources that are task files (JSON lines, TSV, CSV), each with its task: a "
        "name of `megaswitch finetune --tasks`, or a TOML file",
        json_schema_extra=only_if("data.objective", "text-to-text"),
    )
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    tokenizer: str | None = Field(
        default=None, description="SentencePiece model; checkpoints take it along"
    )
    encoder_length: int = Field(default=512, ge=8, description="tokens per encoder row")
    decoder_length: int | None = Field(
        default=None, gt=0, description="tokens per decoder row; unset: as many as needed"
    )
    objective: Literal["span-corruption", "prefix-lm", "text-to-text"] = Field(
        default="span-corruption",
        description="span-corruption: T5's; prefix-lm: documents split in two; text-to-text: the "
        "pairs PREFIX_inputs and PREFIX_targets",
    )
    packing: bool = Field(
        default=False,
        description="several documents to a row, which do not see each other; span-corruption "
        "without it cuts the corpus into rows with no regard to documents",
    )
    noise_density: float = Field(
        default=0.15, gt=0, lt=1, description="share of tokens masked",
        json_schema_extra=only_if("data.objective", "span-corruption"),
    )  # fmt: skip
    mean_span_length: float = Field(
        default=3.0, ge=1, description="mean tokens per masked span",
        json_schema_extra=only_if("data.objective", "span-corruption"),
    )  # fmt: skip
    random_roll: bool = Field(
        default=False,
        description="rotate the mask, so that every position is masked equally often",
        json_schema_extra=only_if("data.objective", "span-corruption"),
    )
    access: Literal["mmap", "pread"] = Field(
        default="mmap", description="how tokens are read; pread suits parallel file systems"
    )
    loader_threads: int = Field(
        default=2, gt=0, le=256, description="threads of each rank that make batches"
    )
    prefetch_batches: int = Field(
        default=16, gt=0, le=4096, description="micro-batches made ahead on each rank"
    )
