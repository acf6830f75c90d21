"""`megaswitch inspect` of a run folder."""

import json
import shlex
import shutil

import pytest

from megaswitch.checkpoint.manager import checkpoints, read_config
from megaswitch.cli.inspect_run import disk_use
from megaswitch.cli.show import curve, histogram, size, sparkline
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.files import holder, lock
from megaswitch.metrics_file import read_metrics
from tests.unit.cli.commands import printed, refusal, report, run


@pytest.fixture
def run_copy(text_run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(text_run / "run", tmp_path / "my run")


def test_the_report_is_exact(text_run, capsys):
    path = text_run / "run"
    found = report(capsys, "inspect", path, "--verify")
    metrics = read_metrics(path / "metrics.jsonl")
    loader = SpanCorruptionLoader(text_run / "valid", seed=5, vocab_size=512, encoder_length=64)
    assert found["progress"]["step"] == found["progress"]["steps"] == 3
    assert found["progress"]["samples"] == 12
    assert found["progress"]["epochs"] == 12 / loader.samples_per_epoch
    assert found["latest"]["loss"] == [m["loss"] for m in metrics if "loss" in m][-1]
    assert found["latest_validation"]["step"] == 3
    assert found["loss"]["steps"] == [m["step"] for m in metrics if "loss" in m]
    (saved,) = checkpoints(path / "checkpoints")
    assert found["checkpoints"] == [{"name": saved.name, "step": 3, "bytes": disk_use([saved])}]
    assert found["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert found["held_by"] is None
    assert found["continues_from_step"] == 3
    changed = {c["key"]: (c["value"], c["usual"]) for c in found["changes"]}
    assert changed["train.batch_size"] == (4, 64)
    assert "train.precision" not in changed


def test_people_see_losses_and_the_router(text_run, capsys):
    text = printed(capsys, "inspect", text_run / "run")
    for words in ("step 3 of 3 (100%)", "encoder.1.ffn", "of ln 4", "step_00000003", "held by"):
        assert words in text


def test_the_command_it_gives_continues_the_run(run_copy, capsys):
    program, *words = shlex.split(report(capsys, "inspect", run_copy)["continue_with"])
    assert program == "megaswitch"
    assert "--train.steps=6" in words
    run(*words, "--train.steps=4")
    assert report(capsys, "inspect", run_copy)["progress"]["step"] == 4
    assert read_config(run_copy).train.steps == 4


def test_a_growing_batch_is_counted(run_copy, capsys):
    config = run_copy / "config.toml"
    ramp = "[train]\nrampup_batch_size = 4\nrampup_increment = 4\nrampup_samples = 8"
    text = (
        config.read_text()
        .replace("[train]", ramp)
        .replace("batch_size = 4\nmicro", "batch_size = 12\nmicro")
    )
    config.write_text(text)
    shutil.rmtree(run_copy / "checkpoints")  # which would know
    # 4 sequences, then 8 once 4 have been seen, then 12.
    assert report(capsys, "inspect", run_copy)["progress"]["samples"] == 4 + 8 + 12


def test_samples_that_were_passed_over_count(run_copy, capsys):
    (saved,) = checkpoints(run_copy / "checkpoints")
    state = saved / "state.json"
    content = json.loads(state.read_text())
    content["state"]["samples"] += 40
    state.write_text(json.dumps(content))
    assert report(capsys, "inspect", run_copy)["progress"]["samples"] == 12 + 40
    state.write_text("{}")
    assert report(capsys, "inspect", run_copy)["progress"]["samples"] == 12


def test_data_that_is_gone_leaves_the_rest(run_copy, capsys):
    config = run_copy / "config.toml"
    config.write_text(config.read_text().replace("/valid", "/gone"))
    found = report(capsys, "inspect", run_copy)["progress"]
    assert found["epochs"] is None
    assert "gone" in found["epochs_unknown"]
    assert "unknown" in printed(capsys, "inspect", run_copy)


def test_a_run_that_has_just_begun(run_copy, capsys):
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "metrics.jsonl").write_text("")
    found = report(capsys, "inspect", run_copy)
    assert (found["progress"]["step"], found["latest"], found["checkpoints"]) == (0, None, [])
    assert found["continues_from_step"] == 0
    text = printed(capsys, "inspect", run_copy)
    assert "nothing logged yet" in text
    assert "the beginning: nothing was saved" in text
    assert "no step yet" in refusal("inspect", run_copy, "--plot", run_copy / "loss.png")


def test_who_holds_the_folder_is_said(run_copy, capsys):
    with lock(run_copy):
        assert report(capsys, "inspect", run_copy)["held_by"].startswith("pid ")
    assert holder(run_copy) is None
    assert holder(run_copy / "nothing") is None


def test_looking_leaves_the_lock_free(run_copy):
    assert holder(run_copy) is None
    lock(run_copy).close()


def test_leftovers_are_shown(run_copy, capsys):
    (run_copy / "checkpoints" / "step_00000009.unfinished").mkdir()
    found = report(capsys, "inspect", run_copy)
    assert found["unfinished_checkpoints"] == ["step_00000009.unfinished"]
    assert "half-written" in printed(capsys, "inspect", run_copy)


def test_verify_covers_every_checkpoint(run_copy):
    (saved,) = checkpoints(run_copy / "checkpoints")
    (saved / "config.toml").write_text("")
    assert "is damaged" in refusal("inspect", run_copy, "--verify")


def test_a_collapsed_router_is_named(run_copy, capsys):
    entries = read_metrics(run_copy / "metrics.jsonl")
    last = next(m for m in reversed(entries) if "loss" in m)
    last["load_imbalance/encoder.1.ffn"] = 3.9
    (run_copy / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in entries))
    assert "more than half of the tokens go to one expert" in printed(capsys, "inspect", run_copy)


def test_infinities_are_no_json(run_copy, capsys):
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 4, "loss": Infinity, "accuracy": 0, "learning_rate": 1, "grad_norm": NaN}\n'
        )
    found = report(capsys, "inspect", run_copy)
    assert found["latest"]["loss"] is None
    printed(capsys, "inspect", run_copy)


@pytest.mark.parametrize("line", ['{"step": Infinity}', '{"step": "2"}', "[" * 100_000])
def test_a_spoilt_line_of_metrics_is_left_out(run_copy, capsys, line):
    path = run_copy / "metrics.jsonl"
    before = report(capsys, "inspect", run_copy)["loss"]
    with path.open("a") as file:
        file.write(line + "\n")
    assert report(capsys, "inspect", run_copy)["loss"] == before


def test_a_foreign_folder_is_explained(tmp_path):
    assert "neither state.json" in refusal("inspect", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "has no config.toml" in refusal("inspect", tmp_path)


def test_curves_are_drawn(text_run, tmp_path, capsys):
    file = tmp_path / "curves.png"
    run("inspect", text_run / "run", "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 20_000


def test_small_drawings():
    assert sparkline([1, 2, 3]) == "▁▅█"
    assert sparkline([1, float("nan"), 1]) == "▁!▁"
    assert sparkline([]) == ""
    assert histogram(["a", "bb"], [1, 2], width=2) == [" a  █ 1", "bb  ██ 2"]
    assert histogram([], []) == []
    assert curve([1], [1]) == []
    lines = curve([1, 2, float(100)], [3.0, float("inf"), 1.0], width=4, height=2)
    assert lines[0].split() == ["3.000", "┤██"]
    assert lines[1].split() == ["1.000", "┤██▁▁"]
    assert lines[2].split() == ["1", "100"]
    assert size(1023) == "1,023 bytes"
    assert size(1536) == "1.5 KiB"
    assert size(2**62) == "4,096.0 PiB"
