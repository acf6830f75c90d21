"""Writing and reading the state of a run: atomic folders of safetensors, checked by SHA-256.

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
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megaswitch.checkpoint.chunks import Chunk, Place, shard_name, shares, write_chunks
from megaswitch.checkpoint.contents import make_states, model_chunks, optimizer_chunks
from megaswitch.checkpoint.integrity import (
    damaged_checkpoint,
    entry_of,
    matches,
    misfits,
    once,
    recorded_sum,
)
from megaswitch.checkpoint.staging import Staged, Staging
from megaswitch.checkpoint.tensor_files import read_chunks, read_headers
from megaswitch.config import RunConfig, from_toml, to_toml
from megaswitch.files import relink, sync, write_durably
from megaswitch.log import UserError, info, warn
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.weights import Weight

FORMAT = 1
_PREFIX = "step_"
_UNFINISHED = ".unfinished"
BEST = "best"  # a link to the best checkpoint, beside it


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With counted randomness this is all there is beside tensors.

    Attributes:
        step: optimizer steps done.
        samples: training sequences consumed; the position in the data.
        fingerprint: of the training data and its order; a resume on other data is refused.
        mixture: of sources, since when each holds: [first sample, quota of each in a block, ...].
        teacher: of a distilled run: fingerprint of what it learns from.
    """

    step: int
    samples: int
    fingerprint: str
    mixture: list[list[int]] = field(default_factory=list)
    teacher: str = ""


class CheckpointManager:
    """Saves, finds and restores the checkpoints of one run folder.

    All ranks build it together, and call `save`, `wait` and `restore` together.

    Args:
        run_dir: the run's folder; checkpoints lie in `checkpoints/` under it.
        keep: how many of the newest are kept.
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
        mesh: Mesh,
        tokenizer: Path | None = None,
        background: bool = False,
        timeout: int = 600,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
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
        self.wait()
        final = self.folder / f"{_PREFIX}{state.step:08d}"
        held = [*model_chunks(weights), *optimizer_chunks(weights, optimizer), *others]
        mine = self._share(held)
        if self._thread:
            staged = self._staging.copy(mine)
            self._under_way = self._thread.submit(
                self._complete, final, config, state, staged, best
            )
        else:
            self._complete(final, config, state, Staged(mine), best)
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
    ) -> TrainState:
        """Load a checkpoint into `weights` and `optimizer`, whatever layout wrote it.

        `others` are filled too, unless one of them is not there.

        Raises:
            UserError: on every rank, if it is damaged or of another model or optimizer.
        """
        self.wait()
        with self.mesh.together():
            metadata = read_state(path)
            verify(path, sorted(metadata["files"])[self.mesh.rank :: self.mesh.size])
        state = TrainState(**metadata["state"])
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

    def _share(self, chunks: list[Chunk]) -> list[Chunk]:
        """Those of the chunks that this rank is to write."""
        places = [chunk.place for chunk in chunks]
        # Sharing out takes a message from everyone to everyone, and layouts rarely change.
        if not all(self.mesh.gather(places == self._places)):
            self._mine = shares(self.mesh.gather(places))[self.mesh.rank]
            self._places = places
        return [chunk for chunk in chunks if chunk.name in self._mine]

    def _complete(
        self, final: Path, config: RunConfig, state: TrainState, staged: Staged, best: bool
    ) -> None:
        """Write a checkpoint, all ranks together."""
        aside = final.with_name(final.name + _UNFINISHED)
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
            if best:
                relink(self.folder / BEST, final.name)
            kept = (self.folder / BEST).resolve()
            for old in checkpoints(self.folder)[: -self.keep]:
                if old.resolve() != kept:
                    _discard(old)

    @contextmanager
    def _together(self, aside: Path) -> Iterator[None]:
        """If the body fails on any rank, clean up and fail on all."""
        try:
            with self.mesh.together():
                try:
                    yield
                except (OSError, RuntimeError) as error:
                    name = aside.name.removesuffix(_UNFINISHED)
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
            for stale in self.folder.glob(f"*{_UNFINISHED}"):
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
            _discard(final)
        aside.rename(final)
        sync(self.folder)


def state_json(state: TrainState, files: dict[str, dict[str, Any]]) -> str:
    """The content of `state.json`, which `read_state` reads.

    Args:
        state: of the run.
        files: size and checksum of every other file of the checkpoint, as `write_chunks` returns.
    """
    return json.dumps({"format": FORMAT, "state": asdict(state), "files": files}, indent=1)


def _discard(path: Path) -> None:
    """Remove a checkpoint; at no instant is a part of it left that looks complete.

    A folder that cannot be removed (some network file systems keep what others still read) is no
    reason to end a healthy run; the next save tries again.
    """
    aside = path.with_name(f"{path.name}.old{_UNFINISHED}")
    try:
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        warn(f"old checkpoint {path} could not be removed: {error}")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = (p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal())
    return sorted((p for p in found if (p / "state.json").is_file()), key=lambda p: p.name)


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`.

    Raises:
        UserError: there is none.
    """
    if (path / "state.json").is_file():
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise UserError(
            f"{path} is neither a checkpoint nor a run folder with one; give a folder that holds "
            "state.json, or the train.run_dir of a run"
        )
    return found[-1]


def read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json`, its shape checked.

    Raises:
        UserError: it is missing, damaged, or of another format.
    """
    try:
        content = json.loads((path / "state.json").read_text(), object_pairs_hook=once)
        known = content["format"] == FORMAT
        if known:  # another format may hold anything else
            values = [(e["bytes"], recorded_sum(e)[1]) for e in content["files"].values()]
            if any(Path(name).name != name for name in content["files"]):
                raise ValueError("a file of it is said to lie elsewhere")
            state = TrainState(**content["state"])
            values += [(state.step, state.fingerprint), (state.samples, state.teacher)]
            values += [(number, "") for segment in state.mixture for number in segment]
            if any((type(number), type(text)) != (int, str) for number, text in values):
                raise ValueError("a number or a text is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"checkpoint {path} has no readable state.json ({error!r}); use another checkpoint"
        ) from error
    if not known:
        raise UserError(
            f"checkpoint {path} has format {content['format']!r}, this version reads {FORMAT}; "
            "use the MegaSwitch release that wrote it"
        )
    return content


def read_config(path: Path) -> RunConfig:
    """The resolved configuration that a checkpoint was written under."""
    try:
        return from_toml((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} has no readable config.toml: {error}") from error


def verify(path: Path, names: list[str] | None = None) -> None:
    """Compare files of the checkpoint with their recorded sizes and checksums.

    Args:
        path: the checkpoint.
        names: which of its files; None for all.

    Raises:
        UserError: naming the files that differ.
    """
    files = read_state(path)["files"]
    damaged = misfits(path, files, None if names is None else set(names))
    told = {text.partition(" ")[0] for text in damaged}
    for name in files if names is None else names:
        if name not in told and not matches(path / name, files[name]):
            damaged.append(f"{name} does not match its checksum")
    if damaged:
        raise damaged_checkpoint(path, damaged)


def load_model_tensors(
    path: Path, model: nn.Module | Mapping[str, Weight], *, distributed: bool = False
) -> None:
    """Fill the parameters of a whole model, or a rank's part of them, from a checkpoint.

    Args:
        path: the checkpoint.
        model: what to fill.
        distributed: whether all ranks do this together, and fail together.

    Raises:
        UserError: it cannot be read or is of another model.
    """
    group = dist.group.WORLD if distributed else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    with Mesh(rank, size, torch.device("cpu"), group).together():
        read_chunks(path, read_headers(tensor_files(path)), model_chunks(model))


def tensor_files(path: Path) -> list[Path]:
    """The files of a checkpoint that hold tensors."""
    return sorted(path.glob("*.safetensors"))
