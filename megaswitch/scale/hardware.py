"""What a plan knows of a machine: files of figures with their sources, in `hardware/`."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megaswitch.log import UserError
from megaswitch.scale.recorder import Work


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU and how many of them are wired. The files say the units.

    `device` says whose kernels run, "cpu" or "cuda". A machine without GPUs has ranks instead.
    """

    name: str
    sources: list[str]
    device: str
    memory: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    node_gpus: int
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    dollars_per_hour: float
    matmul_efficiency: float
    link_efficiency: float
    hours_between_failures: float
    operation_seconds: float
    collective_seconds: float
    disk_bandwidth: float

    def flops(self, *, bf16: bool) -> float:
        """Per second, at most."""
        return self.bf16_flops if bf16 else self.fp32_flops

    def seconds_of(self, work: Work, *, bf16: bool) -> float:
        """Products at their rate, then everything else at the memory's, and the start of each."""
        return (
            work.flops / (self.flops(bf16=bf16) * self.matmul_efficiency)
            + work.moved / self.memory_bandwidth
            + work.operations * self.operation_seconds
        )

    def seconds_to_send(
        self, operation: str, size: float, *, calls: float, ranks: int, stride: int
    ) -> float:
        """Of collectives between ranks that stand `stride` apart, over the slowest link of all.

        Args:
            operation: such as "all_reduce".
            size: bytes of all calls, as `parallel/README.md` counts them.
            calls: how many.
            ranks: of the group.
            stride: from one to the next; neighbours share nodes.
        """
        if ranks == 1:
            return 0.0
        inside = stride * ranks <= self.node_gpus
        speed = self.node_bandwidth if inside else self.network_bandwidth
        share = crossing_share(operation, ranks)
        return calls * self.collective_seconds + size * share / (speed * self.link_efficiency)


def crossing_share(operation: str, ranks: int) -> float:
    """Bytes that leave a rank of a ring, by the operation's as `parallel/README.md` counts."""
    shares = {"send": 1.0, "all_reduce": 2 * (ranks - 1) / ranks}
    return shares.get(operation, (ranks - 1) / ranks)


def known() -> list[str]:
    """Names of the machines that come with the package."""
    folder = resources.files("megaswitch.scale").joinpath("hardware")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith("toml"))


def load_hardware(name: str) -> Hardware:
    """A machine of `known`, or of a file like theirs.

    Raises:
        UserError: there is no such file, or it lacks a figure, or one makes no sense.
    """
    if name in known():
        file = resources.files("megaswitch.scale").joinpath("hardware", f"{name}.toml")
        return _parse(name, file.read_text(encoding="utf-8"))
    try:
        return _parse(name, Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--hardware {name} is neither {', '.join(known())} nor a file that can be read "
            f"({error}); write one like megaswitch/scale/hardware/h100.toml"
        ) from None


def _parse(name: str, text: str) -> Hardware:
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--hardware {name} is not TOML: {error}") from None
    fields = {field.name for field in dataclasses.fields(Hardware)}
    problems = [f"lacks {key}" for key in sorted(fields - table.keys())]
    problems += [f"has {key}, which is not known" for key in sorted(table.keys() - fields)]
    for key in sorted(fields & table.keys() - {"name", "sources", "device"}):
        value = table[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            problems.append(f"has {key}={value!r}, which must be a positive number")
    if table.get("device", "cuda") not in ("cpu", "cuda"):
        problems.append(f"has device={table['device']!r}, which must be 'cuda' or 'cpu'")
    if problems:
        raise UserError(f"--hardware {name} " + "; it ".join(problems))
    return Hardware(**table)
