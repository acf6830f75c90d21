"""Too little memory, said in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megaswitch.config import RunConfig
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.parts import Parts

_EVENTS = 100_000  # allocations that a snapshot remembers


@contextmanager
def enough_memory(remedy: str, *, alone: bool = True) -> Iterator[None]:
    """Turn a failed allocation, on a GPU or the CPU, into an error that ends with `remedy`.

    Args:
        remedy: what the user can do.
        alone: False if other ranks exchange tensors with this one inside. They wait there for a
            rank that has failed and cannot be told, so that the watchdog must end the job.

    Raises:
        UserError: there was not enough memory inside.
        MemoryError: likewise, but not `alone`.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_memory(error):
            raise
        kind = UserError if alone else MemoryError
        raise kind(f"there is not enough memory: {remedy}") from error


def _is_memory(error: RuntimeError) -> bool:
    # A GPU has a class for it, the CPU's allocator only words.
    return isinstance(error, torch.OutOfMemoryError) or "t allocate memory" in str(error)


class TrainingMemory:
    """Explains why a run does not fit, with what a rank held and what would make it less.

    Args:
        config: of the run.
        mesh: the ranks.
        snapshot: folder for the allocations that led there, if they are to be recorded; of CUDA.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, snapshot: Path | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.snapshot = snapshot if mesh.device.type == "cuda" else None
        self._parts: Parts | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def holds(self, parts: Parts, optimizer: torch.optim.Optimizer) -> None:
        """Know what is built."""
        self._parts, self._optimizer = parts, optimizer

    @contextmanager
    def explained(self) -> Iterator[TrainingMemory]:
        """What the run runs in.

        Raises:
            UserError: it did not fit.
            MemoryError: likewise, one of several ranks.
        """
        if self.snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        try:
            yield self
        except RuntimeError as error:
            if not _is_memory(error):
                raise
            kind = UserError if self.mesh.group is None else MemoryError
            raise kind(self._explanation()) from error
        finally:
            if self.snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _explanation(self) -> str:
        where = f"rank {self.mesh.rank}" if self.mesh.group is not None else "this run"
        lines = [f"{where} does not fit into the memory of its {self.mesh.device.type} device."]
        if held := self._held():
            sizes = ", ".join(f"{name} {_gib(size)}" for name, size in held.items())
            lines.append(f"It held {sizes}.")
        lines.append(f"What makes it less, easiest first: {'; '.join(self.remedies())}.")
        lines.append("`megaswitch simulate` and `megaswitch plan` tell the figures beforehand.")
        if self.snapshot:
            self.snapshot.mkdir(parents=True, exist_ok=True)
            path = self.snapshot / f"memory-rank{self.mesh.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            lines.append(f"Allocations, for pytorch.org/memory_viz: {path}")
        elif self.mesh.device.type == "cuda":
            lines.append("`megaswitch train --profile` records which allocations led there.")
        return " ".join(lines)

    def _held(self) -> dict[str, int]:
        """Bytes by kind, as far as they are known."""
        if self._parts is None or self._optimizer is None:
            return {}
        weights = [w.local for w in self._parts.weights.values()]
        states = (s for state in self._optimizer.state.values() for s in state.values())
        held = {
            "weights": _bytes(weights),
            "gradients": _bytes(w.grad for w in weights if w.grad is not None),
            "optimizer states": _bytes(s for s in states if isinstance(s, Tensor)),
        }
        if self.mesh.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.mesh.device)
            held["activations and buffers up to"] = max(0, peak - sum(held.values()))
            _, total = torch.cuda.mem_get_info(self.mesh.device)
            held["of"] = total
        return held

    def remedies(self) -> list[str]:
        """What would make this run need less, the least costly first."""
        config, found = self.config, []
        train, parallel = config.train, config.parallel
        if not train.activation_checkpointing and train.backend == "torch":
            found.append("train.activation_checkpointing='selective' (recomputes what is cheap)")
        if train.activation_checkpointing is not True:
            found.append("train.activation_checkpointing=true (about a third more work)")
        if (smaller := self._smaller_micro_batch()) is not None:
            found.append(f"train.micro_batch_size={smaller} instead of {train.micro_batch_size}")
        if train.precision == "fp32":
            found.append("train.precision='bf16'")
        if config.optim.name == "adamw":
            found.append("optim.name='adafactor' (states of a few numbers a row)")
        if self.mesh.dp.size > 1 and parallel.zero != "full":
            wanted = "optimizer" if parallel.zero == "none" else "full"
            found.append(f"parallel.zero='{wanted}' over {self.mesh.dp.size} ranks")
        experts = config.model.moe.num_experts
        if experts and parallel.ep < experts:
            found.append(f"more ranks, and parallel.ep={_next_divisor(experts, parallel.ep)}")
        else:
            found.append(f"more ranks, and parallel.tp={2 * parallel.tp}")
        return found

    def _smaller_micro_batch(self) -> int | None:
        """The next size of whole routing groups that divides the present one."""
        rows, moe = self.config.train.micro_batch_size, self.config.model.moe
        group = 1
        if moe.num_experts and moe.capacity_mode != "hf":
            group = max(1, moe.group_size // self.config.data.encoder_length)
        sizes = range(rows // 2, 0, -1)
        return next((n for n in sizes if rows % n == 0 and n % group == 0), None)


def _next_divisor(number: int, after: int) -> int:
    return next(n for n in range(after + 1, number + 1) if number % n == 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
