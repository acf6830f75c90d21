"""Speed-ups of literal curves: levels, lines between validations, bounds."""

import json

import pytest

from megaswitch.log import UserError
from megaswitch.scale.curves import Spread, curve, end, mean_curve, steps_to
from megaswitch.scale.speedup import SpeedUp, Summary, compare_runs, draw, speed_up
from tests.unit.cli.commands import printed, refusal, report

DENSE = [(100, 5.0), (200, 4.0), (300, 3.5), (400, 3.0)]
SPARSE = [(100, 4.0), (200, 3.0), (300, 2.5), (400, 2.0)]


def test_the_step_that_reaches_a_level_lies_between_two_points():
    assert steps_to(DENSE, 3.25) == 350
    assert steps_to(DENSE, 4.0) == 200
    assert steps_to(DENSE, 6.0) == 100
    assert steps_to(DENSE, 2.9) is None
    assert steps_to([(100, 5.0), (200, 6.0), (300, 4.0)], 5.5) == 100
    assert steps_to([], 1.0) is None


def test_both_models_reach_the_common_level():
    found = speed_up("de", DENSE, SPARSE)
    assert found == SpeedUp("de", 3.0, 400.0, 200.0, 400, 400)
    assert (found.ratio, found.bound) == (2.0, "=")
    turned = speed_up("de", SPARSE, DENSE)
    assert (turned.level, turned.ratio, turned.bound) == (3.0, 0.5, "=")


def test_a_level_that_one_model_misses_gives_a_bound():
    found = speed_up("sw", DENSE, SPARSE, "sparse")
    assert (found.level, found.dense_steps, found.sparse_steps) == (2.0, None, 400.0)
    assert (found.ratio, found.bound) == (1.0, "≥")
    turned = speed_up("sw", SPARSE, DENSE, "dense")
    assert (turned.level, turned.dense_steps, turned.sparse_steps) == (2.0, 400.0, None)
    assert (turned.ratio, turned.bound) == (1.0, "≤")
    long = speed_up("sw", [*DENSE, (2000, 2.2)], SPARSE, "sparse")
    assert (long.ratio, long.bound) == (5.0, "≥")


def test_the_lowest_loss_counts_not_the_last():
    found = speed_up("en", [*DENSE, (500, 3.4)], SPARSE)
    assert (found.level, found.dense_steps) == (3.0, 400.0)


def write_run(folder, curves):
    folder.mkdir()
    lines = []
    for step in (100, 200, 300, 400):
        lines.append({"step": step, "loss": 1.0})
        lines.append(
            {"step": step}
            | {f"valid/loss{name}": dict(points)[step] for name, points in curves.items()}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    fast = [(100, 3.0), (200, 2.0), (300, 1.5), (400, 1.0)]
    dense = write_run(tmp_path / "dense", {"": DENSE, "/de": DENSE, "/sw": DENSE, "/xx": DENSE})
    sparse = write_run(tmp_path / "sparse", {"": SPARSE, "/de": SPARSE, "/sw": fast})
    return dense, sparse


def test_every_source_of_both_runs_is_compared(runs):
    found = compare_runs(*runs)
    assert [(one.source, one.ratio) for one in found] == [("all", 2.0), ("sw", 4.0), ("de", 2.0)]
    assert Summary.of(found) == Summary(2, 3.0, 3.0, 0, 0.5)


def test_the_command_prints_a_table_json_and_a_picture(runs, tmp_path, capsys):
    text = printed(capsys, "study", "speedup", *runs, "--plot", tmp_path / "s.png")
    assert "mean 3.00×, median 3.00×, 50% at 4× and more, over 2 sources" in text
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    found = report(capsys, "study", "speedup", *runs, "--level", "sparse")
    bounds = {one["source"]: one["bound"] for one in found["sources"]}
    assert bounds == {"all": "≥", "de": "≥", "sw": "≥"}
    assert found["summary"]["bounds"] == 2
    text = printed(capsys, "study", "speedup", *runs, "--level", "sparse")
    assert "> 400" in text
    assert "≥ 1.00×" in text
    assert "2 are bounds" in text


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no validation loss" in refusal("study", "speedup", runs[0], tmp_path / "empty")
    other = write_run(tmp_path / "other", {"/fr": DENSE})
    assert "validated on different sources" in refusal("study", "speedup", runs[0], other)
    assert "has the suffix" in refusal("study", "speedup", *runs, "--plot", tmp_path / "x.docx")


def test_a_hundred_languages_fit_into_a_histogram(tmp_path):
    found = [SpeedUp(f"l{i}", 3.0, 1000.0 + 37 * i, 400.0, 4000, 4000) for i in range(100)]
    draw(found, tmp_path / "many.png", "a · b")
    assert Summary.of(found).at_least_four == sum(1000 + 37 * i >= 1600 for i in range(100)) / 100


def test_curves_end_and_are_averaged():
    metrics = [{"step": 1, "a": 2.0}, {"step": 2, "a": float("nan")}, {"step": 3, "a": True}]
    assert curve(metrics, "a") == [(1, 2.0)]
    assert end([(10, 9.0), (91, 4.0), (100, 2.0)]) == 3.0
    assert end([(50, 9.0), (100, 2.0)]) == 2.0
    (point,) = mean_curve([[(1, 1.0), (2, 5.0)], [(1, 3.0)]])
    assert point == (1, Spread(2.0, pytest.approx(2**0.5), 2))
    assert Spread.of([1234.5]).text(1) == "1,234.5"
    with pytest.raises(UserError):
        compare_runs(*(2 * [__import__("pathlib").Path("nowhere")]))
