"""The ranks of a run: who we are, which device is ours, and what ranks say to each other.

Started by torchrun, ranks form one data-parallel group (NCCL on GPUs, gloo on CPUs). A process
started alone forms no group at all and every operation here costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megaswitch.log import UserError


def world_size() -> int:
    """Ranks of this launch, from torchrun's environment; 1 without it. Needs no group.

    Raises:
        UserError: the environment is half set, or of a launcher that we would misread.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in os.environ and tasks != "1":
        raise UserError(
            f"srun started {tasks} tasks, each of which would train alone; let each node start "
            "torchrun once (srun --ntasks-per-node=1 torchrun …), which joins them"
        )
    size = _environment("WORLD_SIZE", 1)
    if size > 1:
        missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={size} but {' and '.join(missing)} not set; start with torchrun "
                f"--nproc-per-node {size}, or unset WORLD_SIZE for a single process"
            )
    return size


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value!r} must be a number; start with torchrun, which sets it")
    return int(value)


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks.

    Attributes:
        rank: from 0.
        size: number of ranks; all of them are data-parallel.
        device: where this rank computes.
        group: the data-parallel group, or None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @classmethod
    def start(cls, device: str) -> Mesh:
        """Choose the device and join the group.

        Args:
            device: "cpu", "cuda", or "auto" for CUDA where there is one.

        Raises:
            UserError: CUDA was asked for and is not there, or there are more ranks than GPUs.
        """
        size, rank = world_size(), _environment("RANK", 0)
        chosen = _device(device)
        if size == 1:
            return cls(0, 1, chosen, None)
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"rank {rank} of {size} could not join the others: {error}. Start with torchrun, "
                "and check that all nodes reach MASTER_ADDR:MASTER_PORT"
            ) from error
        mesh = init_device_mesh(chosen.type, (size,), mesh_dim_names=("dp",))
        return cls(rank, size, chosen, mesh.get_group("dp"))

    def stop(self) -> None:
        """Leave the group, all ranks together; not for a rank that failed, which just exits.

        Without the barrier, a rank that still works may lose its peers' connections, and gloo then
        ends it with an abort.
        """
        if self.group is not None:
            dist.barrier(group=self.group)
            dist.destroy_process_group()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks fail if one fails inside, so that none waits for it in a collective.

        Raises:
            UserError: with the messages of the ranks that failed.
        """
        error: Exception | None = None
        try:
            yield
        except (UserError, OSError) as caught:
            error = caught
        messages = [m for m in self.gather(None if error is None else str(error)) if m]
        if messages:
            raise UserError("\n".join(dict.fromkeys(messages))) from error


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"device {name!r} needs a CUDA device and this machine offers none; use 'cpu' or "
            "'auto', or install a CUDA build of torch"
        )
    local_rank, devices = _environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this machine has {devices}; start "
            f"torchrun with --nproc-per-node {devices}, or use device 'cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
