"""Calibration: the fit finds what the times were made of; a machine's own file is accepted."""

import json
from dataclasses import astuple, replace

import pytest
import torch
from click.testing import CliRunner

from megaswitch.cli import cli
from megaswitch.config import load_config
from megaswitch.parallel.mesh import Mesh
from megaswitch.scale import calibrate as calibration
from megaswitch.scale import stopwatch
from megaswitch.scale.calibrate import Kernels, Sample, fit, fit_collectives, fit_links, group_steps
from megaswitch.scale.hardware import load_hardware
from megaswitch.scale.layout import Layout
from megaswitch.scale.links import Link
from megaswitch.scale.recorder import Work
from megaswitch.scale.rehearsal import rehearse_rank
from megaswitch.scale.simulate import step_seconds
from megaswitch.train.parts import build_parts
from megaswitch.train.placement import row_lengths

# Without dropout, whose draws are made in blocks of so many bytes on a CPU.
SMALL = ("--model.preset=t5-tiny", "--model.num_encoder_layers=1", "--model.num_decoder_layers=1",
         "--model.dropout=0.0", "--data.encoder_length=64", "--data.decoder_length=16",
         "--train.batch_size=8")  # fmt: skip
KERNELS = Kernels(4e10, 2e10, 2e10, 1e-6, 1e10)
WORKS = [Work(1e9, 1e7, 100), Work(1e7, 1e9, 100), Work(1e6, 1e6, 5000), Work(1e9, 1e9, 3000)]


def samples(flop: float, byte: float, operation: float) -> list[Sample]:
    seconds = [w.flops * flop + w.moved * byte + w.operations * operation for w in WORKS]
    return [Sample("step", work, took) for work, took in zip(WORKS, seconds, strict=True)]


def test_the_fit_finds_the_times_that_steps_were_made_of():
    found = fit(samples(5e-11, 2e-10, 1e-5), KERNELS)
    assert found.flops == pytest.approx(5e-11, rel=1e-3)
    assert found.moved == pytest.approx(2e-10, rel=1e-3)
    assert found.operations == pytest.approx(1e-5, rel=1e-3)


def test_no_step_is_faster_than_its_kernels():
    found = fit(samples(1e-12, 2e-10, 1e-5), KERNELS)
    assert found.flops == pytest.approx(1 / KERNELS.fp32_flops)


def test_links_are_a_start_and_a_speed():
    links = [Link("all_reduce", n, float(n), 1e-4 + n * 1e-9) for n in (10**3, 10**5, 10**7)]
    assert fit_links(links) == pytest.approx((1e-4, 1e-9))


def test_collectives_in_training_are_what_a_group_takes_beyond_its_work():
    fitted = Work(5e-11, 2e-10, 1e-5)
    amounts = [(60, 1e6), (30, 1e8), (3, 1e7), (12, 4e6)]
    steps = [
        replace(
            s, seconds=s.seconds + calls * 1e-3 + crossing * 1e-9, calls=calls, crossing=crossing
        )
        for s, (calls, crossing) in zip(samples(*astuple(fitted)), amounts, strict=True)
    ]
    assert fit_collectives(steps, fitted, (1e-4, 1e-10)) == pytest.approx((1e-3, 1e-9), rel=1e-3)
    start, by_byte = fit_collectives(steps, fitted, (1e-4, 3e-9))
    assert by_byte == pytest.approx(3e-9), "never faster than bare"
    assert start < 1e-3
    assert fit_collectives([], fitted, (1e-4, 1e-10)) == (1e-4, 1e-10)


@pytest.mark.parametrize(("ranks", "number"), [(2, 6), (3, 3), (4, 6), (8, 4)])
def test_a_group_of_any_size_has_steps_that_suit_it(ranks, number):
    steps = group_steps(ranks)
    assert len(steps) == number
    for words in steps.values():
        config = load_config(None, (*calibration._TINY, *words), world_size=ranks)
        assert Layout(config, ranks, row_lengths(config), load_hardware("h100")).can_shard()
    assert "tp, few tokens" in group_steps(2), "or what DTensor takes is not known"


@pytest.mark.long
def test_a_group_explains_its_own_steps(tmp_path):
    """Loose, as this machine may be busy: two processes, all steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = calibration.calibrate("cpu", 2, tmp_path)
    torch.set_num_threads(threads)
    assert found.ratios.keys() == {*calibration.STEPS, *group_steps(2)}
    assert all(0.5 < ratio < 2 for ratio in found.ratios.values()), found.ratios
    bare_start, bare_byte = fit_links(found.links)
    assert found.hardware.collective_seconds >= bare_start
    assert found.hardware.node_bandwidth <= 1 / bare_byte


def test_timed_models_stay_as_they_were_drawn(monkeypatch):
    """On random tokens they would diverge, and CPUs take far longer for what comes of it."""
    config, mesh, made = load_config(None, SMALL), Mesh(0, 1, torch.device("cpu"), None), []

    def build(*args, **kwargs):
        made.append(build_parts(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(stopwatch, "build_parts", build)
    stopwatch.step_seconds(config, mesh, 3)
    drawn = build(config, mesh, lengths=row_lengths(config))
    drawn.initialize(config.train.seed)
    for timed, weight in zip(*(parts.parameters() for parts in made), strict=True):
        torch.testing.assert_close(timed, weight, rtol=1e-4, atol=1e-4)


def test_a_machine_file_serves_plan_and_simulate(tmp_path, monkeypatch):
    """Measured with one step instead of all, without a group."""
    one = dict(list(calibration.STEPS.items())[:1])
    monkeypatch.setattr(calibration, "STEPS", one)
    monkeypatch.setattr(calibration, "_PRODUCTS", ((128, 128, 128),))
    monkeypatch.setattr(calibration, "_REPEATS", 1)
    monkeypatch.setattr(calibration, "_DISK", 1 << 20)
    path = tmp_path / "machine.toml"
    words = ["study", "calibrate", "--output", str(path), "--device", "cpu", "--links-of", "h100"]
    threads = torch.get_num_threads()
    result = CliRunner().invoke(cli, [*words, "--json"])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    machine = load_hardware(str(path))
    assert vars(machine) == told["hardware"]
    assert machine.device == "cpu"
    assert machine.node_bandwidth == load_hardware("h100").node_bandwidth
    config = load_config(None, SMALL)
    step = rehearse_rank(config, 1, 0, "cpu")
    (seconds,) = step_seconds(step, config, 1, machine).values()
    assert 1e-4 < seconds < 100


def test_work_counts_what_operations_touch():
    def work(rows: int) -> Work:
        words = (f"--train.micro_batch_size={rows}", f"--train.batch_size={rows}")
        return rehearse_rank(load_config(None, (*SMALL, *words)), 1, 0, "cpu").work

    small, large = work(8), work(16)
    assert large.flops == pytest.approx(2 * small.flops, rel=1e-6)
    assert small.moved < large.moved < 2 * small.moved  # weights do not grow with rows
    # One more block of the loss, which takes some 20, and nothing else.
    assert 0 < large.operations - small.operations < 30
    assert work(24).operations - large.operations == large.operations - small.operations
