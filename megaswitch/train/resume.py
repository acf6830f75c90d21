"""Whether a run may go on from a checkpoint, and whether its ranks are of one mind."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from megaswitch.checkpoint.manager import (
    CheckpointManager,
    TrainState,
    checkpoints,
    read_config,
    read_state,
)
from megaswitch.config import RunConfig, differences, to_toml
from megaswitch.data.samples import Samples
from megaswitch.events import write_event
from megaswitch.log import UserError, info
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.distill import Distillation, copy_weights
from megaswitch.train.parts import Parts
from megaswitch.train.start import take_weights

# Keys that a run may change when it goes on; the rest of the configuration is its identity.
_MAY_CHANGE = (
    *("model.preset", "data.train", "data.valid", "data.tokenizer", "checkpoint.", "parallel."),
    "fault.",
    *("data.mixture.weights", "data.mixture.size"),  # from there on
    *("data.mixture.exponent", "data.mixture.cap"),
    *("distill.teacher", "distill.logits"),  # what they hold is compared
    *("data.access", "data.loader_threads", "data.prefetch_batches"),
    *("train.steps", "train.run_dir", "train.device"),
    *("train.backend", "train.dispatch", "train.compile", "train.micro_batch_size"),
    *("train.activation_checkpointing", "train.loss_tokens", "train.log_interval"),
    *("train.trackers", "train.deterministic"),
    *("train.valid_interval", "train.valid_samples", "train.valid_metrics"),
    "data.tasks",  # what they make of the files is part of the data's fingerprint
)


def check_same_view(mesh: Mesh, config: RunConfig, loader: Samples, newest: Path | None) -> None:
    """Refuse ranks that would train apart: other configuration, data, or checkpoint to go on from.

    Raises:
        UserError: saying which of the three differ.
    """
    views = {
        "configurations": to_toml(config),
        "training data": (loader.fingerprint, loader.segments),
        "newest checkpoints": newest.name if newest else "none",
    }
    gathered = mesh.gather(views)
    differing = [key for key in views if len({view[key] for view in gathered}) > 1]
    if differing:
        raise UserError(
            f"the ranks see different {' and '.join(differing)}; give all nodes the same command "
            "and keep train.run_dir and the data on storage that they share"
        )


def check_resume(path: Path, config: RunConfig, loader: Samples, teacher: str = "") -> None:
    """Refuse to go on from `path` if that would be another run: other configuration, data, teacher.

    Args:
        path: of the checkpoint.
        config: given now.
        loader: of the training data.
        teacher: fingerprint of what the student learns from.
    """
    changed = [
        line
        for key, line in differences(read_config(path), config)
        if not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{path} was written under another configuration: {'; '.join(changed)}. Use the same "
            "values, or another train.run_dir for a new run"
        )
    state = read_state(path)["state"]
    trained_on = state["fingerprint"]
    if trained_on != loader.fingerprint:
        raise UserError(
            f"{path} was trained on other data (fingerprint {trained_on}) than data.train="
            f"{config.data.train!r} ({loader.fingerprint}); give the same data or another "
            "train.run_dir"
        )
    if (taught := state.get("teacher", "")) != teacher:
        raise UserError(
            f"{path} was taught by another teacher (fingerprint {taught or 'none'}) than "
            f"distill.teacher={config.distill.teacher!r} ({teacher or 'none'}); give the same "
            "checkpoint or cached probabilities, or another train.run_dir"
        )


def first_state(
    config: RunConfig,
    mesh: Mesh,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    manager: CheckpointManager,
    loader: Samples,
    distillation: Distillation | None,
) -> TrainState:
    """Fill weights and optimizer: from the run's newest intact checkpoint, another run, or anew.

    Raises:
        UserError: on every rank, if that would be another run or cannot be read.
    """
    newest = next(reversed(checkpoints(manager.folder)), None)
    teacher = distillation.fingerprint if distillation else ""
    with mesh.together():
        check_same_view(mesh, config, loader, newest)
    began = time.perf_counter()
    if found := manager.newest_intact():
        with mesh.together():
            check_resume(found, config, loader, teacher)
        info(f"resuming from {found}")
        state = manager.restore(
            found, parts.weights, optimizer, others=parts.remembered(), verified=True
        )
        if mesh.rank == 0:
            write_event(
                Path(config.train.run_dir), "resumed", state.step, checkpoint=found.name,
                ranks=mesh.size, seconds=round(time.perf_counter() - began, 4),
            )  # fmt: skip
        return state
    parts.initialize(config.train.seed)
    if config.train.init_from:
        take_weights(Path(config.train.init_from), config, parts, mesh)
    if distillation and config.distill.copy_weights:
        copy_weights(config, mesh, parts.weights)
    return TrainState(step=0, samples=0, fingerprint=loader.fingerprint, teacher=teacher)
