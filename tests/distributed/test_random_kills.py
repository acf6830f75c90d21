"""Whatever dies, and whenever: the run goes on as if nothing had happened.

Prints a table of what was done to the run and from where it went on.
"""

import multiprocessing as mp
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaswitch.checkpoint.manager import checkpoints, find_checkpoint
from megaswitch.data import blocks, spool
from megaswitch.data.preprocess import preprocess
from megaswitch.events import read_events
from tests.distributed.chaos import (
    Injection,
    Ranks,
    losses,
    newest,
    record_samples,
    samples_by_step,
    small_disk,
    unreadable,
    wait_until,
)

RANKS = 2
INTERVAL = 3


@dataclass
class Run:
    """A run that is being killed.

    Attributes:
        options: its configuration.
        folder: for all that the test writes.
        texts: where there are texts and a tokenizer.
        chance: decides who dies when.
    """

    options: list[str]
    folder: Path
    texts: Path
    chance: random.Random
    starts: int = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, *injections: Injection) -> Ranks:
        self.starts += 1
        own = [f"--train.run_dir={self.run_dir}"]
        log = self.folder / f"start{self.starts}"
        return Ranks([*self.options, *own], RANKS, log, _together(injections))

    def under_way(self, *injections: Injection) -> Ranks:
        """Start, and wait for a random moment after the next checkpoint."""
        before = newest(self.run_dir)
        ranks = self.start(*injections)
        wait_until(lambda: newest(self.run_dir) > before, ranks)
        time.sleep(self.chance.uniform(0.0, 0.15))
        return ranks


def _together(injections: tuple[Injection, ...]) -> Injection:
    def inject(rank: int) -> None:
        for one in injections:
            one(rank)

    return inject


def one_rank(run: Run, samples: Injection) -> str:
    ranks = run.under_way(samples)
    victim = run.chance.randrange(RANKS)
    ranks.send(signal.SIGKILL, victim)
    began = time.monotonic()
    codes = ranks.wait(40)
    assert sorted(codes) == [-signal.SIGKILL, 1], ranks.words()
    assert "error: the job ends: " in ranks.words()
    return f"rank {victim} gone, all ended {time.monotonic() - began:.1f} s later"


def all_ranks(run: Run, samples: Injection) -> str:
    ranks = run.under_way(samples)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    return "all ranks gone"


def during_a_checkpoint(run: Run, samples: Injection) -> str:
    ranks = run.under_way(samples)
    folder = run.run_dir / "checkpoints"
    wait_until(lambda: any(folder.glob("*.unfinished")), ranks)
    time.sleep(run.chance.uniform(0.0, 0.003))
    ranks.send(signal.SIGKILL)
    ranks.wait()
    left = [path.name for path in folder.glob("*.unfinished")]
    return f"all gone while writing; left behind: {', '.join(left) or 'nothing'}"


def full_disk(run: Run, samples: Injection) -> str:
    if not newest(run.run_dir):
        all_ranks(run, samples)
    files = find_checkpoint(run.run_dir).glob("*.safetensors")
    limit = min(path.stat().st_size for path in files) // 2
    before = newest(run.run_dir)
    ranks = run.start(samples, small_disk(limit))
    assert ranks.wait() == [2] * RANKS, ranks.words()
    assert "could not be written" in ranks.words()
    assert "Earlier checkpoints are intact" in ranks.words()
    assert newest(run.run_dir) == before
    assert not list((run.run_dir / "checkpoints").glob("*.unfinished"))
    return f"files of at most {limit:,} bytes: refused in words"


def cut_afterwards(run: Run, samples: Injection) -> str:
    ranks = run.under_way(samples)
    wait_until(lambda: len(checkpoints(run.run_dir / "checkpoints")) > 1, ranks)
    ranks.send(signal.SIGKILL)
    ranks.wait()
    path = checkpoints(run.run_dir / "checkpoints")[-1]
    victim = run.chance.choice(sorted(p for p in path.iterdir() if p.stat().st_size))
    size = run.chance.randrange(victim.stat().st_size)
    with victim.open("r+b") as file:
        file.truncate(size)
    before = newest(run.run_dir)
    ranks = run.start(samples)
    # state.json cut: it does not look like a checkpoint's any more; the rest is told by its sums.
    wait_until(lambda: "resuming from" in ranks.words(), ranks)
    words = ranks.words()
    assert f"step_{before:08d}.damaged, and the checkpoint before it is used" in words, words
    time.sleep(run.chance.uniform(0.0, 0.1))
    ranks.send(signal.SIGKILL)
    ranks.wait()
    return f"{path.name}/{victim.name} cut to {size:,} bytes: set aside"


def during_preprocessing(run: Run, samples: Injection) -> str:
    """Of other data than the run's, which is long there."""
    folder = run.folder / f"texts{run.starts}"
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_bytes((run.texts / "texts.jsonl").read_bytes() * 5)
    kills, duration = 0, 0.0
    for name in ("whole", "killed"):
        spool_folder = folder / f"{name}.spool"
        while not (folder / f"{name}.idx").exists():
            process = mp.get_context("fork").Process(
                target=_preprocess, args=(folder, name, run.texts / "spm.model")
            )
            process.start()
            while process.is_alive() and not spool_folder.exists():
                time.sleep(0.001)
            start = time.monotonic()
            if name == "killed" and kills < 3:
                time.sleep(run.chance.uniform(0.0, duration / 2))
                kills += process.is_alive()
                process.kill()
            process.join()
            duration = duration or time.monotonic() - start
    assert kills
    for suffix in (".bin", ".idx"):
        whole, killed = ((folder / f"{n}{suffix}").read_bytes() for n in ("whole", "killed"))
        assert whole == killed
    shutil.rmtree(folder)
    return f"{kills} kills of `preprocess`: the same bytes"


def _preprocess(folder: Path, name: str, tokenizer: Path) -> None:
    blocks._BLOCK_BYTES = 600  # so that there is something to save
    spool._SAVE_SECONDS = 0.0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    preprocess([folder / "texts.jsonl"], folder / name, tokenizer)
    os._exit(0)


KINDS: dict[str, Callable[[Run, Injection], str]] = {
    "one rank": one_rank,
    "all ranks": all_ranks,
    "during a checkpoint": during_a_checkpoint,
    "full disk": full_disk,
    "file cut afterwards": cut_afterwards,
    "during preprocessing": during_preprocessing,
}


@pytest.mark.parametrize(
    ("kills", "steps"), [(6, 90), pytest.param(50, 1500, marks=pytest.mark.long)]
)
def test_kills_of_several_ranks_leave_no_trace(
    run_options, text_run, tmp_path, capsys, kills, steps
):
    options = [*run_options, f"--train.steps={steps}", f"--checkpoint.interval={INTERVAL}"]
    options += ["--train.valid_interval=100000", "--checkpoint.keep=3", "--parallel.ep=2"]
    options += ["--parallel.timeout=20", "--model.dropout=0.1"]
    straight = Ranks(
        [*options, f"--train.run_dir={tmp_path / 'straight'}"],
        RANKS,
        tmp_path / "words",
        record_samples(tmp_path / "words"),
    )
    assert straight.wait(600) == [0] * RANKS, straight.words()
    (tmp_path / "samples").mkdir()
    run = Run(options, tmp_path, text_run, random.Random(0))
    samples = record_samples(tmp_path / "samples")
    kinds = list(KINDS) if kills == len(KINDS) else run.chance.choices(list(KINDS), k=kills)
    rows = []
    for number, kind in enumerate(kinds, 1):
        told = KINDS[kind](run, samples)
        bad = unreadable(run.run_dir)
        rows.append(f"{number:4}  {kind:21} goes on from step {newest(run.run_dir):4}  {told}")
        assert bad == 0, rows[-1]
    last = run.start(samples)
    assert last.wait(600) == [0] * RANKS, last.words()

    assert losses(run.run_dir) == losses(tmp_path / "straight")
    assert len(losses(run.run_dir)) == steps
    found, expected = (samples_by_step(tmp_path / name) for name in ("samples", "words"))
    assert found == expected
    order = [index for indices in found.values() for index in indices]
    assert order == list(range(8 * steps))
    for one, other in zip(
        sorted(find_checkpoint(tmp_path / "straight").glob("*.safetensors")),
        sorted(find_checkpoint(run.run_dir).glob("*.safetensors")),
        strict=True,
    ):
        for name, value in load_file(one).items():
            assert torch.equal(value, load_file(other)[name]), name
    resumed = [event for event in read_events(run.run_dir) if event["event"] == "resumed"]
    restore = max(event["seconds"] for event in resumed)
    with capsys.disabled():
        print(f"\n{kills} kills of a run of {steps} steps on {RANKS} ranks")
        print("\n".join(rows))
        print(
            f"samples lost: 0, repeated: 0; losses and weights equal the undisturbed run's bit for "
            f"bit; damaged checkpoints chosen: 0; slowest restore {restore:.2f} s"
        )
