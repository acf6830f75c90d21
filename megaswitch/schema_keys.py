"""How configuration keys are declared.

`only_if` declares, beside a key, when the rest of the configuration gives it a meaning; a key that
is written while it has none is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _true_false_or_selective(value: object) -> object:
    """Refuse the numbers 0 and 1, which Python takes for false and true."""
    if isinstance(value, bool) or value == "selective":
        return value
    raise PydanticCustomError("selective", "Input should be true, false or 'selective'")


Selective = Annotated[Literal[False, True, "selective"], BeforeValidator(_true_false_or_selective)]


def only_if(key: str, *values: object) -> dict[str, Any]:
    """Declare that a field matters only while `key` holds one of `values`, or is truthy."""
    return {"only_if": [{"key": key, "values": list(values)}]}


def all_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """Declare that a field matters only while each of several `only_if` holds."""
    return {"only_if": [condition for rule in rules for condition in rule["only_if"]]}


def only_if_table(key: str) -> dict[str, Any]:
    """Declare that a field matters only while `key` holds a table of names."""
    return {"only_if": [{"key": key, "values": [], "table": True}]}
