"""What a checkpoint says of itself, and whether that is true: its state, configuration and sums."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megaswitch.checkpoint.contents import model_chunks
from megaswitch.checkpoint.integrity import (
    damaged_checkpoint,
    matches,
    misfits,
    once,
    recorded_sum,
)
from megaswitch.checkpoint.retention import checkpoints
from megaswitch.checkpoint.tensor_files import read_chunks, read_headers
from megaswitch.config import RunConfig, from_toml
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.weights import Weight

FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With counted randomness this is all there is beside tensors.

    Attributes:
        step: optimizer steps done.
        samples: training sequences consumed; the position in the data.
        fingerprint: of the training data and its order; a resume on other data is refused.
        mixture: of sources, since when each holds: [first sample, quota of each in a block, ...].
        teacher: of a distilled run: fingerprint of what it learns from.
        bad_steps: of the steps done, those that did not change the weights.
        row: of them, how many are the last ones in a row.
        rewinds: how often the run went back to a checkpoint.
        left_out: training sequences among `samples` that no weight has learned from.
        recent: losses of the last good steps, for a run that looks for spikes.
    """

    step: int
    samples: int
    fingerprint: str
    mixture: list[list[int]] = field(default_factory=list)
    teacher: str = ""
    bad_steps: int = 0
    row: int = 0
    rewinds: int = 0
    left_out: int = 0
    recent: list[float] = field(default_factory=list)


def state_json(state: TrainState, files: dict[str, dict[str, Any]]) -> str:
    """The content of `state.json`, which `read_state` reads.

    Args:
        state: of the run.
        files: size and checksum of every other file of the checkpoint, as `write_chunks` returns.
    """
    return json.dumps({"format": FORMAT, "state": asdict(state), "files": files}, indent=1)


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
            counts = (state.bad_steps, state.row, state.rewinds, state.left_out)
            values += [(number, "") for number in counts]
            if any(type(loss) is not float or not math.isfinite(loss) for loss in state.recent):
                raise ValueError("a loss is none")
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
