"""Runs the jobs of a study: a few at a time, each a process of its own, what is done left out.

A job that was stopped goes on from its checkpoint, as any run does. One that fails is reported, and
the others go on.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from megaswitch.config import differences, from_toml
from megaswitch.log import UserError
from megaswitch.scale.study import Job, Study

LOG = "study.log"  # in a job's folder: what it printed
_POLL = 0.1  # seconds
_STOPPED = 130  # exit code of a run that saved a checkpoint and stopped

Status = Literal["finished before", "finished", "failed", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: which.
        status: in words.
        message: of a failure, the last that it said.
    """

    job: Job
    status: Status
    message: str = ""


def command(study: Study, job: Job) -> list[str]:
    """The words behind `megaswitch` that train a job."""
    return ["train", os.devnull if study.base is None else str(study.base), *job.overrides]


def is_finished(job: Job) -> bool:
    """Whether its last checkpoint is there, and was written under the same configuration.

    Its folder may be one that was copied from another study's.
    """
    from megaswitch.checkpoint.manager import checkpoints

    newest = next(reversed(checkpoints(job.folder / "checkpoints")), None)
    if newest is None or int(newest.name.rpartition("_")[2]) < job.config.train.steps:
        return False
    try:
        stored = from_toml((newest / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return {key for key, _ in differences(stored, job.config)} <= {"train.run_dir"}


def prepare(study: Study, say: Callable[[str], None]) -> None:
    """Run the commands of `[[before]]` whose results are not there.

    Of several processes that prepare the same study, one does the work and the others wait.

    Raises:
        UserError: one failed, or did not make what it was to make.
    """
    for number, before in enumerate(study.file.before, 1):
        if Path(before.makes).exists():
            continue
        with _alone(study.runs):
            if Path(before.makes).exists():
                continue
            say(f"$ megaswitch {shlex.join(before.run)}")
            log = study.runs / f"before-{number}.log"
            status = _wait(_start(_module(before.run), log, jobs=1))
            if status == _STOPPED:
                raise UserError("stopped; the same command goes on from there")
            if status != 0 or not Path(before.makes).exists():
                raise UserError(
                    f"megaswitch {shlex.join(before.run)} did not make {before.makes}: "
                    f"{_last_words(log)}; {log} has all that it said"
                )


@dataclass
class _Stop:
    """Whether SIGINT or SIGTERM asked for an end; the running jobs are then told to save."""

    asked: bool = False
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Tell all jobs once."""
        if not self.asked:
            self.asked = True
            for process in self.running.values():
                _terminate(process)


def run_jobs(
    study: Study, jobs: Sequence[Job], *, at_once: int, say: Callable[[str], None]
) -> list[Outcome]:
    """Run jobs, in their order, `at_once` at a time; their outcomes in the order of their ends.

    The first SIGINT or SIGTERM lets the running ones save and stop, and starts no more.
    """
    outcomes: list[Outcome] = []
    waiting: list[Job] = []
    for job in jobs:
        if is_finished(job):
            outcomes.append(Outcome(job, "finished before"))
        else:
            waiting.append(job)
    if outcomes:
        say(f"{len(outcomes)} of {len(jobs)} runs are finished already")
    stop = _Stop()
    by_index = {job.index: job for job in waiting}
    with _handled(stop):
        while waiting or stop.running:
            while waiting and len(stop.running) < at_once and not stop.asked:
                job = waiting.pop(0)
                say(f"[{job.index}] {job.name} starts")
                words = _module(command(study, job), ranks=study.file.ranks)
                stop.running[job.index] = _start(words, job.folder / LOG, jobs=at_once)
                if stop.asked:  # between the test and the start
                    _terminate(stop.running[job.index])
            if stop.asked and not stop.running:
                break
            time.sleep(_POLL)
            for index, process in list(stop.running.items()):
                if (status := process.poll()) is not None:
                    del stop.running[index]
                    outcomes.append(_outcome(by_index[index], status, stopping=stop.asked))
                    say(f"[{index}] {_told(outcomes[-1])}")
    outcomes += [Outcome(job, "stopped") for job in waiting]
    return outcomes


def _outcome(job: Job, status: int, *, stopping: bool) -> Outcome:
    if status == 0:
        return Outcome(job, "finished")
    if stopping or status == _STOPPED:
        return Outcome(job, "stopped")
    return Outcome(job, "failed", _last_words(job.folder / LOG) or f"exit code {status}")


def _told(outcome: Outcome) -> str:
    text = f"{outcome.job.name} {outcome.status}"
    if outcome.status != "failed":
        return text
    return f"{text}: {outcome.message}; see {outcome.job.folder / LOG}"


def _module(words: Sequence[str], ranks: int = 1) -> list[str]:
    """A command of MegaSwitch, by this Python; several ranks are started by torchrun."""
    if ranks == 1:
        return [sys.executable, "-m", "megaswitch", *words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, "-m", "megaswitch", *words]


def _start(words: Sequence[str], log: Path, *, jobs: int) -> subprocess.Popen[bytes]:
    """Start a process that writes to `log`, with its share of the cores."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(words)}\n".encode())
        file.flush()
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            start_new_session=True,  # a Ctrl-C reaches it through us alone, once
        )


def _wait(process: subprocess.Popen[bytes]) -> int:
    stop = _Stop(running={0: process})
    with _handled(stop):
        status = process.wait()
    return _STOPPED if stop.asked else status


def _terminate(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return


@contextmanager
def _handled(stop: _Stop) -> Iterator[None]:
    before = {s: signal.signal(s, stop.ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".before.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_words(log: Path) -> str:
    """The error that a process ended with, or its last line; at most 300 characters."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error")]
    return (errors or [line for line in lines if line.strip()] or [""])[-1][:300]


SLURM = """\
#!/bin/bash
# {title}: {count} runs. Written by: megaswitch study run {file} --slurm
# Give your cluster's --partition, --account, --time and --gres here or to sbatch. A task that is
# stopped or preempted goes on from its checkpoint when it is queued again.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{at_once}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --output={runs}/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120

cd {cwd}
{python} -m megaswitch study run {words} --only "$SLURM_ARRAY_TASK_ID" &
trap 'kill -TERM $!' TERM
wait $!
status=$?
# A signal ends the first wait; the second one is for the runs, which save a checkpoint.
if kill -0 $! 2>/dev/null; then wait $!; status=$?; fi
exit $status
"""


def slurm_script(study: Study, words: Sequence[str], *, at_once: int) -> str:
    """A job array with a task for each run.

    Args:
        study: whose runs.
        words: behind `megaswitch study run`.
        at_once: tasks that may run at a time.
    """
    return SLURM.format(
        title=" ".join(study.file.title.split()),
        count=len(study.jobs),
        file=shlex.quote(str(study.path)),
        name=shlex.quote(study.runs.name),
        last=len(study.jobs) - 1,
        at_once=at_once,
        cpus=max(study.file.ranks, 2),
        runs=shlex.quote(str(study.runs)),
        cwd=shlex.quote(os.getcwd()),
        python=shlex.quote(sys.executable),
        words=shlex.join(words),
    )
