"""Writing and reading the state of a run: atomic folders of safetensors, checked by checksums.

A checkpoint is `step_00001000/` with one `*.safetensors` file per rank (parts of global tensors, so
that any layout can read what any other wrote), `config.toml` (the resolved configuration) and
`state.json` (step, samples consumed, data fingerprint, checksums). Nothing in it is a pickle. Ranks
write into a folder of another name, which rank 0 renames once every file is on disk: a crash leaves
no half checkpoint.

In the background, a save costs training one copy of what the rank writes. A thread does the rest:
it writes and sums outside the interpreter's lock, taking part of one core and the disk from
training, and talks to other ranks through a gloo group of its own, apart from training's.
"""

from __future__ import annotations

import datetime as dt
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaswitch.checkpoint.chunks import Chunk, Place, shard_name, shares, write_chunks
from megaswitch.checkpoint.contents import make_states, model_chunks, optimizer_chunks
from megaswitch.checkpoint.integrity import entry_of
from megaswitch.checkpoint.record import (
    FORMAT,
    TrainState,
    find_checkpoint,
    load_model_tensors,
    read_config,
    read_state,
    state_json,
    tensor_files,
    verify,
)
from megaswitch.checkpoint.retention import (
    BEST,
    PREFIX,
    UNFINISHED,
    checkpoints,
    discard,
    keep_only,
    set_aside,
)
from megaswitch.checkpoint.staging import Staged, Staging
from megaswitch.checkpoint.tensor_files import read_chunks, read_headers
from megaswitch.config import RunConfig, to_toml
from megaswitch.events import write_event
from megaswitch.files import relink, sync, write_durably
from megaswitch.log import UserError, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.weights import Weight

# The door of the package: most who read checkpoints need no more than these.
__all__ = [
    "BEST",
    "FORMAT",
    "CheckpointManager",
    "TrainState",
    "checkpoints",
    "find_checkpoint",
    "load_model_tensors",
    "read_config",
    "read_state",
    "state_json",
    "tensor_files",
    "verify",
]


@dataclass(frozen=True)
class _Asked:
    """How a save was asked for: as the best, when, and how long training waited; None: all of it.

    Times are of `time.perf_counter`, in seconds.
    """

    best: bool
    began: float
    stall: float | None = None


class CheckpointManager:
    """Saves, finds and restores the checkpoints of one run folder.

    All ranks build it together, and call `save`, `wait` and `restore` together.

    Args:
        run_dir: the run's folder; checkpoints lie in `checkpoints/` under it.
        keep: how many of the newest are kept.
        keep_every: those of steps that it divides are kept as well; None: of none.
        mesh: the ranks of the run.
        tokenizer: file that every checkpoint takes along, so that it can read and write text.
        background: whether `save` returns once the state is copied and leaves the writing to a
            thread. The copy is kept from save to save; ranks share out what several hold.
        timeout: seconds after which a rank that writes in the background gives the others up.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        mesh: Mesh,
        tokenizer: Path | None = None,
        background: bool = False,
        timeout: int = 600,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.keep_every = keep_every
        self.mesh = mesh
        self.tokenizer = tokenizer
        self._places: list[Place] = []
        self._mine: set[str] = set()
        self._under_way: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        if background:
            self._staging = Staging()
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            if mesh.group is not None:
                group = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=timeout))
                self.mesh = replace(mesh, group=group, device=torch.device("cpu"))

    def save(
        self,
        config: RunConfig,
        state: TrainState,
        weights: Mapping[str, Weight],
        optimizer: torch.optim.Optimizer,
        *,
        others: Sequence[Chunk] = (),
        best: bool = False,
    ) -> Path:
        """Write a checkpoint of the state as it is now; `best` keeps it until a better one comes.

        `others` are parts of tensors besides. It is on disk under its final name when this returns
        or, in the background, when `wait` does. A save that is still under way is waited for first.

        Raises:
            UserError: it, or the one before it, could not be written (a full disk, say). Earlier
                checkpoints are intact.
        """
        began = time.perf_counter()
        self.wait()
        final = self.folder / f"{PREFIX}{state.step:08d}"
        held = [*model_chunks(weights), *optimizer_chunks(weights, optimizer), *others]
        mine = self._share(held)
        if self._thread:
            staged = self._staging.copy(mine)
            stall = time.perf_counter() - began
            self._under_way = self._thread.submit(
                self._complete, final, config, state, staged, _Asked(best, began, stall)
            )
        else:
            self._complete(final, config, state, Staged(mine), _Asked(best, began))
        return final

    def wait(self) -> None:
        """Wait for the save that is under way, if one is; to be called before the process ends.

        Raises:
            UserError: on every rank, if it failed on one.
        """
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()

    def restore(
        self,
        path: Path,
        weights: Mapping[str, Weight],
        optimizer: torch.optim.Optimizer,
        *,
        others: Sequence[Chunk] = (),
        verified: bool = False,
    ) -> TrainState:
        """Load a checkpoint into `weights` and `optimizer`, whatever layout wrote it.

        Args:
            path: the checkpoint.
            weights: of this rank.
            optimizer: over their blocks.
            others: filled too, unless one of them is not there.
            verified: whether its checksums were compared just now.

        Raises:
            UserError: on every rank, if it is damaged or of another model or optimizer.
        """
        self.wait()
        if not verified and (damage := self._damage(path)):
            raise UserError(damage)
        state = TrainState(**read_state(path)["state"])
        with self.mesh.together():
            stored = read_headers(tensor_files(path))
            read_chunks(path, stored, model_chunks(weights))
            if state.step:  # before the first step there is nothing to remember
                states = make_states(weights, optimizer, path, stored)
                read_chunks(path, stored, states)
            if lacking := [chunk.name for chunk in others if chunk.name not in stored]:
                info(f"{path} lacks {lacking[0]} and {len(lacking) - 1} more; they start anew")
            else:
                read_chunks(path, stored, others)
        return state

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose checksums are right, or None if there are none at all.

        Damaged ones that are newer are told and set aside under another name, so that none is
        chosen again and none counts among those to keep.

        Raises:
            UserError: on every rank, if there are some and none is intact.
        """
        self.wait()
        found = self.mesh.gather([path.name for path in checkpoints(self.folder)])[0]
        damaged: dict[Path, str] = {}
        for path in (self.folder / name for name in reversed(found)):
            damage = self._damage(path)
            if damage is None:
                if self.mesh.rank == 0:
                    for other, reason in damaged.items():
                        set_aside(other, reason)
                return path
            damaged[path] = damage
        if damaged:
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {self.folder} is intact, so the run "
                "cannot go on; restore one from a copy, or choose another train.run_dir to start "
                "anew:\n" + "\n".join(f"  - {reason}" for reason in damaged.values())
            )
        return None

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, on every rank alike; they share out its files."""
        damage = None
        try:
            names = sorted(read_state(path)["files"])
            verify(path, names[self.mesh.rank :: self.mesh.size])
        except (UserError, OSError) as error:
            damage = str(error)
        found = dict.fromkeys(reason for reason in self.mesh.gather(damage) if reason)
        return "\n".join(found) or None

    def _share(self, chunks: list[Chunk]) -> list[Chunk]:
        """Those of the chunks that this rank is to write."""
        places = [chunk.place for chunk in chunks]
        # Sharing out takes a message from everyone to everyone, and layouts rarely change.
        if not all(self.mesh.gather(places == self._places)):
            self._mine = shares(self.mesh.gather(places))[self.mesh.rank]
            self._places = places
        return [chunk for chunk in chunks if chunk.name in self._mine]

    def _complete(
        self,
        final: Path,
        config: RunConfig,
        state: TrainState,
        staged: Staged,
        asked: _Asked,
    ) -> None:
        """Write a checkpoint, all ranks together."""
        aside = final.with_name(final.name + UNFINISHED)
        with self._together(aside):
            self._start(aside)
        mine: dict[str, Any] = {}
        with self._together(aside):
            staged.wait()
            mine = self._write(aside, staged.chunks)
        sums = {name: entry for part in self.mesh.gather(mine) for name, entry in part.items()}
        with self._together(aside):
            self._finish(aside, final, config, state, sums)
        if self.mesh.rank == 0:
            if asked.best:
                relink(self.folder / BEST, final.name)
            keep_only(self.folder, self.keep, self.keep_every)
            seconds = time.perf_counter() - asked.began
            write_event(
                self.folder.parent, "checkpoint", state.step, best=asked.best,
                bytes=sum(entry["bytes"] for entry in sums.values()), seconds=round(seconds, 4),
                stall_seconds=round(seconds if asked.stall is None else asked.stall, 4),
            )  # fmt: skip

    @contextmanager
    def _together(self, aside: Path) -> Iterator[None]:
        """If the body fails on any rank, clean up and fail on all."""
        try:
            with self.mesh.together():
                try:
                    yield
                except (OSError, RuntimeError) as error:
                    name = aside.name.removesuffix(UNFINISHED)
                    raise UserError(
                        f"checkpoint {name} could not be written to {aside.parent}: "
                        f"{error}. Earlier checkpoints are intact; "
                        "free space or choose another train.run_dir, and start the same command "
                        "again"
                    ) from error
        except UserError:
            if self.mesh.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _start(self, aside: Path) -> None:
        if self.mesh.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(stale, ignore_errors=True)
            aside.mkdir()

    def _write(self, aside: Path, chunks: list[Chunk]) -> dict[str, Any]:
        """This rank's file; returns its size and checksum by its name."""
        if not chunks:
            return {}
        name = shard_name(self.mesh.rank, self.mesh.size)
        return {name: write_chunks(aside / name, chunks)}

    def _finish(
        self,
        aside: Path,
        final: Path,
        config: RunConfig,
        state: TrainState,
        sums: dict[str, dict[str, Any]],
    ) -> None:
        if self.mesh.rank != 0:
            return
        if self.tokenizer:
            shutil.copyfile(self.tokenizer, aside / "tokenizer.model")
            sync(aside / "tokenizer.model")
        write_durably(aside / "config.toml", to_toml(config))
        files = sums | {p.name: entry_of(p) for p in aside.iterdir() if p.name not in sums}
        write_durably(aside / "state.json", state_json(state, files))
        sync(aside)
        if final.exists():  # the same step, saved before a resume from an older one
            discard(final)
        aside.rename(final)
        sync(self.folder)
