"""Routing drawn for a whole world."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megaswitch.config import from_toml
from megaswitch.log import UserError
from megaswitch.scale.routing import shares, simulate_routing

CONFIG = from_toml(
    '[model]\npreset = "switch-base-8"\n[train]\nbatch_size = 256\n[parallel]\nep = 4'
)
LENGTHS = 512, 114


def test_even_routing_drops_next_to_nothing():
    loads = simulate_routing(CONFIG, "uniform", LENGTHS)
    assert loads["encoder"].dropped == 0  # 8192 tokens of a group for 8 experts of 1280 slots
    assert 1.0 <= loads["encoder"].busiest_expert < 1.02
    assert 1.0 <= loads["encoder"].busiest_rank < 1.02


def test_drops_are_what_exceeds_the_capacity(tmp_path):
    counts = [4, 1, 1, 1, 1, 0, 0, 0]
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(counts))
    load = simulate_routing(CONFIG, str(path), LENGTHS)["encoder"]
    # Half of all tokens want one expert, which takes 1280 of a group's 8192.
    assert load.dropped == pytest.approx(0.5 - 1280 / 8192, abs=0.01)
    assert load.busiest_expert == pytest.approx(4.0, rel=0.01)


def test_nothing_is_dropped_without_capacity():
    moe = replace(CONFIG.model.moe, capacity_mode="dropless")
    dropless = replace(CONFIG, model=replace(CONFIG.model, moe=moe))
    load = simulate_routing(dropless, "zipf:1.0", LENGTHS)["decoder"]
    assert load.dropped == 0
    assert load.busiest_rank > 1.3


def test_shares_fall_with_the_exponent():
    assert shares("zipf:0.5", 4) == pytest.approx(np.arange(1, 5) ** -0.5 / 2.78445705, rel=1e-6)


@pytest.mark.parametrize("text", ["[1, 2]", "[1, 2, -3, 4, 5, 6, 7, 8]", "{}", "no"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"experts|distribution|readable"):
        shares(str(path), 8)
    with pytest.raises(UserError, match=r"zipf:0\.5"):
        shares("zipf:much", 8)
