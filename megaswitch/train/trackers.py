"""Services that metrics can also go to, by name; each an optional package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megaswitch.config import RunConfig, to_toml
from megaswitch.log import UserError


class Tracker(Protocol):
    """What a service is asked to do."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Send what is left."""


class WandbTracker:
    """Weights & Biases. Where and as whom is in its own settings (`wandb login`, WANDB_MODE …)."""

    def __init__(self, package: Any, config: RunConfig) -> None:
        run_dir = Path(config.train.run_dir)
        self._run = package.init(
            project=run_dir.absolute().parent.name or "megaswitch",
            name=run_dir.name,
            dir=str(run_dir),
            config={"toml": to_toml(config)},
        )
        # A run that went back logs earlier steps again, which wandb's own counter cannot.
        self._run.define_metric("*", step_metric="train_step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step."""
        self._run.log({"train_step": step, **metrics})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowTracker:
    """MLflow. Where is in its own settings (MLFLOW_TRACKING_URI …)."""

    def __init__(self, package: Any, config: RunConfig) -> None:
        run_dir = Path(config.train.run_dir)
        self._package = package
        package.set_experiment(run_dir.absolute().parent.name or "megaswitch")
        package.start_run(run_name=run_dir.name)
        package.log_text(to_toml(config), "config.toml")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step."""
        self._package.log_metrics({key: float(value) for key, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._package.end_run()


TRACKERS: dict[str, Callable[[Any, RunConfig], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def open_trackers(names: Sequence[str], config: RunConfig) -> list[Tracker]:
    """The services of these names.

    Raises:
        UserError: one's package is missing, or it cannot be reached.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"train.trackers names {name!r}, which cannot be imported ({error}); install it "
                f"with pip install {name}, or leave it out"
            ) from error
        try:
            opened.append(TRACKERS[name](package, config))
        except Exception as error:  # each package has errors of its own
            raise UserError(
                f"train.trackers={name!r} cannot start a run: {error}; see to its own settings, or "
                "leave it out: metrics.jsonl and TensorBoard have everything"
            ) from error
    return opened
