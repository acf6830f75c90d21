"""What a configuration changes against its preset and the defaults."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from megaswitch.config import RunConfig, differences, from_toml


def changes(config: RunConfig, section: str = "") -> list[dict[str, Any]]:
    """Keys that are neither the preset's nor the default, with their value and the usual one.

    Args:
        config: of a run.
        section: only keys that begin so.
    """
    preset = config.model.preset
    usual = from_toml(f'model.preset = "{preset}"' if preset else "")
    return [
        {"key": key, "value": attrgetter(key)(config), "usual": attrgetter(key)(usual)}
        for key, _ in differences(usual, config)
        if key.startswith(section)
    ]
