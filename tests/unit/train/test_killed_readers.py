"""Processes that read a run's samples, killed at any moment: what they got is what one gets."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest

from megaswitch.config import load_config
from megaswitch.data.indexed import IndexedWriter, TokenizerInfo
from megaswitch.train.corpora import build_loader, micro_batches
from tests.conftest import SENTINELS, VOCAB_SIZE
from tests.unit.train.test_mixture_run import Rank, all_of

BATCH = 24
# Data-parallel ranks, micro-batch, threads and access; each start takes another.
LAYOUTS = [
    (1, 24, 4, "mmap"),
    (2, 3, 1, "pread"),
    (3, 4, 2, "mmap"),
    (4, 6, 1, "pread"),
    (8, 1, 2, "mmap"),
    (8, 3, 1, "mmap"),
]


@pytest.fixture
def options(run_options, tmp_path):
    """Three sources of documents of all lengths, packed."""
    info = TokenizerInfo("0" * 64, VOCAB_SIZE, SENTINELS)
    kept = [o for o in run_options if not o.startswith(("--data.", "--train.valid"))]
    for number, name in enumerate(("de", "en", "fr")):
        generator = np.random.default_rng(number)
        with IndexedWriter(tmp_path / name, np.uint16, tokenizer=info) as writer:
            for length in generator.lognormal(3.0, 1.0, 300 * (number + 1)).astype(int) + 2:
                writer.add_document(generator.integers(3, VOCAB_SIZE - SENTINELS, length))
        kept.append(f"--data.train.{name}={tmp_path / name}")
    kept += ["--data.encoder_length=64", "--data.packing=true", "--model.moe.group_size=64"]
    return [*kept, "--data.mixture.exponent=0.3", "--data.mixture.block=40"]


def configured(options, layout, steps):
    dp, micro, _, access = layout
    changes = [f"--train.batch_size={BATCH}", f"--train.micro_batch_size={micro}"]
    changes += [f"--data.access={access}", f"--train.steps={steps}"]
    return load_config(None, [*options, *changes], world_size=dp)


def read(options, layout, rank, samples, steps, path):
    """What a rank's process does until it is killed: write down all that it gets."""
    config = configured(options, layout, steps)
    loader = build_loader(config, "train")
    plan = micro_batches(config, Rank(rank, layout[0]), samples)
    with (
        path.open("wb", buffering=0) as file,
        loader.stream(plan, threads=layout[2], ahead=4) as stream,
    ):
        for batch in stream:
            file.write(all_of(batch).numpy().astype("<i8").tobytes())
            time.sleep(0.001)


@pytest.mark.long
def test_killed_readers_leave_no_trace(options, tmp_path):
    start = multiprocessing.get_context("fork").Process
    chance = random.Random(0)
    reference = build_loader(configured(options, LAYOUTS[0], 10), "train")
    width = all_of(reference.batch([0])).shape[1]
    consumed, rounds = 0, 0
    while rounds < 24 or consumed < 50 * BATCH:
        layout = LAYOUTS[rounds % len(LAYOUTS)]
        paths = [tmp_path / f"{rounds}-{rank}" for rank in range(layout[0])]
        total = 100 * (rounds + 1)  # steps of the run: more each time
        processes = [
            start(target=read, args=(options, layout, rank, consumed, total, path))
            for rank, path in enumerate(paths)
        ]
        for process in processes:
            process.start()
        while not all(path.exists() and path.stat().st_size for path in paths):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.2))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
        share = BATCH // layout[0]
        # Rows that all ranks wrote down in full, as steps of the global batch.
        found = [
            np.frombuffer(content[: len(content) // (8 * width) * 8 * width], "<i8")
            for content in (path.read_bytes() for path in paths)
        ]
        steps = min(len(rows) // width // share for rows in found)
        ranks = [rows[: steps * share * width].reshape(steps, share, width) for rows in found]
        rows = np.concatenate(ranks, 1).reshape(-1, width)
        expected = all_of(reference.batch(range(consumed, consumed + len(rows)))).numpy()
        assert np.array_equal(rows, expected), layout
        consumed += len(rows)
        rounds += 1
