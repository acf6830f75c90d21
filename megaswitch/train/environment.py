"""What a run was started with: program, versions, machines and the state of the source tree.

One JSON line a start, in `environment.jsonl` of the run folder.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import megaswitch
from megaswitch.log import warn
from megaswitch.parallel.mesh import Mesh

_LAUNCHER = re.compile(
    r"SLURM_(JOB_ID|JOB_NODELIST|RESTART_COUNT|ARRAY_TASK_ID)|TORCHELASTIC_(RUN_ID|RESTART_COUNT)"
)


def write_environment(run_dir: Path, mesh: Mesh) -> None:
    """Append this start; ranks call it together, rank 0 writes."""
    hosts = mesh.gather(socket.gethostname())
    if mesh.rank != 0:
        return
    record = {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "ranks": mesh.size,
        "hosts": list(dict.fromkeys(hosts)),
        "device": _device(mesh.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": _packages(),
        "launcher": {k: v for k, v in sorted(os.environ.items()) if _LAUNCHER.fullmatch(k)},
        "git": git_state(Path.cwd()),
    }
    try:
        with (run_dir / "environment.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        warn(f"{run_dir}/environment.jsonl could not be written: {error.strerror}")


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.machine()
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


def _packages() -> dict[str, str]:
    """Versions of MegaSwitch and of all that it needs."""
    found = {"megaswitch": megaswitch.__version__}
    try:
        lines = importlib.metadata.requires("megaswitch") or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        if name and "extra ==" not in line:
            found[name[0]] = importlib.metadata.version(name[0])
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and changed files of the repository around `folder`; None: there is none."""
    if shutil.which("git") is None:
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30,
                check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = (git("diff", "--name-only", "HEAD") or "").splitlines()
    return {"commit": commit, "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": changed[:100]}  # fmt: skip
