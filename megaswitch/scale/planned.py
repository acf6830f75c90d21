"""Files that run a plan: a configuration, and a job for SLURM."""

from __future__ import annotations

import shlex

from megaswitch.config import to_toml
from megaswitch.scale.estimate import Estimate
from megaswitch.scale.hardware import Hardware


def planned_toml(one: Estimate, hardware: Hardware) -> str:
    """The configuration that runs a plan, and what is expected of it."""
    memory, seconds = one.memory.total / 1e9, one.seconds.total
    return (
        f"# Planned for {one.world} ranks of {hardware.name}: {memory:.1f} GB of each, "
        f"{seconds:.3g} s a step.\n{to_toml(one.config)}"
    )


def sbatch(one: Estimate, hardware: Hardware, config_file: str) -> str:
    """A SLURM job that runs `config_file` in the layout."""
    gpus = min(hardware.node_gpus, one.world)
    nodes = -(-one.world // gpus)
    return f"""#!/bin/bash
#SBATCH --job-name=megaswitch
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Before the time limit SLURM warns this shell, which passes it on; all ranks then save and end with
# code 130, and the job is queued again. The same command goes on from the newest checkpoint.
srun --distribution=block megaswitch train {shlex.quote(config_file)} &
trap 'asked=yes; kill -USR1 $!' USR1 TERM
while :; do wait $!; status=$?; kill -0 $! 2>/dev/null || break; done
if [ "$status" -ne 0 ] && [ -n "$asked" ]; then trap "" TERM; scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""
