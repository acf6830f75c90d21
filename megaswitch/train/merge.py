"""A checkpoint with adapters as one without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megaswitch.checkpoint.manager import (
    CheckpointManager,
    TrainState,
    find_checkpoint,
    load_model_tensors,
    read_config,
    read_state,
    verify,
)
from megaswitch.config import LoRAConfig
from megaswitch.log import UserError
from megaswitch.model.adapters import merge_adapters
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.parts import build_parts


def merge_checkpoint(source: Path, output: Path) -> Path:
    """Write the model of `source`, its adapters merged, as a run of one checkpoint in `output`.

    Args:
        source: a checkpoint, or a run, whose newest is taken.
        output: a new folder.

    Returns:
        the new checkpoint; it holds no optimizer state.

    Raises:
        UserError: there are no adapters, or `output` exists.
    """
    checkpoint = find_checkpoint(source)
    config = read_config(checkpoint)
    if not config.model.lora.rank:
        raise UserError(
            f"{checkpoint} has no adapters to merge (model.lora.rank=0); use it as it is"
        )
    if output.exists():
        raise UserError(f"{output} exists already; give a new folder, or remove it first")
    verify(checkpoint)
    with torch.device("cpu"):
        model = SwitchTransformer(config.model)
    load_model_tensors(checkpoint, model)
    merge_adapters(model)
    optim = replace(config.optim, train_only=None, freeze=None)
    merged = replace(config, model=replace(config.model, lora=LoRAConfig()), optim=optim)
    mesh = Mesh(0, 1, torch.device("cpu"), None)
    parts = build_parts(merged, mesh, training=False)
    parts.models[0].load_state_dict(model.state_dict(), assign=False)
    tokenizer = checkpoint / "tokenizer.model"
    manager = CheckpointManager(
        output, keep=1, mesh=mesh, tokenizer=tokenizer if tokenizer.is_file() else None
    )
    state = TrainState(**read_state(checkpoint)["state"])
    stateless = torch.optim.SGD(parts.parameters(), lr=0.0)
    return manager.save(merged, state, parts.weights, stateless)
