"""The first weights of a run, out of a checkpoint of another one."""

from __future__ import annotations

from pathlib import Path

from megaswitch.checkpoint.manager import (
    find_checkpoint,
    load_model_tensors,
    read_config,
    read_state,
    verify,
)
from megaswitch.config import RunConfig, differences
from megaswitch.log import UserError, info
from megaswitch.model.adapters import is_adapter
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.parts import Parts
from megaswitch.train.trained import check_same

# What a run may choose anew: no weight depends on it. Of the experts, all but these.
_FREE = ("model.preset", "model.dropout", "model.init_scale", "model.lora.")
_EXPERTS = "model.moe."
_KEPT = ("num_experts", "encoder_sparse_step", "decoder_sparse_step", "feed_forward", "attention",
         "router")  # fmt: skip


def check_start(source: Path, config: RunConfig) -> Path:
    """The checkpoint that a run starts from. Needs no process group.

    Args:
        source: a checkpoint, or a run, whose newest is taken.
        config: of the run that starts.

    Raises:
        UserError: there is none, or its model is another one.
    """
    checkpoint = find_checkpoint(source)
    before = read_config(checkpoint)
    if before.model.lora.rank:
        raise UserError(
            f"{checkpoint} has adapters of rank {before.model.lora.rank}, and a run starts from "
            f"plain weights; merge them first: megaswitch merge {source} --output FOLDER"
        )
    other = [
        line
        for key, line in differences(before, config)
        if key.startswith("model.") and not key.startswith(_FREE)
        if not key.startswith(_EXPERTS) or key.removeprefix(_EXPERTS) in _KEPT
    ]
    if other:
        raise UserError(
            f"train.init_from={str(source)!r} holds another model: {'; '.join(other)}. Leave these "
            "keys out, or start from another checkpoint"
        )
    return checkpoint


def take_weights(source: Path, config: RunConfig, parts: Parts, mesh: Mesh) -> None:
    """Fill this rank's weights, whatever layout wrote them; adapters keep theirs.

    Raises:
        UserError: on every rank, if the checkpoint is damaged, of another model, or not the same
            for all.
    """
    with mesh.together():
        checkpoint = check_start(source, config)
        state = read_state(checkpoint)
        verify(checkpoint, sorted(state["files"])[mesh.rank :: mesh.size])
    check_same("checkpoints to start from", state, mesh)
    weights = {name: w for name, w in parts.weights.items() if not is_adapter(name)}
    load_model_tensors(checkpoint, weights, distributed=mesh.group is not None)
    info(f"first weights from {checkpoint}")
