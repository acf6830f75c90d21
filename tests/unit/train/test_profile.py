"""Where a step goes: parts are told apart, and backward passes go to the part they undo."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from megaswitch.config import load_config
from megaswitch.parallel import regions
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.regions import PREFIX, named, region, watched
from megaswitch.train.profile import MEASURED, WARM_UP, StepProfile, Times, summary, times_of
from megaswitch.train.trainer import Trainer

CPU = torch.autograd.DeviceType.CPU


def event(name, start, end, own, parent=None, number=-1, device=0.0):
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), cpu_parent=parent,
        sequence_nr=number, self_cpu_time_total=own, self_device_time_total=device,
        cpu_time_total=end - start, device_type=CPU,
    )  # fmt: skip


def test_events_are_added_up_by_part_and_pass():
    step = event("ProfilerStep#2", 0, 2_000_000, 1.0)
    outer = event(f"{PREFIX}dispatch", 0, 900_000, 100_000, step)
    inner = event(f"{PREFIX}router", 100_000, 500_000, 150_000, outer)
    product = event("aten::mm", 200_000, 450_000, 250_000, inner, number=7, device=70.0)
    sort = event("aten::sort", 600_000, 700_000, 100_000, outer, number=8)
    undo = event("autograd::engine::evaluate_function: MmBackward0", 1e6, 1.4e6, 10_000, step, 7)
    # Its number is one of the forward pass by chance.
    again = event("aten::mm", 1.1e6, 1.3e6, 390_000, undo, 8)
    add = event("autograd::engine::evaluate_function: AccumulateGrad", 1.5e6, 1.6e6, 1e5, step)
    other = event("aten::zero_", 1.7e6, 1.8e6, 50_000, step)
    events = [step, outer, inner, product, sort, undo, again, add, other]
    times = times_of(reversed(events), steps=2, on_gpu=False)
    assert times.step == 1.0
    assert dict(times.forward) == {"router": 0.2, "dispatch": 0.1, "other operators": 0.025}
    assert dict(times.backward) == {"router": 0.2, "gradient sums": 0.05}
    assert times.idle == pytest.approx(1.0 - 0.575)
    assert times_of(events, steps=1, on_gpu=True).forward["router"] == pytest.approx(70e-6)


def test_the_sum_of_ranks_tells_the_extremes():
    ranks = [
        Times(1.0, {"experts": 0.2, "router": 0.1}, {"experts": 0.4}),
        Times(1.0, {"experts": 0.1}, {"experts": 0.1}),
    ]
    table = summary(ranks)
    assert list(table["parts"]) == ["experts", "router"]
    experts = table["parts"]["experts"]
    assert experts == pytest.approx({"forward": 0.15, "backward": 0.25, "least": 0.2, "most": 0.6})
    assert table["idle"] == pytest.approx({"mean": 0.55, "least": 0.3, "most": 0.8})


def test_names_cost_nothing_unless_watched():
    @named("part")
    def work(x):
        with region("inner"):
            return x + 1

    with torch_profile(activities=[ProfilerActivity.CPU]) as unwatched:
        assert work(1) == 2
    with watched(), torch_profile(activities=[ProfilerActivity.CPU]) as seen:
        assert work(torch.zeros(1)) == 1
    assert not regions._watched
    assert not [e for e in unwatched.events() if e.name.startswith(PREFIX)]
    names = [e.name for e in seen.events() if e.name.startswith(PREFIX)]
    assert sorted(names) == [f"{PREFIX}inner", f"{PREFIX}part"]


def test_a_run_is_profiled(run_options, tmp_path, capsys):
    steps = WARM_UP + MEASURED + 1
    config = load_config(None, [*run_options, f"--train.steps={steps}", "--train.device=cpu"])
    mesh = Mesh.start("cpu")
    profile = StepProfile(tmp_path / "run", mesh)
    trainer = Trainer.build(config, mesh)
    with profile.running() as after_step:
        assert trainer.fit(profile=after_step)
    table = json.loads((tmp_path / "run/profile/profile.json").read_text())
    parts = table["parts"]
    expected = {"router", "dispatch", "experts", "attention", "dense FFN", "vocabulary", "norms"}
    assert parts.keys() >= expected | {"optimizer", "data", "gradient sums"}
    for name in expected:
        assert parts[name]["forward"] > 0, name
        assert parts[name]["backward"] > 0, name
    assert parts["optimizer"]["backward"] == 0
    total = sum(part["most"] for part in parts.values()) + table["idle"]["most"]
    assert total == pytest.approx(table["step"], rel=0.02)
    # Nothing big is left unnamed.
    assert parts["other operators"]["most"] < 0.25 * table["step"]
    with gzip.open(tmp_path / "run/profile/trace.json.gz") as file:
        names = {e.get("name") for e in json.load(file)["traceEvents"]}
    assert f"{PREFIX}experts" in names
    assert "milliseconds of each part" in capsys.readouterr().err


def test_a_run_too_short_to_profile_says_so(run_options, tmp_path, capsys):
    config = load_config(None, [*run_options, "--train.steps=1", "--train.device=cpu"])
    mesh = Mesh.start("cpu")
    with StepProfile(tmp_path / "run", mesh).running() as after_step:
        Trainer.build(config, mesh).fit(profile=after_step)
    assert "nothing was profiled: that takes 5 steps" in capsys.readouterr().err
