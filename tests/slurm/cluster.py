"""A SLURM cluster of two virtual nodes on one Debian or Ubuntu machine, while a test needs it.

Each node has network, hostname and mounts of its own (Linux namespaces) behind a bridge, so that
jobs see what they would see on a real cluster. Needs root; neither systemd nor cgroups; all state
is in one folder, nothing in /etc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
NETWORK = "10.77.1"
NODES = ("node1", "node2")
HOSTS = {"ctl": f"{NETWORK}.10", "node1": f"{NETWORK}.11", "node2": f"{NETWORK}.12"}

CONFIG = """\
ClusterName=test
SlurmctldHost=ctl({ctl})
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16917
SlurmdPort=16918
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/ctl.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None. Installs Debian's packages where it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of namespaces needs root"
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if not shutil.which("apt-get"):
        return f"{', '.join(PROGRAMS)} are not all installed, and there is no apt-get to do it"
    # The packages' scripts must not start the daemons of the machine.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for words in (
            ["update", "-qq"],
            ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
        ):
            done = subprocess.run(
                ["apt-get", "-o", "DPkg::Lock::Timeout=300", *words],
                env=environment, capture_output=True, text=True, check=False, timeout=600,
            )  # fmt: skip
            if done.returncode:
                return f"apt-get {words[0]} failed: {done.stderr.strip().splitlines()[-1:]}"
    finally:
        if made:
            policy.unlink()
    return None


class Cluster:
    """Start it with `up`; every process that it started ends with `down`.

    Args:
        folder: for all state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            self.environment.pop(name, None)
        self._namespaces: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Start everything and wait until both nodes are idle."""
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        nodes = "\n".join(
            f"NodeName={n} NodeAddr={HOSTS[n]} CPUs=8 RealMemory=64000 State=UNKNOWN" for n in NODES
        )
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(folder=self.folder, ctl=HOSTS["ctl"], nodes=nodes)
        )
        hosts = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        self._make_network()
        munge = self.folder / "munge"
        self._call(
            "munged", "--force", f"--key-file={key}", f"--socket={munge}/sock",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.on("ctl", "slurmctld")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.idle() == len(NODES), 60, "both nodes are idle")

    def down(self) -> None:
        """Cancel all jobs and end all processes."""
        if (self.folder / "ctl.pid").exists():
            self.on("ctl", "scancel", "--quiet", "--user=root", check=False)
            time.sleep(2)
        for name in (*(f"slurmd-{n}.pid" for n in NODES), "ctl.pid", "munge/pid"):
            _end(self.folder / name)
        for process in self._namespaces.values():
            process.kill()
            process.wait()

    def on(self, host: str, *words: str, check: bool = True) -> str:
        """What a command says on a host."""
        pid = str(self._namespaces[host].pid)
        return self._call("nsenter", "-t", pid, "-n", "-u", "-m", "--", *words, check=check)

    def submit(self, folder: Path, script: Path, *words: str, options: tuple[str, ...] = ()) -> str:
        """Submit a job from a folder; its number."""
        job = ["sbatch", "--parsable", f"--chdir={folder}", *options, str(script), *words]
        shell = f'cd "{folder}" && exec "$@"'
        return self.on("ctl", "bash", "-c", shell, "sbatch", *job).strip()

    def state(self, job: str) -> str:
        """Of a job, such as RUNNING."""
        return self._shown(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often a job was queued again."""
        return int(self._shown(job, "Restarts") or 0)

    def idle(self) -> int:
        """Number of nodes that are."""
        found = self.on(
            "ctl", "sinfo", "-h", "-p", "main", "-N", "-t", "idle", "-o", "%N", check=False
        )
        return len(set(found.split()))

    def wait(self, job: str, state: str, seconds: float, log: Path | None = None) -> None:
        """Until a job is in a state; fails at once if it is in another final one."""
        final = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"} - {state}
        deadline = time.monotonic() + seconds
        while (now := self.state(job)) != state:
            told = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
            assert now not in final, f"job {job} is {now} and not {state}: {told}"
            assert time.monotonic() < deadline, f"job {job} is still {now} and not {state}: {told}"
            time.sleep(0.3)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self.on(node, "slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """All that runs on a node dies, as if its power had gone."""
        inside = os.readlink(f"/proc/{self._namespaces[node].pid}/ns/net")
        keep = self._namespaces[node].pid
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == keep:
                continue
            try:
                if os.readlink(entry / "ns/net") == inside:
                    os.kill(int(entry.name), 9)
            except OSError:
                continue

    def _shown(self, job: str, key: str) -> str:
        text = self.on("ctl", "scontrol", "-o", "show", "job", job, check=False)
        match = re.search(rf"\b{key}=(\w+)", text)
        return match[1] if match else ""

    def _make_network(self) -> None:
        for host in HOSTS:
            script = 'hostname "$1"; mount --bind "$2" /etc/hosts; ip link set lo up; touch "$3"'
            script += "; exec sleep infinity"
            ready = self.folder / f"{host}.ready"
            self._namespaces[host] = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "bash", "-c", script, "_", host,
                 str(self.folder / "hosts"), str(ready)],
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            wait_for(ready.exists, 10, f"namespaces of {host}")
        self.on("ctl", "ip", "link", "add", "br0", "type", "bridge")
        self.on("ctl", "ip", "addr", "add", f"{HOSTS['ctl']}/24", "dev", "br0")
        self.on("ctl", "ip", "link", "set", "br0", "up")
        for node in NODES:
            pid = str(self._namespaces[node].pid)
            ends = ["veth-" + node, "type", "veth", "peer", "name", "eth0", "netns", pid]
            self.on("ctl", "ip", "link", "add", *ends)
            self.on("ctl", "ip", "link", "set", "veth-" + node, "master", "br0", "up")
            self.on(node, "ip", "addr", "add", f"{HOSTS[node]}/24", "dev", "eth0")
            self.on(node, "ip", "link", "set", "eth0", "up")

    def _call(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout


def wait_for(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Until something is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.2)


def _end(path: Path) -> None:
    """End a daemon by the file that holds its number."""
    try:
        pid = int(path.read_text())
        os.kill(pid, 15)
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, 9)
    except (OSError, ValueError):
        return
