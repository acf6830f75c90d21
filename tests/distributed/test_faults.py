"""What goes wrong inside a rank is noticed, named and handled as documented, within its time."""

import json
import math
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from megaswitch.checkpoint.manager import CheckpointManager, checkpoints
from megaswitch.events import read_events
from megaswitch.parallel import clocks
from megaswitch.train.runner import Runner
from megaswitch.train.trainer import Trainer
from tests.distributed.chaos import Ranks, losses, newest, wait_until

TIMEOUT = 6  # seconds without progress that mean trouble
ANSWERS = 15.0  # seconds that ranks then have to tell and to end, on a busy machine


@pytest.fixture
def start(run_options, tmp_path):
    """Starts ranks in `tmp_path / name`; the last validation is the only one."""

    def start(size, inject=None, *more, name="run"):
        options = [*run_options, "--train.valid_interval=100000", "--train.steps=20"]
        options += ["--checkpoint.interval=5", "--train.micro_batch_size=2", "--model.dropout=0.1"]
        options += [f"--train.run_dir={tmp_path / name}", *more]
        return Ranks(options, size, tmp_path / f"{name}.words", inject)

    return start


def events(run_dir: Path, *kinds: str) -> list[dict]:
    return [event for event in read_events(run_dir) if event["event"] in kinds]


def spoil(samples: set[int], value: float, culprit: int = 0):
    """A rank that reads one of these samples gets a NaN gradient, or a huge term of its loss."""

    def inject(rank):
        plain = Runner.backward

        def backward(self, micro, whole, record):
            read = {int(i) for one in micro for i in one.batch.sample_index}
            if not read & samples or rank != culprit:
                return plain(self, micro, whole, record)
            if not math.isnan(value):
                return plain(self, micro, whole, record) + value
            weight = next(iter(self.parts.weights.values())).parameter
            hook = weight.register_hook(lambda gradient: gradient * value)
            loss = plain(self, micro, whole, record)
            hook.remove()
            return loss

        Runner.backward = backward

    return inject


def test_a_step_that_is_not_finite_is_left_out(start, tmp_path):
    ranks = start(2, spoil({48}, float("nan")), "--fault.skip=2")
    assert ranks.wait() == [0, 0], ranks.words()
    (event,) = events(tmp_path / "run", "skipped")
    assert (event["step"], event["row"], event["left_out"]) == (7, 1, 8)
    assert "the gradient norm nan at step 7; both must be finite" in ranks.words()
    found = losses(tmp_path / "run")
    assert sorted(found) == [step for step in range(1, 21) if step != 7]
    state = json.loads((checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert (state["state"]["bad_steps"], state["state"]["samples"]) == (1, 160)
    # The step changed nothing: up to it the run is the undisturbed one.
    assert start(2, None, "--train.steps=6", name="calm").wait() == [0, 0]
    assert {s: found[s] for s in range(1, 7)} == losses(tmp_path / "calm")


def test_bad_steps_in_a_row_lead_back_and_past_their_data(start, tmp_path):
    spoilt = set(range(56, 72))  # of steps 8 and 9
    ranks = start(2, spoil(spoilt, float("nan"), 1), "--fault.skip=1", "--fault.rewinds=1")
    assert ranks.wait() == [0, 0], ranks.words()
    run = tmp_path / "run"
    (event,) = events(run, "rewound")
    assert event["step"] == 5
    assert event["from_step"] == 9
    assert event["samples"] == 72
    assert event["left_out"] == 72 - 40
    assert "step_00000005, passing over 32 samples since then (rewind 1 of at most 1)" in (
        ranks.words()
    )
    assert sorted(losses(run)) == list(range(1, 21))
    state = json.loads((checkpoints(run / "checkpoints")[-1] / "state.json").read_text())["state"]
    assert (state["step"], state["samples"], state["rewinds"]) == (20, 20 * 8 + 32, 1)


def test_what_is_not_allowed_ends_the_run(start, tmp_path):
    ranks = start(2, spoil({48}, float("nan")))
    assert ranks.wait() == [2, 2]
    assert "The weights were not updated" in ranks.words()
    assert newest(tmp_path / "run") == 5


def test_a_spike_is_reported_or_left_out(start, tmp_path):
    options = ["--fault.spike=20", "--fault.spike_window=8"]
    ranks = start(2, spoil({120}, 50.0), *options, name="told")
    assert ranks.wait() == [0, 0], ranks.words()
    (event,) = events(tmp_path / "told", "spike")
    assert event["step"] == 16
    assert "so it is a spike" in event["why"]
    assert len(losses(tmp_path / "told")) == 20
    options += ["--fault.spike_action=bad", "--fault.skip=1"]
    ranks = start(2, spoil({120}, 50.0), *options, name="left")
    assert ranks.wait() == [0, 0], ranks.words()
    (event,) = events(tmp_path / "left", "skipped")
    assert event["step"] == 16
    assert 16 not in losses(tmp_path / "left")


def flip(culprit: int, at: int):
    """One bit of a weight of one rank changes after a step, once."""

    def inject(rank):
        plain = Trainer.step
        flipped = []

        def step(self, rate, meters, stop):
            done = plain(self, rate, meters, stop)
            if rank == culprit and self.state.step == at and not flipped:
                flipped.append(1)
                weight = self.parts.weights["decoder.layers.0.ffn.wo.weight"].local
                with torch.no_grad():
                    weight.view(torch.int32)[1, 2] ^= 1 << 7
            return done

        Trainer.step = step

    return inject


def test_a_flipped_bit_is_found_named_and_undone(start, tmp_path):
    options = ["--fault.replica_interval=4", "--parallel.ep=2"]
    assert start(4, None, *options, name="calm").wait() == [0] * 4
    assert not events(tmp_path / "calm", "rewound")
    ranks = start(4, flip(2, at=11), *options, "--fault.rewinds=1")
    assert ranks.wait() == [0] * 4, ranks.words()
    (event,) = events(tmp_path / "run", "rewound")
    assert event["from_step"] == 12
    assert event["step"] == 10
    assert event["left_out"] == 0
    assert "rank 2 holds other bits of decoder.layers.0.ffn.wo.weight than ranks 0-1, 3" in (
        ranks.words()
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "calm")


def test_a_flipped_bit_enters_no_checkpoint(start, tmp_path):
    ranks = start(2, flip(1, at=10), "--fault.replica_interval=1000")
    assert ranks.wait() == [2, 2], ranks.words()
    assert "ranks 0-1 hold different bits of decoder.layers.0.ffn.wo.weight" in ranks.words()
    assert newest(tmp_path / "run") == 5


def test_a_rank_that_sleeps_is_named_and_leaves_a_record(start, tmp_path):
    def inject(rank):
        plain = Runner.backward

        def backward(self, micro, whole, record):
            while rank == 1 and micro[0].batch.sample_index.min() >= 40:
                time.sleep(1)
            return plain(self, micro, whole, record)

        Runner.backward = backward

    ranks = start(2, inject, f"--parallel.timeout={TIMEOUT}")
    run = tmp_path / "run"
    wait_until(lambda: newest(run) == 5, ranks)
    began = time.monotonic()
    assert ranks.wait() == [1, 1]
    assert time.monotonic() - began < TIMEOUT + ANSWERS
    (message,) = re.findall("^error: the job ends: (.*)$", ranks.words(), re.MULTILINE)
    assert "rank 1 is in Trainer.step" in message  # which called what sleeps
    assert re.search(r"rank 0 waits in all_reduce over (dp|world) at step 6", message)
    assert f"Stacks and collectives of each rank: {run / 'flight'}" in message
    records = [json.loads((run / "flight" / f"rank_0000{r}.json").read_text()) for r in (0, 1)]
    assert [record["kind"] for record in records] == ["collective", "code"]
    assert any("backward" in line for line in records[1]["threads"][_main(records[1])])
    last = records[0]["collectives"]["last"][-1]
    assert last["profiling_name"] == "gloo:all_reduce"
    (event,) = events(run, "ended by the watchdog")
    assert event["story"] in message


def _main(record: dict) -> str:
    return next(name for name in record["threads"] if name.startswith("MainThread"))


def test_a_wrong_clock_is_named(start, tmp_path):
    class Clock:
        @staticmethod
        def time():
            return time.time() + 30.0

    def inject(rank):
        if rank == 3:
            clocks.time = Clock

    ranks = start(4, inject, "--train.steps=1")
    assert ranks.wait() == [0] * 4, ranks.words()
    assert re.search(r"clocks differ from the median of all: rank 3 by \+(30|29)\.", ranks.words())
    (event,) = events(tmp_path / "run", "clock skew")
    assert list(event["seconds_by_rank"]) == ["3"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_followed_by_a_checkpoint(start, tmp_path, number):
    ranks = start(2, None, "--train.steps=100000", "--checkpoint.interval=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, ranks)
    ranks.send(number, 1)  # one rank is enough
    assert ranks.wait(30) == [130, 130], ranks.words()
    assert newest(tmp_path / "run") >= 3


def test_a_run_that_cannot_save_in_time_ends_without(start, tmp_path):
    def inject(rank):
        CheckpointManager.wait = lambda self: time.sleep(60)

    more = ["--fault.stop_seconds=1", "--train.steps=100000", "--checkpoint.interval=100000"]
    ranks = start(2, inject, *more)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, ranks)
    began = time.monotonic()
    ranks.send(signal.SIGTERM)
    assert set(ranks.wait(30)) == {1}
    assert time.monotonic() - began < 10
    assert "no checkpoint within fault.stop_seconds=1 of the signal" in ranks.words()


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2, 1), (2, 4)])
def test_a_run_goes_on_with_half_and_with_double_the_ranks(start, tmp_path, sizes):
    from tests.distributed.chaos import record_samples, samples_by_step

    calm = start(2, record_samples(tmp_path), name="calm")
    assert calm.wait() == [0, 0], calm.words()
    expected = samples_by_step(tmp_path)
    for path in tmp_path.glob("samples-*"):
        path.unlink()
    ranks = start(sizes[0], record_samples(tmp_path))
    wait_until(lambda: newest(tmp_path / "run") >= 5, ranks)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    ranks = start(sizes[1], record_samples(tmp_path))
    assert ranks.wait() == [0] * sizes[1], ranks.words()
    assert samples_by_step(tmp_path) == expected
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "calm"), rel=1e-5)
