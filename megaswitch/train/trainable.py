"""Which parts of a model a run trains, and which it multiplies in FP8, by patterns of names.

What is not trained keeps its values and takes no gradient or optimizer state.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from megaswitch.config import FP8Config, RunConfig
from megaswitch.layers.kernels import LinearMap
from megaswitch.log import ConfigError, UserError
from megaswitch.model.adapters import is_adapter, linear_maps
from megaswitch.model.count import meta_model
from megaswitch.model.stages import Stage


def check_trainable(config: RunConfig) -> None:
    """Refuse patterns that match nothing. Needs no process group.

    Raises:
        ConfigError: naming them, each with the nearest names.
    """
    lora, optim, fp8 = config.model.lora, config.optim, config.train.fp8
    if not (lora.rank or optim.train_only or optim.freeze or fp8.keep):
        return
    model = meta_model(config.model)
    maps = [name for name, _ in linear_maps(model)]
    names = [name for name, _ in model.named_parameters()]
    problems = [
        f"{key} has {pattern!r}, which matches no {what}; near it are {_near(pattern, known)}"
        for key, patterns, known, what in (
            ("model.lora.targets", lora.targets if lora.rank else None, maps, "linear map"),
            ("train.fp8.keep", fp8.keep, maps, "linear map"),
            ("optim.train_only", optim.train_only, names, "parameter"),
            ("optim.freeze", optim.freeze, names, "parameter"),
        )
        for pattern in patterns or ()
        if not any(fnmatchcase(name, pattern) for name in known)
    ]
    if not problems and not trainable(names, config):
        problems.append(
            "optim.train_only and optim.freeze leave no parameter to train; freeze fewer"
        )
    if problems:
        raise ConfigError(problems)


def _near(pattern: str, names: Sequence[str]) -> str:
    """Names, or their ends, that people may have meant: like the pattern without wildcards."""
    wanted = pattern.strip("*").strip(".")
    parts = {
        ".".join(pieces[start:])
        for pieces in (name.split(".") for name in names)
        for start in range(len(pieces))
    }
    found = difflib.get_close_matches(wanted, sorted(parts | set(names)), n=3, cutoff=0.3)
    return ", ".join(found or names[:3])


def trainable(names: Iterable[str], config: RunConfig) -> set[str]:
    """Those of the parameters `names` that the run trains."""
    names, optim = set(names), config.optim
    if optim.train_only is not None:
        chosen = {n for n in names if _matches(n, optim.train_only)}
    elif config.model.lora.rank and optim.freeze is None:
        chosen = {n for n in names if is_adapter(n)}
    else:
        chosen = names
    return {n for n in chosen if not _matches(n, optim.freeze or ())}


def maps_in_fp8(model: nn.Module, fp8: FP8Config) -> dict[str, LinearMap]:
    """The linear maps of a model whose products are in FP8, if any are, by name."""
    return {n: m for n, m in linear_maps(model) if not _matches(n, fp8.keep or ())}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze(model: nn.Module, config: RunConfig, stage: Stage | None = None) -> None:
    """Freeze what the run does not train.

    Args:
        model: a whole one, or the layers of `stage`.
        config: of the run.
        stage: of a pipeline.

    Raises:
        UserError: the stage has nothing to train.
    """
    named = dict(model.named_parameters())
    chosen = trainable(named, config)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    if stage is not None and not chosen:
        raise UserError(
            f"pipeline stage {stage.index} (blocks {stage.blocks.start} to {stage.blocks.stop - 1})"
            " has no parameter that optim.train_only and optim.freeze leave to train, and a "
            "pipeline's backward pass needs one in each stage; freeze fewer, use other "
            "parallel.layers_per_stage, or pp=1"
        )
