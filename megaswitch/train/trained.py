"""A trained model, laid out over the ranks of a command as its options --ep and --tp say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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
