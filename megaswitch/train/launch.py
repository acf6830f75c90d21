"""From a checked configuration to a run that is over."""

from __future__ import annotations

from pathlib import Path

from megaswitch.checkpoint.manager import checkpoints
from megaswitch.config import RunConfig
from megaswitch.layers.backend import check_backend
from megaswitch.log import info
from megaswitch.parallel.launcher import world_size
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.watchdog import watch
from megaswitch.train.distill import check_teacher
from megaswitch.train.memory import TrainingMemory
from megaswitch.train.profile import StepProfile
from megaswitch.train.start import check_start
from megaswitch.train.task_data import run_tasks
from megaswitch.train.trainable import check_trainable
from megaswitch.train.trainer import Trainer


def launch(config: RunConfig, *, profile: bool = False) -> bool:
    """Train, on all ranks of this launch; True if the run is complete.

    Args:
        config: the run.
        profile: whether some of its first steps are profiled.

    Raises:
        UserError: before any process group forms, whatever can be known to be wrong by then.
    """
    check_backend(config.train.backend, config.train.fp8, config.train.device)
    check_trainable(config)
    run_tasks(config)
    if config.train.init_from and not checkpoints(Path(config.train.run_dir) / "checkpoints"):
        check_start(Path(config.train.init_from), config)
    check_teacher(config, world_size())
    mesh = Mesh.start(config.train.device, config.parallel)
    folder = Path(config.train.run_dir) / "profile" if profile else None
    memory = TrainingMemory(config, mesh, folder)
    with watch(mesh, config.parallel.timeout) as watchdog, memory.explained():
        trainer = Trainer.build(config, mesh)
        memory.holds(trainer.parts, trainer.optimizer)
        if profile:
            with StepProfile(Path(config.train.run_dir), mesh).running() as after_step:
                complete = trainer.fit(watchdog, after_step)
        else:
            complete = trainer.fit(watchdog)
    mesh.stop()
    if not complete:
        info("stopped; the same command goes on from the checkpoint")
    return complete
