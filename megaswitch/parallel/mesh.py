"""The ranks of a run: who we are, which device is ours, and what ranks say to each other.

Started by torchrun, ranks form one data-parallel group (NCCL on GPUs, gloo on CPUs). A process
started alone forms no group at all and every operation here costs nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megaswitch.log import UserError


def world_size() -> int:
    """Ranks of this launch, from torchrun's environment; 1 without it. Needs no group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
        size, rank = world_size(), int(os.environ.get("RANK", "0"))
        chosen = _device(device)
        if size == 1:
            return cls(0, 1, chosen, None)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        mesh = init_device_mesh(chosen.type, (size,), mesh_dim_names=("dp",))
        return cls(rank, size, chosen, mesh.get_group("dp"))

    def stop(self) -> None:
        """Leave the group."""
        if self.group is not None:
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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def raise_together(self, error: Exception | None) -> None:
        """Let all ranks fail if one did, so that none waits for it in a collective.

        Raises:
            UserError: with the messages of the ranks that failed.
        """
        messages = [m for m in self.gather(None if error is None else str(error)) if m]
        if messages:
            raise UserError("\n".join(dict.fromkeys(messages))) from error


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"train.device={name!r} needs a CUDA device and this machine offers none; use 'cpu' or "
            "'auto', or install a CUDA build of torch"
        )
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this machine has {devices}; start "
            f"torchrun with --nproc-per-node {devices}, or use train.device='cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
