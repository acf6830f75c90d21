"""Which process of how many this is, as torchrun or SLURM's srun tells in the environment.

A task of srun gets the variables that torchrun would have set, so that everything behind this
module knows torchrun's alone. A process that torchrun started within a task of srun keeps its own.
"""

from __future__ import annotations

import os
import re

from megaswitch.log import UserError

_PORTS = range(20_000, 30_000)  # below those that systems hand out themselves


def world_size() -> int:
    """Ranks of this launch; 1 for a process started alone. Needs no group.

    Raises:
        UserError: the environment is half set, or ranks lie in an order that we would misread.
    """
    if "WORLD_SIZE" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        os.environ.update(_variables_of_srun())
    size = number("WORLD_SIZE", 1)
    if size > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={size} but {' and '.join(missing)} not set; start with torchrun "
                f"--nproc-per-node {size}, or unset WORLD_SIZE for a single process"
            )
    return size


def number(name: str, default: int) -> int:
    """A variable of the launcher.

    Raises:
        UserError: it is no number.
    """
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value!r} must be a number; start with torchrun, which sets it")
    return int(value)


def own_gpu(devices: int) -> int:
    """Which of the GPUs that this process sees is its own; perhaps one too many.

    With one GPU per task SLURM shows each task no other.
    """
    if devices == 1 and os.environ.get("SLURM_GPUS_PER_TASK"):
        return 0
    return number("LOCAL_RANK", 0)


def _variables_of_srun() -> dict[str, str]:
    """What torchrun would have set in this task of an srun step.

    Tasks meet at the first task's node, at a port made of the numbers of job and step; MASTER_ADDR
    and MASTER_PORT win where they are set.
    """
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    missing = [n for n in (*names, "SLURM_STEP_NODELIST") if not os.environ.get(n)]
    if missing:
        raise UserError(
            f"srun started several tasks but did not set {', '.join(missing)}; let each node start "
            "torchrun once (srun --ntasks-per-node=1 torchrun …), which joins them"
        )
    tasks, rank, local_rank, node = (number(name, 0) for name in names)
    first = sum(_tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[:node])
    if rank != first + local_rank:
        raise UserError(
            f"task {rank} is number {local_rank} on node {node}, whose tasks should begin with "
            f"{first}: neighbouring ranks must share nodes; start with srun --distribution=block"
        )
    job, step = number("SLURM_JOB_ID", 0), number("SLURM_STEP_ID", 0)
    port = _PORTS[(job * 31 + step) % len(_PORTS)]
    return {
        "WORLD_SIZE": str(tasks),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR")
        or first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes, such as `gpu[007-012,20],login1` or `rack[1-2]n[3-8]`."""
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if host is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no node; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", host[0])


def _tasks_per_node(counts: str) -> list[int]:
    """Of each node, from SLURM's short form such as `4(x2),3`."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]
