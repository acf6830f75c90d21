"""The ranks of a run: who we are, which device is ours, and the groups that ranks form.

Ranks stand in a grid (pp, edp, ep, tp), the last axis varying fastest: tensor-parallel neighbours
are neighbours in the machine. Dense weights are replicated or sharded over dp = edp × ep, experts
over edp alone. An axis of one rank has no group, and every operation over it costs nothing; a
process started alone forms no group at all.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megaswitch.config import ParallelConfig
from megaswitch.log import UserError
from megaswitch.parallel.launcher import number, own_gpu, world_size
from megaswitch.parallel.rendezvous import keep_to_loopback, own_store

# Two grids over the same ranks: one for experts, and one for everything else, to which expert
# parallelism is data parallelism. `replica` and `shard` together are edp: copies of the experts,
# and under ZeRO the ranks of one copy.
_EXPERT_GRID = ("pp", "replica", "shard", "ep", "tp")
_DENSE_GRID = ("pp", "replica", "dense_shard", "tp")
# Axes made of several of the expert grid; the order of their ranks is that of the grid.
FLATTENED = {
    "edp": ("replica", "shard"),
    "dp": ("replica", "shard", "ep"),
    "dense_shard": ("shard", "ep"),
}


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis of the grid that this rank belongs to.

    Attributes:
        name: "pp", "edp", "ep", "tp", "dp", "world" or a part of these.
        rank: this rank's place among them, from 0.
        size: how many they are.
        group: None if there is only one.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks.

    Attributes:
        rank: from 0.
        size: number of ranks.
        device: where this rank computes.
        group: of all ranks, or None for a single process.
        expert_grid: (pp, replica, shard, ep, tp), or None for a single process.
        dense_grid: (pp, replica, dense_shard, tp) of the same ranks.
        axes: by name.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None
    expert_grid: DeviceMesh | None = None
    dense_grid: DeviceMesh | None = None
    axes: dict[str, Axis] = field(default_factory=dict)

    @classmethod
    def start(cls, device: str, parallel: ParallelConfig | None = None) -> Mesh:
        """Choose the device and join the groups.

        Args:
            device: "cpu", "cuda", or "auto" for CUDA where there is one.
            parallel: the layout, already checked against the number of ranks; None: all ranks are
                data-parallel.

        Raises:
            UserError: CUDA was asked for and is not there, or there are more ranks than GPUs.
        """
        parallel = parallel or ParallelConfig()
        size, rank = world_size(), number("RANK", 0)
        chosen = _device(device)
        if size == 1:
            return cls(0, 1, chosen, None)
        gpu = chosen.type == "cuda"
        # NCCL ends a process that waited too long; the watchdog should have told why before.
        timeout = dt.timedelta(seconds=parallel.timeout + (30 if gpu else 0))
        # torch keeps that many collectives in mind for the flight recorder files of the watchdog.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")
        keep_to_loopback()
        try:
            store = own_store(rank, size, timeout)
            where: dict[str, Any] = (
                {} if store is None else {"store": store, "rank": rank, "world_size": size}
            )
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, **where)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"rank {rank} of {size} could not join the others: {error}. Start with torchrun or "
                "srun, and check that all nodes reach MASTER_ADDR:MASTER_PORT"
            ) from error
        return cls.over_ranks(chosen, parallel)

    @classmethod
    def over_ranks(cls, device: torch.device, parallel: ParallelConfig) -> Mesh:
        """Lay the grid over the ranks that have joined already."""
        size, rank = dist.get_world_size(), dist.get_rank()
        edp = size // (parallel.pp * parallel.ep * parallel.tp)
        replicas = parallel.replicas if parallel.zero != "none" else edp
        pp, shards, ep, tp = parallel.pp, edp // replicas, parallel.ep, parallel.tp
        expert = init_device_mesh(
            device.type, (pp, replicas, shards, ep, tp), mesh_dim_names=_EXPERT_GRID
        )
        dense = init_device_mesh(
            device.type, (pp, replicas, shards * ep, tp), mesh_dim_names=_DENSE_GRID
        )
        meshes = {name: expert[name] for name in _EXPERT_GRID}
        meshes["dense_shard"] = dense["dense_shard"]
        meshes["edp"] = expert["replica", "shard"]._flatten("edp")
        meshes["dp"] = dense["replica", "dense_shard"]._flatten("dp")
        axes = {"world": Axis("world", rank, size, dist.group.WORLD)}
        for name, mesh in meshes.items():
            group = mesh.get_group() if mesh.size() > 1 else None
            axes[name] = Axis(name, mesh.get_local_rank(), mesh.size(), group)
        return cls(rank, size, device, dist.group.WORLD, expert, dense, axes)

    def axis(self, name: str) -> Axis:
        """The axis of that name; of one rank in a single process."""
        return self.axes.get(name) or Axis(name)

    @property
    def dp(self) -> Axis:
        """Ranks that read different data."""
        return self.axis("dp")

    @property
    def exchanges(self) -> bool:
        """Whether a model's pass waits for other ranks, which have parts of it."""
        return any(self.axis(name).size > 1 for name in ("pp", "ep", "tp"))

    def stage_group(self) -> dist.ProcessGroup | None:
        """All ranks that have this rank's layers. All ranks of the mesh call this together."""
        if self.axis("pp").size == 1:
            return self.group
        assert self.expert_grid is not None
        stages = self.expert_grid.mesh.flatten(1).tolist()
        groups = [dist.new_group(ranks) for ranks in stages]
        return groups[self.axis("pp").rank]

    def stop(self) -> None:
        """Leave the group, all ranks together; not for a rank that failed, which just exits.

        Without the barrier, a rank that still works may lose its peers' connections, and gloo then
        ends it with an abort.
        """
        if self.group is not None:
            dist.barrier(group=self.group)
            dist.destroy_process_group()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum what ranks counted, in place, and return it.

        Tensor-parallel ranks count the same things, so only the first of them contributes; pipeline
        ranks count different layers.
        """
        if self.axis("tp").rank != 0:
            tensor.zero_()
        return self.sum_all_(tensor)

    def sum_all_(self, tensor: Tensor) -> Tensor:
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
    devices = torch.cuda.device_count()
    local_rank = own_gpu(devices)
    if local_rank >= devices:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this machine has {devices}; start "
            f"torchrun with --nproc-per-node {devices}, or use device 'cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
