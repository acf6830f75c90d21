"""Writing and reading the state of a run: atomic folders of safetensors, checked by SHA-256.

A checkpoint is `step_00001000/` with one `*.safetensors` file per rank (global tensors through
`torch.distributed.checkpoint`), `config.toml` (the resolved configuration) and `state.json` (step,
samples consumed, data fingerprint, checksums). Nothing in it is a pickle. Ranks write into a folder
of another name, which rank 0 renames once every file is on disk: a crash leaves no half checkpoint.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megaswitch.config import RunConfig, from_toml, to_toml
from megaswitch.files import sha256, sync, write_durably
from megaswitch.log import UserError, warn
from megaswitch.parallel.mesh import Mesh

FORMAT = 1
_PREFIX = "step_"
_UNFINISHED = ".unfinished"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With counted randomness this is all there is beside tensors.

    Attributes:
        step: optimizer steps done.
        samples: training sequences consumed; the position in the data.
        fingerprint: of the training data and its order; a resume on other data is refused.
    """

    step: int
    samples: int
    fingerprint: str


class CheckpointManager:
    """Saves, finds and restores the checkpoints of one run folder.

    Args:
        run_dir: the run's folder; checkpoints lie in `checkpoints/` under it.
        keep: how many of the newest are kept.
        tokenizer: file that every checkpoint takes along, so that it can read and write text.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, mesh: Mesh, tokenizer: Path | None = None
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.mesh = mesh
        self.tokenizer = tokenizer

    def save(
        self,
        config: RunConfig,
        state: TrainState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> Path:
        """Write a checkpoint; when this returns it is on disk under its final name.

        Raises:
            UserError: it could not be written (a full disk, say). Earlier checkpoints are intact.
        """
        final = self.folder / f"{_PREFIX}{state.step:08d}"
        aside = final.with_name(final.name + _UNFINISHED)
        with self._together(aside):
            self._start(aside)
        tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer)
        mine: dict[str, Any] = {}
        with self._together(aside):
            self._write(aside, tensors)
            mine = _sums(aside.glob(f"shard-{self.mesh.rank + 1:05d}-*.safetensors"))
        sums = {name: entry for part in self.mesh.gather(mine) for name, entry in part.items()}
        with self._together(aside):
            self._finish(aside, final, config, state, sums)
        if self.mesh.rank == 0:
            for old in checkpoints(self.folder)[: -self.keep]:
                _discard(old)
        return final

    def restore(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        """Load a checkpoint into `model` and `optimizer`, whatever layout wrote it."""
        metadata = read_state(path)
        with self.mesh.together():
            verify(path, sorted(metadata["files"])[self.mesh.rank :: self.mesh.size])
        load_model_tensors(path, model, distributed=self.mesh.group is not None)
        optimizer_state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        tensors = _prefixed(optimizer_state)
        _load(path, tensors, distributed=self.mesh.group is not None)
        loaded = {key.removeprefix("optimizer."): value for key, value in tensors.items()}
        set_optimizer_state_dict(model, optimizer, optimizer_state | loaded, options=_FLAT)
        return TrainState(**metadata["state"])

    @contextmanager
    def _together(self, aside: Path) -> Iterator[None]:
        """If the body fails on any rank, clean up and fail on all."""
        try:
            with self.mesh.together():
                try:
                    yield
                except (OSError, CheckpointException, RuntimeError) as error:
                    name = aside.name.removesuffix(_UNFINISHED)
                    raise UserError(
                        f"checkpoint {name} could not be written to {aside.parent}: "
                        f"{_root_cause(error)}. Earlier checkpoints are intact; "
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

    def _write(self, aside: Path, tensors: dict[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming … a single process": it is
            dcp.save(tensors, storage_writer=writer, no_dist=self.mesh.group is None)

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
        files = sums | _sums(p for p in aside.iterdir() if p.name not in sums)
        content = {"format": FORMAT, "state": asdict(state), "files": files}
        write_durably(aside / "state.json", json.dumps(content, indent=1))
        sync(aside)
        if final.exists():  # the same step, saved before a resume from an older one
            _discard(final)
        aside.rename(final)
        sync(self.folder)


def _sums(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by name."""
    return {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


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
        content = json.loads((path / "state.json").read_text())
        known = content["format"] == FORMAT
        if known:  # another format may hold anything else
            values = [(e["bytes"], e["sha256"]) for e in content["files"].values()]
            state = TrainState(**content["state"])
            values += [(state.step, state.fingerprint), (state.samples, state.fingerprint)]
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
    """Compare files of the checkpoint with their recorded sizes and SHA-256.

    Args:
        path: the checkpoint.
        names: which of its files; None for all.

    Raises:
        UserError: naming the files that differ.
    """
    files = read_state(path)["files"]
    # The reader takes every tensor file that it finds, so one that is not listed is not harmless.
    unlisted = {p.name for p in path.glob("*.safetensors")} - set(files)
    damaged = [f"{name} is not part of it" for name in sorted(unlisted)]
    for name in files if names is None else names:
        file = path / Path(name).name  # a recorded name never leads out of the folder
        if not file.is_file():
            damaged.append(f"{name} is missing")
        elif file.stat().st_size != files[name]["bytes"]:
            damaged.append(f"{name} has {file.stat().st_size} of {files[name]['bytes']} bytes")
        elif sha256(file) != files[name]["sha256"]:
            damaged.append(f"{name} does not match its checksum")
    if damaged:
        raise UserError(
            f"checkpoint {path} is damaged: {'; '.join(damaged)}. Remove it to resume from the one "
            "before"
        )


def load_model_tensors(path: Path, model: nn.Module, *, distributed: bool = False) -> None:
    """Fill the parameters of `model` from the checkpoint at `path`."""
    _load(path, _model_tensors(model), distributed=distributed)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name. Its hyper-parameters come from the config instead."""
    return _prefixed(get_optimizer_state_dict(model, optimizer, options=_FLAT))


def _prefixed(optimizer_state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"optimizer.{k}": v for k, v in optimizer_state.items() if isinstance(v, Tensor)}


def _load(path: Path, tensors: dict[str, Tensor], *, distributed: bool) -> None:
    """Fill `tensors` in place."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(
                tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not distributed
            )
    except (OSError, CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    """The first line of what really went wrong inside DCP's wrapper."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error) or type(error).__name__).strip().splitlines()[0]
