"""A trained model, laid out over the ranks of a command as its options --ep and --tp say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaswitch.checkpoint.manager import (
    find_checkpoint,
    load_model_tensors,
    read_config,
    read_state,
    verify,
)
from megaswitch.config import ParallelConfig, RunConfig
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.rules_parallel import check_options
from megaswitch.train.parts import Parts, build_parts


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What every measurement of a trained model asks for. None takes the value of its training.

    Attributes:
        checkpoint: a checkpoint, or a run folder, whose newest is taken.
        samples: the first so many of each source or task; None: all.
        batch_size: sequences or examples of a rank at a time.
        precision: "fp32" or "bf16".
        ep: ranks that the experts lie on.
        tp: ranks that slice each matrix.
    """

    checkpoint: Path
    samples: int | None = None
    batch_size: int | None = None
    precision: str | None = None
    ep: int = 1
    tp: int = 1

    def find(self, world_size: int) -> tuple[Path, RunConfig]:
        """The checkpoint and its configuration, with layout and precision; see `find_trained`."""
        checkpoint, config = find_trained(self.checkpoint, world_size, ep=self.ep, tp=self.tp)
        return checkpoint, changed(config, train={"precision": self.precision})


def changed(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """A configuration with other values, by section; None leaves a value as it is.

    Raises:
        UserError: no configuration may have such a value.
    """
    try:
        for name, values in sections.items():
            given = {key: value for key, value in values.items() if value is not None}
            config = replace(config, **{name: replace(getattr(config, name), **given)})
    except ValidationError as error:
        wrong = (f"{d['loc'][0]} is {d['input']!r}: {d['msg']}" for d in error.errors())
        raise UserError(f"{'; '.join(wrong)}. Give another value, or none") from error
    return config


def find_trained(path: Path, world_size: int, *, ep: int, tp: int) -> tuple[Path, RunConfig]:
    """The checkpoint at `path`, and its configuration with the layout asked for. Needs no group.

    Args:
        path: a checkpoint, or a run folder, whose newest is taken.
        world_size: ranks of this launch.
        ep: ranks that the experts lie on.
        tp: ranks that slice each matrix.

    Raises:
        UserError: there is no checkpoint, or its model cannot be laid out so.
    """
    checkpoint = find_checkpoint(path)
    config = read_config(checkpoint)
    # Only training slices tokens; its timeout is right for the machine.
    layout = ParallelConfig(ep=ep, tp=tp, sequence_parallel=False, timeout=config.parallel.timeout)
    config = replace(config, parallel=layout)
    if problems := list(check_options(config, world_size)):
        raise UserError("\n".join(problems))
    return checkpoint, config


def load_trained(checkpoint: Path, config: RunConfig, mesh: Mesh) -> tuple[Parts, int]:
    """This rank's part of a model, whatever layout wrote the checkpoint.

    Returns:
        the part, in evaluation mode, and the step that the checkpoint was written at.

    Raises:
        UserError: on every rank, if the checkpoint is damaged or not the same for all.
    """
    with mesh.together():
        state = read_state(checkpoint)
        verify(checkpoint, sorted(state["files"])[mesh.rank :: mesh.size])
    check_same("checkpoints", state, mesh)
    with mesh.together():
        parts = build_parts(config, mesh, training=False)
    load_model_tensors(checkpoint, parts.weights, distributed=mesh.group is not None)
    parts.train(False)
    return parts, state["state"]["step"]


def check_same(what: str, view: Any, mesh: Mesh) -> None:
    """Refuse, on every rank, ranks that would work together on different things."""
    if any(other != view for other in mesh.gather(view)):
        raise UserError(
            f"the ranks see different {what}; give all nodes the same command and keep checkpoint "
            "and data on storage that they share"
        )
