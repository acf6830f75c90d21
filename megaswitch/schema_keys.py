"""How configuration keys are declared.

`only_if` declares, beside a key, when the rest of the configuration gives it a meaning; a key that
is written while it has none is an error.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def only_if(key: str, *values: object) -> dict[str, Any]:
    """Declare that a field matters only while `key` holds one of `values`, or is truthy."""
    return {"only_if": [{"key": key, "values": list(values)}]}


def all_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """Declare that a field matters only while each of several `only_if` holds."""
    return {"only_if": [condition for rule in rules for condition in rule["only_if"]]}


def only_if_table(key: str) -> dict[str, Any]:
    """Declare that a field matters only while `key` holds a table of names."""
    return {"only_if": [{"key": key, "values": [], "table": True}]}
