"""The resolved configuration of every preset, as text: a review shows what a change changes.

After a deliberate change: python tests/golden/test_resolved_configs.py
"""

from pathlib import Path

from megaswitch.config import load_config, to_toml
from megaswitch.presets import PRESETS

GOLDEN = Path(__file__).with_name("presets.txt")


def resolved() -> str:
    """All presets at their natural batch: one routing group per micro-batch."""
    parts = []
    for name, table in PRESETS.items():
        rows = max(1, table.get("moe", {}).get("group_size", 512) // 512)
        batch = [f"--train.micro_batch_size={rows}", f"--train.batch_size={rows}"]
        text = to_toml(load_config(None, [f"--model.preset={name}", *batch]))
        parts.append(f"# {name}\n{text.split('[data]')[0].strip()}\n")
    return "\n".join(parts)


def test_resolved_configs_are_as_recorded():
    assert resolved() == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    GOLDEN.write_text(resolved(), encoding="utf-8")
