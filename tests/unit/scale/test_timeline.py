"""Pipelines laid out in time, by torch's own order."""

import json

import pytest

from megaswitch.config import from_toml
from megaswitch.scale.hardware import load_hardware
from megaswitch.scale.rehearsal import schedule_orders
from megaswitch.scale.timeline import bubble, lay_out, write_trace
from megaswitch.scale.times import Times

COST = {"FORWARD": 1.0, "FULL_BACKWARD": 2.0, "BACKWARD_INPUT": 1.0, "BACKWARD_WEIGHT": 1.0}


def config_of(schedule: str, micro_batches: int, stages_per_rank: int = 1):
    extra = f"stages_per_rank = {stages_per_rank}" if stages_per_rank > 1 else ""
    return from_toml(
        f'[model]\npreset = "t5-base"\n[train]\nbatch_size = {micro_batches}\n'
        f'micro_batch_size = 1\n[parallel]\npp = 4\nschedule = "{schedule}"\n{extra}'
    )


def spans(schedule: str, micro_batches: int, stages_per_rank: int = 1):
    orders = schedule_orders(config_of(schedule, micro_batches, stages_per_rank), 4)
    stages = 4 * stages_per_rank
    return lay_out(orders, stages, [COST] * stages)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("micro_batches", [4, 12])
def test_the_bubble_is_that_of_the_textbook(schedule, micro_batches):
    assert bubble(spans(schedule, micro_batches)) == pytest.approx(3 / (micro_batches + 3))


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "micro_batches"),
    [*(("gpipe", 1, m) for m in (1, 2, 4, 8)), *(("interleaved", 2, m) for m in (1, 2, 4, 8)),
     ("1f1b", 1, 4), ("1f1b", 1, 8)],
)  # fmt: skip
def test_plans_wait_as_long_as_the_schedule(schedule, stages_per_rank, micro_batches):
    """Also where there are fewer micro-batches than ranks."""
    config = config_of(schedule, micro_batches, stages_per_rank)
    waits = Times(config, 4, (512, 114), load_hardware("h100")).waits
    idle = bubble(spans(schedule, micro_batches, stages_per_rank))
    assert waits / (waits + micro_batches) == pytest.approx(idle)


def test_more_stages_and_split_backwards_wait_less():
    plain = bubble(spans("1f1b", 8))
    assert bubble(spans("interleaved", 8, 2)) < plain
    assert bubble(spans("zero-bubble", 8)) < plain


def test_nothing_starts_before_what_it_needs():
    found = {(s.kind, s.stage, s.micro_batch): s for s in spans("interleaved", 8, 2)}
    assert len(found) == 2 * 8 * 8
    for (kind, stage, number), span in found.items():
        if kind == "forward" and stage:
            assert found["forward", stage - 1, number].end <= span.start
        if kind == "backward" and stage < 7:
            assert found["backward", stage + 1, number].end <= span.start


def test_traces_are_written(tmp_path):
    chosen = spans("1f1b", 4)
    write_trace(chosen, tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == len(chosen)
    write_trace(chosen, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
