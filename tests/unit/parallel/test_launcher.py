import os
import subprocess
import sys

import pytest

from megaswitch.log import UserError
from megaswitch.parallel.launcher import first_host, own_gpu, world_size

# Task 3 of five on nodes n8 (three tasks) and n9 (two).
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[8-9]",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launch(monkeypatch):
    """Takes variables and leaves these alone in the environment, which is restored afterwards."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("SLURM_") or name in TORCH:
            del os.environ[name]
    yield os.environ.update
    os.environ.clear()
    os.environ.update(before)


def found() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in TORCH}


def test_a_process_alone_is_a_world(launch):
    assert world_size() == 1
    launch({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    assert world_size() == 1
    assert set(found().values()) == {None}


def test_tasks_of_srun_become_ranks(launch):
    launch(SRUN)
    assert world_size() == 5
    assert world_size() == 5  # what it left behind means the same
    assert found() == {
        "WORLD_SIZE": "5",
        "RANK": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "n8",
        "MASTER_PORT": "21273",
    }


def test_steps_of_a_job_meet_at_different_ports(launch):
    ports = set()
    for step in range(20):
        for name in TORCH:
            os.environ.pop(name, None)
        launch({**SRUN, "SLURM_STEP_ID": str(step)})
        world_size()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 20


def test_what_the_user_set_wins(launch):
    launch({**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    world_size()
    assert found()["MASTER_ADDR"] == "10.0.0.7"
    assert found()["MASTER_PORT"] == "4000"


def test_workers_of_a_torchrun_that_srun_started_keep_their_ranks(launch):
    theirs = {"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}
    launch({**SRUN, **theirs})
    assert world_size() == 16
    assert {name: os.environ[name] for name in theirs} == theirs
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' must be a number"),
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK not set"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "did not set SLURM_PROCID, SLURM_LOCALID"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID='x' must be a number"),
        ({**SRUN, "SLURM_PROCID": "1"}, "task 1 is number 0 on node 1.*--distribution=block"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[["}, "names no node; set MASTER_ADDR"),
    ],
)
def test_a_launch_that_would_go_wrong_is_refused(launch, environment, message):
    launch(environment)
    with pytest.raises(UserError, match=message):
        world_size()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("gpu[3,7-9]", "gpu3"),
        ("rack[1-2]n[03-08]", "rack1n03"),
        ("c[1-2]-ib0.cluster", "c1-ib0.cluster"),
    ],
)
def test_first_of_a_list_of_nodes(nodes, host):
    assert first_host(nodes) == host


def test_a_task_that_sees_one_gpu_of_its_own_takes_it(launch):
    launch({"LOCAL_RANK": "3"})
    assert own_gpu(8) == own_gpu(1) == 3  # on a machine of one GPU, three too many
    launch({"SLURM_GPUS_PER_TASK": "1"})
    assert own_gpu(1) == 0
    assert own_gpu(8) == 3


MEET = """
import torch
from megaswitch.parallel.mesh import Mesh

mesh = Mesh.start("cpu")
print(mesh.rank, mesh.sum_all_(torch.tensor(1.0 + mesh.rank)).item())
mesh.stop()
"""


def test_ranks_of_srun_meet(launch):
    tasks = []
    for rank in range(2):
        own = {
            **SRUN,
            "SLURM_JOB_ID": str(os.getpid()),  # a port that other runs of the tests do not take
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
        command = [sys.executable, "-c", MEET]
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
        tasks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    assert [task.communicate(timeout=120)[0] for task in tasks] == ["0 3.0\n", "1 3.0\n"]
