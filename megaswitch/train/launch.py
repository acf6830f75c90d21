"""From a checked configuration to a run that is over."""

from __future__ import annotations

from pathlib import Path

from megaswitch.checkpoint.manager import checkpoints
from megaswitch.config import RunConfig
from megaswitch.events import write_event
from megaswitch.layers.backend import check_backend, check_dispatch
from megaswitch.log import info, warn
from megaswitch.parallel.clocks import TOLERANCE, clock_offsets
from megaswitch.parallel.launcher import world_size
from megaswitch.parallel.mesh import Mesh
from megaswitch.parallel.watchdog import watch
from megaswitch.train.deterministic import be_deterministic
from megaswitch.train.distill import check_teacher
from megaswitch.train.environment import write_environment
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
    check_dispatch(config.train.dispatch, config.train.device)
    if config.train.deterministic:
        be_deterministic()
    check_trainable(config)
    run_tasks(config)
    if config.train.init_from and not checkpoints(Path(config.train.run_dir) / "checkpoints"):
        check_start(Path(config.train.init_from), config)
    check_teacher(config, world_size())
    mesh = Mesh.start(config.train.device, config.parallel)
    run_dir = Path(config.train.run_dir)
    memory = TrainingMemory(config, mesh, run_dir / "profile" if profile else None)
    with watch(mesh, config.parallel.timeout, run_dir) as watchdog, memory.explained():
        trainer = Trainer.build(config, mesh)  # before anything is written: it may refuse
        run_dir.mkdir(parents=True, exist_ok=True)
        write_environment(run_dir, mesh)
        _compare_clocks(mesh, run_dir)
        memory.holds(trainer.parts, trainer.optimizer)
        if profile:
            with StepProfile(run_dir, mesh).running() as after_step:
                complete = trainer.fit(watchdog, after_step)
        else:
            complete = trainer.fit(watchdog)
    mesh.stop()
    if not complete:
        info("stopped; the same command goes on from the checkpoint")
    return complete


def _compare_clocks(mesh: Mesh, run_dir: Path) -> None:
    """Report ranks whose clock is wrong: times of files and logs of several hosts then mislead."""
    offsets = clock_offsets(mesh)
    wrong = {rank: round(o, 3) for rank, o in enumerate(offsets) if abs(o) > TOLERANCE}
    if not wrong:
        return
    listed = ", ".join(f"rank {rank} by {offset:+.1f} s" for rank, offset in wrong.items())
    warn(f"clocks differ from the median of all: {listed}; set them by NTP or chrony")
    if mesh.rank == 0:
        write_event(run_dir, "clock skew", 0, seconds_by_rank=wrong)
