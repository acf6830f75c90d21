"""Configurations of fine-tuning: the user's, over the paper's, over those of the pre-training."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaswitch.checkpoint.manager import find_checkpoint, read_config
from megaswitch.config import RunConfig, load_config, to_toml
from megaswitch.data.indexed import companion
from megaswitch.data.tasks import builtin_tasks
from megaswitch.log import UserError

# Paper §4.1 and Table 4, and what the t5 code base adds.
_BATCH_TOKENS = 1 << 20
_PAPER: dict[str, Any] = {
    "model": {"dropout": 0.1},
    "data": {"objective": "text-to-text", "decoder_length": 114},
    "optim": {"name": "adafactor", "schedule": "constant", "learning_rate": 1e-3,
              "warmup_steps": 0},
    "train": {"steps": 16_000, "valid_interval": 200, "valid_samples": 1024},
    "checkpoint": {"keep_best": True},
}  # fmt: skip
_EXPERT_DROPOUT = 0.4
# What a fine-tuning takes over beside the model.
_INHERITED = {
    "data": ("encoder_length",),
    "train": ("micro_batch_size", "precision", "device", "activation_checkpointing"),
}


def finetune_config(
    path: Path | None, overrides: Sequence[str], *, world_size: int = 1
) -> RunConfig:
    """The resolved configuration of a fine-tuning, `train.init_from` naming what it starts from.

    Args:
        path: a TOML file, or None.
        overrides: as of `load_config`.
        world_size: ranks.

    Raises:
        ConfigError: naming every problem found.
        UserError: there is nothing to start from.
    """

    def base(given: Mapping[str, Any]) -> dict[str, Any]:
        source = _section(given, "train").get("init_from")
        if not isinstance(source, str):
            raise UserError(
                "fine-tuning needs a pre-trained model: give --from RUN (a run or a checkpoint), "
                "or train.init_from; to train from nothing use `megaswitch train`"
            )
        return _base(Path(source), given, world_size)

    config = load_config(path, overrides, world_size=world_size, base=base)
    if not isinstance(config.data.train, dict):
        raise UserError(
            f"data.train={config.data.train!r} must be a table of tasks, each with its file: "
            "--data.train.NAME=FILE, and --data.valid.NAME=FILE for held-out examples; "
            "`megaswitch finetune --tasks` lists the public tasks"
        )
    return config


def _base(source: Path, given: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    checkpoint = find_checkpoint(source)
    before = tomllib.loads(to_toml(read_config(checkpoint)))
    base = {section: dict(keys) for section, keys in _PAPER.items()}
    for section, keys in _INHERITED.items():
        base[section] |= {key: before[section][key] for key in keys if key in before[section]}
    base["model"] = before["model"] | base["model"]
    if before["model"]["moe"]["num_experts"]:
        moe = before["model"]["moe"] | {"expert_dropout": _EXPERT_DROPOUT}
        if "group_size" in moe:
            moe["group_size"] = _group(moe["group_size"], base, given)
        base["model"]["moe"] = moe
    if (checkpoint / "tokenizer.model").is_file():
        base["data"]["tokenizer"] = str(checkpoint / "tokenizer.model")
    tasks = _tasks(given)
    if tasks:
        base["data"]["tasks"] = tasks
    if "weights" not in _section(_section(given, "data"), "mixture"):
        base["data"]["mixture"] = {"size": "tokens"}
    if _section(_section(given, "model"), "lora").get("rank"):
        # A factor that starts at zero would hardly leave it at rates relative to its size.
        base["optim"]["scale_by_parameter"] = False
    if not _section(given, "data").get("valid"):
        base["checkpoint"]["keep_best"] = False
    base["train"]["batch_size"] = _batch(base, given, world_size)
    return base


def _tasks(given: Mapping[str, Any]) -> dict[str, str]:
    """Sources that no task was given for: the public one of that name, or pairs as they are.

    Corpora, of which token files exist already, need none.
    """
    data = _section(given, "data")
    named = _section(data, "tasks")
    sources = {**_section(data, "valid"), **_section(data, "train")}
    return {
        name: name if name in builtin_tasks() else "pairs"
        for name, value in sources.items()
        if name not in named
        and isinstance(value, str)
        and not companion(Path(value), "_inputs.idx").is_file()
    }


def _group(size: int, base: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    """The routing group of the pre-training, in whole rows of the length that rows have now."""
    length = _section(given, "data").get("encoder_length", base["data"]["encoder_length"])
    return max(1, size // length) * length if type(length) is int and length > 0 else size


def _batch(base: Mapping[str, Any], given: Mapping[str, Any], world_size: int) -> int:
    """Sequences of about the paper's tokens, shared evenly whatever the layout."""
    length = _section(given, "data").get("encoder_length", base["data"]["encoder_length"])
    micro = _section(given, "train").get("micro_batch_size", base["train"]["micro_batch_size"])
    if not all(type(number) is int and number > 0 for number in (length, micro)):
        return 1  # which is reported as it stands
    share = micro * world_size
    return max(1, _BATCH_TOKENS // length // share) * share


def _section(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = table.get(name)
    return section if isinstance(section, Mapping) else {}


def headline(config: RunConfig) -> str:
    """What is about to be trained, in a line."""
    optim, train, model = config.optim, config.train, config.model
    dropout = f"dropout {model.dropout}"
    if model.moe.num_experts:
        inside = model.moe.expert_dropout
        dropout += f", {model.dropout if inside is None else inside} in experts"
    names = ", ".join(config.data.train) if isinstance(config.data.train, dict) else ""
    by = "weights" if config.data.mixture.weights else config.data.mixture.size or "samples"
    adapters = f" · adapters of rank {model.lora.rank}" if model.lora.rank else ""
    return (
        f"fine-tuning {train.init_from} on {names} (shares by {by}) · {optim.name}, "
        f"{optim.schedule} {optim.learning_rate:g} · {dropout}{adapters} · {train.batch_size:,} "
        f"sequences × {train.steps:,} steps"
    )
