"""From TOML files and `--section.key=value` to a checked `RunConfig`, and back.

Every problem is reported at once: unknown keys with the nearest match, wrong types and bounds, keys
that the rest of the configuration would ignore, and the rules between keys (`rules.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from megaswitch.log import ConfigError, UserError
from megaswitch.presets import PRESETS
from megaswitch.rules import check
from megaswitch.rules_parallel import REFUSED, check_parallel
from megaswitch.schema import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    FaultConfig,
    FP8Config,
    LoRAConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "FP8Config",
    "FaultConfig",
    "LoRAConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainConfig",
    "describe_keys",
    "differences",
    "from_toml",
    "known_keys",
    "load_config",
    "model_config",
    "relaid",
    "to_toml",
]


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    base: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> RunConfig:
    """The configuration of `path` (TOML) changed by `--section.key=value` overrides.

    Args:
        path: a TOML file, or None for the defaults.
        overrides: later ones win; values are TOML, or else plain strings.
        world_size: ranks that will share the batch.
        base: from what the user wrote to what it is laid over, instead of the plain defaults.

    Raises:
        ConfigError: naming every problem found, each with value, rule and remedy.
        UserError: the file is missing or not TOML.
    """
    table = _read_toml(path) if path else {}
    problems = [problem for text in overrides if (problem := _override(table, text))]
    config, more = _parse(_merge(_merge({}, base(table)), table) if base else table)
    problems += more
    bad_keys = {problem.split("=")[0].split(" ")[0] for problem in problems}
    problems += [p for p in _inactive(config, table) if not _speaks_of(p, bad_keys)]
    # A rule that speaks of a key already found wrong would only repeat it.
    problems += [p for p in check(config, world_size) if not _speaks_of(p, bad_keys)]
    if problems:
        raise ConfigError(problems)
    return config


def _speaks_of(problem: str, keys: set[str]) -> bool:
    """True if the sentence names one of `keys` or something inside it."""
    names = re.findall(r"[\w.]*\w", problem)
    return any(f"{name}.".startswith(f"{key}.") for name in names for key in keys)


def model_config(preset: str) -> ModelConfig:
    """The model of a preset.

    Raises:
        ConfigError: no such preset; the nearest name is suggested.
    """
    config, problems = _parse({"model": {"preset": preset}})
    if problems:
        raise ConfigError(problems)
    return config.model


def from_toml(text: str) -> RunConfig:
    """The configuration stored in a run folder or checkpoint by `to_toml`."""
    config, problems = _parse(tomllib.loads(text))
    if problems:
        raise ConfigError(problems)
    return config


def relaid(config: RunConfig, overrides: Sequence[str], ranks: int | None) -> tuple[RunConfig, int]:
    """The configuration of the same run in another layout.

    Args:
        config: of the run; of its own layout nothing is kept.
        overrides: of keys of `parallel`, and train.micro_batch_size.
        ranks: None: as many as pp × ep × tp.

    Returns:
        the configuration, and the number of ranks.

    Raises:
        ConfigError: naming every problem found.
    """
    table = tomllib.loads(to_toml(config))
    table.pop("parallel", None)
    problems = [
        f"{text.partition('=')[0]} is no key of a layout; only --parallel.KEY and "
        "--train.micro_batch_size may change, the rest is the checkpoint's"
        for text in overrides
        if not text.startswith(("--parallel.", "--train.micro_batch_size="))
    ]
    problems += [problem for text in overrides if (problem := _override(table, text))]
    config, more = _parse(table)
    parallel = config.parallel
    ranks = ranks or parallel.pp * parallel.ep * parallel.tp
    problems = problems or more or [*_inactive(config, table), *check_parallel(config, ranks)]
    if problems:
        raise ConfigError(problems)
    return config, ranks


def to_toml(config: RunConfig) -> str:
    """The resolved configuration: every key that is alive, with its value, as TOML."""
    table: dict[str, Any] = {}
    for key, value in _leaves(config):
        if value is not None and _dead_reason(config, key) is None:
            _set(table, key, value)
    return tomli_w.dumps(table)


def differences(stored: RunConfig, given: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys whose values differ, each with a sentence part that says how."""
    values = dict(_leaves(given))
    for key, before in _leaves(stored):
        if values[key] != before:
            yield key, f"{key} was {before!r} and is {values[key]!r}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if str(path).startswith("--"):
            raise UserError(
                f"a configuration file comes before {path}; see examples/ for some"
            ) from None
        raise UserError(
            f"configuration file {path} does not exist; see examples/ for some"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"configuration file {path} is not TOML: {error}") from error


def _override(table: dict[str, Any], text: str) -> str | None:
    """Apply one `--section.key=value`; returns what is wrong with it."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not equals or "." not in key:
        return f"{text} is not an override; write --section.key=value"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    try:
        _set(table, key, parsed)
    except TypeError:
        return f"{key}={value}: {key.rpartition('.')[0]} is a value, not a section"
    return None


def _parse(table: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """A configuration from a table, its wrong keys left at their defaults, and what they were."""
    expanded, problems = _expand_preset(table)
    try:
        return _validate(expanded), problems
    except ValidationError as error:
        known = known_keys()
        leaves = set(known)
        known += {key.rpartition(".")[0]: None for key in known}  # a section may be misspelt too
        for detail in error.errors():
            key, path = _where([str(part) for part in detail["loc"]], leaves)
            if "str" in detail["loc"] and isinstance(detail["input"], dict):
                continue  # it is a table, and the other problem tells what is wrong inside
            if any(problem.startswith(f"{key}=") for problem in problems):
                continue
            if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                hint = f"; {REFUSED[key]}" if key in REFUSED else _nearest(key, known)
                problems.append(f"{key} is not a known key{hint}")
            elif detail["type"] == "dataclass_type":
                problems.append(
                    f"{key}={detail['input']!r} is wrong: it is a section; write [{key}]"
                )
            else:
                problems.append(f"{key}={detail['input']!r} is wrong: {detail['msg']}")
            _unset(expanded, path)
    return _validate(expanded), problems


def _where(location: list[str], leaves: set[str]) -> tuple[str, list[str]]:
    """The key that pydantic means, as people write it, and the path of the value it belongs to.

    The value may be a table, and what it may be else is told apart by another part of the path.
    """
    for end in range(1, len(location)):
        if ".".join(location[:end]) in leaves:
            inside = [part for part in location[end:] if part not in ("str", "dict[str,str]")]
            return ".".join(location[:end] + inside), location[:end]
    return ".".join(location), location


def _validate(table: Mapping[str, Any]) -> RunConfig:
    """Build the dataclasses. By way of JSON: strict types, yet tables where dataclasses belong."""
    return TypeAdapter(RunConfig).validate_json(json.dumps(table, default=str))


def _expand_preset(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    expanded = _merge({}, table)
    model = expanded.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    if name is None:
        return expanded, []
    if not isinstance(name, str) or name not in PRESETS:
        expanded["model"].pop("preset")
        known = _nearest(str(name), list(PRESETS)) or "; `megaswitch presets` lists them"
        return expanded, [f"model.preset={name!r} is not a preset{known}"]
    return _merge({"model": _merge({}, PRESETS[name])}, expanded), []


def _nearest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, table by table; `top` is left alone."""
    for key, value in top.items():
        if isinstance(value, Mapping):
            below = base.get(key)
            base[key] = _merge(below if isinstance(below, dict) else {}, value)
        else:
            base[key] = value
    return base


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise TypeError(section)
    table[name] = value


def _unset(table: dict[str, Any], path: Sequence[str]) -> None:
    *sections, name = path
    for section in sections:
        table = table.get(section, {})
    table.pop(name, None)


def known_keys() -> list[str]:
    """Every dotted key."""
    return [key for key, _ in _leaves(RunConfig())]


def describe_keys() -> list[tuple[str, str, str]]:
    """Every key with its default and what it means, for people."""
    rows = []
    for key, default in _leaves(RunConfig()):
        section, _, name = key.rpartition(".")
        field = type(_value(RunConfig(), section)).__pydantic_fields__[name]
        shown = "unset" if default is None else json.dumps(default)
        rows.append((key, shown, field.description or ""))
    return rows


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _dead_reason(config: RunConfig, key: str) -> str | None:
    """Why `key` means nothing in this configuration, or None if it does."""
    section, _, name = key.rpartition(".")
    fields = type(_value(config, section)).__pydantic_fields__
    for rule in (fields[name].json_schema_extra or {}).get("only_if", ()):
        owner, values = rule["key"], rule["values"]
        held = _value(config, owner)
        if (why := _dead_reason(config, owner)) is not None:
            return why
        table = rule.get("table", False)
        if not (isinstance(held, dict) if table else held in values if values else held):
            wanted = " or ".join(map(str, values)) if values else "set and not 0"
            wanted = "a table of named sources" if table else wanted
            return f"{owner}={held!r}; it must be {wanted}"
    return None


def _inactive(config: RunConfig, table: Mapping[str, Any]) -> list[str]:
    """Keys that the user wrote and the rest of the configuration ignores."""
    problems = []
    for key, value in _leaves(config):
        *sections, name = key.split(".")
        written: Any = table
        for section in sections:
            written = written.get(section, {}) if isinstance(written, Mapping) else {}
        if isinstance(written, Mapping) and name in written:
            reason = _dead_reason(config, key)
            if reason:
                problems.append(f"{key}={value!r} would be ignored because {reason}; remove it")
    return problems
