"""A rank that dies, hangs or fails ends all ranks, with one message that names it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# One rank misbehaves in step 3 and the others wait for it in a sum. Like the trainer, ranks do not
# die of the SIGTERM that torchrun sends when one of them has ended.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from megaswitch.config import ParallelConfig
from megaswitch.log import UserError
from megaswitch.parallel.collectives import terms_to_whole
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.watchdog import watch

kind, culprit, timeout, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
# On a busy machine processes start far apart; ranks have longer to meet than to answer.
mesh = Mesh.start("cpu", ParallelConfig(timeout=60, tp=2))
signal.signal(signal.SIGTERM, lambda *arguments: None)
(folder / str(mesh.rank)).write_text(str(os.getpid()))

def misbehave():
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    while kind == "sleeps":
        time.sleep(1)
    while kind == "loops":
        pass
    if kind == "fails":
        raise KeyError("a mistake")
    if kind == "is slow":
        time.sleep(timeout / 2)

with watch(mesh, timeout) as watchdog:
    for step in range(1, 6):
        watchdog.at(step, "forward", limited=kind != "is slow")
        if step == 3 and mesh.rank == culprit:
            misbehave()
        if step == 3 and kind == "is refused":
            raise UserError("a value; a rule; a remedy")
        x = torch.ones(2, requires_grad=True)
        y = terms_to_whole(x, mesh.axis("dp"))
        terms_to_whole(y, mesh.axis("tp")).sum().backward()
mesh.stop()
"""


TIMEOUT = 8


def command(folder: Path, kind: str, culprit: int) -> list[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [str(script), kind, str(culprit), str(TIMEOUT), str(folder)]


def launch(folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    """Run the script in four processes; fails if it lasts, or leaves one behind."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*torchrun, "--nproc-per-node=4", *command(folder, kind, culprit=2)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,  # of which starting four processes takes most
        check=False,
    )
    pids = [(folder / str(rank)).read_text() for rank in range(4)]
    assert not any(Path("/proc", pid).exists() for pid in pids)
    return process


def messages(stderr: str) -> list[str]:
    return re.findall("^error: the job ends: (.*)$", stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("dies", "does not answer (gone or stopped)"),
        ("sleeps", "is in misbehave (script.py:21) at step 3 (forward)"),
        ("loops", "is in misbehave (script.py:22) at step 3 (forward)"),
        ("fails", "is in misbehave (script.py:25) at step 3 (forward)"),
    ],
)
def test_one_message_names_the_rank_and_the_collective(tmp_path, kind, where):
    process = launch(tmp_path, kind)
    (message,) = messages(process.stderr)
    assert process.returncode != 0
    assert message.startswith(f"rank 2 {where}; ")
    # Rank 0 waits for rank 2; 1 and 3 are done with each other and wait for 0 and 2.
    assert "rank 0 waits in all_reduce over dp at step 3 (forward)" in message
    assert "ranks 1, 3 wait in all_reduce over tp at step 3 (forward)" in message
    assert re.search(r"\. Rank \d reports: .+$", message)
    assert ("KeyError: 'a mistake'" in process.stderr.split("ChildFailedError")[0]) == (
        kind == "fails"
    )


@pytest.mark.parametrize("kind", ["is slow", "behaves"])
def test_a_healthy_job_hears_nothing(tmp_path, kind):
    process = launch(tmp_path, kind)
    assert process.returncode == 0, process.stderr
    assert messages(process.stderr) == []


def test_a_refusal_by_all_ranks_stays_what_it_is(tmp_path):
    process = launch(tmp_path, "is refused")
    assert process.returncode != 0
    assert messages(process.stderr) == []
    assert "a value; a rule; a remedy" in process.stderr


def test_where_rank_zero_holds_the_store_its_death_is_told_by_each_rank(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "4"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command(tmp_path, "dies", culprit=0)],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    errors = [process.communicate(timeout=90)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [-signal.SIGKILL, 1, 1, 1], errors
    for rank in (1, 2, 3):
        (message,) = messages(errors[rank])
        assert message.startswith("rank 0 or its node is gone, as the store there does not answer")
        assert f"rank {rank} waits in all_reduce over {'dp' if rank == 2 else 'tp'} at" in message
