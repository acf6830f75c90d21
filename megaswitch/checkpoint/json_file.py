"""JSON that others wrote: of bounded size and depth, each key once, and every number finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megaswitch.log import UserError
from megaswitch.storage import read_small


def parse_json(text: bytes, where: Path) -> Any:
    """The content of a JSON text.

    Raises:
        UserError: it is none, is too deep, names a key twice or holds a number that is not finite.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged or malicious: it holds no sound JSON ({error}); copy it again"
        ) from error


def read_table(path: Path, limit: int) -> dict[str, Any]:
    """The table in a JSON file of at most `limit` bytes.

    Raises:
        UserError: it is none.
    """
    content = parse_json(read_small(path, limit), path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a table {{…}}, and holds a {type(content).__name__}")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:80]!r} occurs twice")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value
