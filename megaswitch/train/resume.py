"""Whether a run may go on from a checkpoint, and whether its ranks are of one mind."""

from __future__ import annotations

from pathlib import Path

from megaswitch.checkpoint.manager import read_config, read_state
from megaswitch.config import RunConfig, differences, to_toml
from megaswitch.data.samples import Samples
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh

# Keys that a run may change when it goes on; the rest of the configuration is its identity.
_MAY_CHANGE = (
    *("model.preset", "data.train", "data.valid", "data.tokenizer", "checkpoint.", "parallel."),
    *("data.mixture.weights", "data.mixture.size"),  # from there on
    *("data.mixture.exponent", "data.mixture.cap"),
    *("distill.teacher", "distill.logits"),  # what they hold is compared
    *("data.access", "data.loader_threads", "data.prefetch_batches"),
    *("train.steps", "train.run_dir", "train.device", "train.backend", "train.micro_batch_size"),
    *("train.activation_checkpointing", "train.loss_tokens", "train.log_interval"),
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
