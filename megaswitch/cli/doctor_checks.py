"""What `megaswitch doctor` looks at. Uses the standard library alone, as all else may be broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megaswitch
from megaswitch.cli.show import size

# A self-test takes seconds; on a busy machine or a slow network file system much longer.
_SECONDS = 180
_LAUNCHER = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_(ADDR|PORT)|SLURM_.*)$"
)
_NOT_FOR_CHILDREN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|MASTER_|TORCHELASTIC_")
_FREE_BYTES = 1 << 30


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        section: heading that it stands under.
        name: of what was looked at.
        value: what was found, for people.
        data: the same for programs.
        problem: why MegaSwitch cannot train, or None.
        remedy: what mends the problem, or makes an optional thing available.
    """

    section: str
    name: str
    value: str
    data: Any = None
    problem: str | None = None
    remedy: str | None = None


def check_everything() -> Iterator[Finding]:
    """All findings, quick ones first."""
    requirements = list(_requirements())
    torch, failure = _child("probe_torch")
    yield from _versions(requirements, failure)
    yield from _machine()
    yield from _devices(torch, failure)
    core = list(_core(failure))
    yield from core
    yield from _optional(requirements, has_cuda=bool(torch and torch["devices"]))
    yield from _launcher(failure)
    yield from _self_tests(failure, core_works=not any(f.problem for f in core))


def _requirements() -> Iterator[tuple[str, str, str]]:
    """(package, least version, extra or "") as the installed metadata lists them."""
    try:
        lines = importlib.metadata.requires("megaswitch") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        match = re.match(
            r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\w.]+))?(?:.*extra == [\"'](\w+)[\"'])?", line
        )
        if match:
            yield match[1], match[2] or "0", match[3] or ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def _versions(requirements: list[tuple[str, str, str]], torch: str | None) -> Iterator[Finding]:
    section = "versions"
    installed = _version("megaswitch")
    yield Finding(
        section, "megaswitch", f"{megaswitch.__version__} in {Path(megaswitch.__file__).parent}",
        megaswitch.__version__,
        problem=None if installed else "megaswitch is not installed, only found in this folder",
        remedy=None if installed else f"pip install -e {Path(megaswitch.__file__).parents[1]}",
    )  # fmt: skip
    python = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding(
        section, "python", f"{python} ({sys.executable})", python,
        problem=f"Python {python} is older than 3.11" if old else None,
        remedy="make a virtual environment with Python 3.11 or newer" if old else None,
    )  # fmt: skip
    for package, least, extra in requirements:
        if extra:
            continue
        version, problem = _version(package), None
        if version is None:
            problem = f"{package} is not installed"
        elif _numbers(version) < _numbers(least):
            problem = f"{package} {version} is older than {least}"
        elif package == "torch":
            problem = torch and f"torch {version} cannot be imported: {torch}"
        elif failure := _import_failure(package):
            problem = f"{package} {version} cannot be imported: {failure}"
        again = " --force-reinstall" if problem and "imported" in problem else ""
        remedy = f'pip install{again} "{package}>={least}"' if problem else None
        yield Finding(section, package, version or "missing", version, problem, remedy)


def _import_failure(package: str) -> str | None:
    """Why a package's module cannot be imported, or None."""
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # a broken package may raise anything, and that is the finding
        return f"{type(error).__name__}: {error}"
    return None


def _machine() -> Iterator[Finding]:
    section = "machine"
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(section, "system", f"{platform.system()} {platform.release()}, "
                  f"{platform.machine()}", platform.platform())  # fmt: skip
    yield Finding(
        section, "CPU cores", f"{cores} for this process, {os.cpu_count()} in all"
        + (f"; OMP_NUM_THREADS={threads}" if threads else ""), cores,
    )  # fmt: skip
    memory = _memory()
    if memory:
        yield Finding(
            section, "memory", f"{size(memory['MemAvailable'])} free of {size(memory['MemTotal'])}",
            memory["MemAvailable"],
        )  # fmt: skip
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", _temporary())):
        free = shutil.disk_usage(folder).free
        few = free < _FREE_BYTES
        yield Finding(
            section, name, f"{size(free)} free in {folder}", free,
            problem=f"{folder} has only {size(free)} free" if few else None,
            remedy="free space, or work in another folder" if few else None,
        )  # fmt: skip


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _memory() -> dict[str, int] | None:
    """Bytes of memory in all and free, as Linux tells; the least of the machine and its cgroup."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = {m[1]: int(m[2]) * 1024 for m in re.finditer(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    memory = {name: found[name] for name in ("MemTotal", "MemAvailable")}
    limits = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if all(p.is_file() for p in limits):
        limit, used = (p.read_text(encoding="ascii").strip() for p in limits)
        if limit.isdecimal():
            memory["MemTotal"] = min(memory["MemTotal"], int(limit))
            memory["MemAvailable"] = min(memory["MemAvailable"], max(int(limit) - int(used), 0))
    return memory


def _devices(torch: dict[str, Any] | None, failure: str | None) -> Iterator[Finding]:
    section = "devices"
    if torch is None:
        yield Finding(section, "CUDA", f"unknown: torch does not work ({failure})")
        return
    build = torch["cuda_build"]
    if not torch["devices"]:
        what = f"none seen by this CUDA {build} build" if build else "none: a CPU build of torch"
        yield Finding(section, "CUDA", what, [])
    for index, device in enumerate(torch["devices"]):
        kinds = [kind for kind in ("bf16", "fp8") if device[kind]]
        text = (
            f"{device['name']}, {size(device['memory_bytes'])}, compute capability "
            f"{device['compute_capability']}, {' and '.join(kinds) or 'no bf16 and no fp8'}"
        )
        yield Finding(section, f"cuda:{index}", text, device)
    driver = Path("/proc/driver/nvidia/version")
    match = re.search(r"  (\d+[\d.]+)  ", driver.read_text()) if driver.is_file() else None
    if match:
        yield Finding(section, "NVIDIA driver", match[1], match[1])
    version = torch.get("nccl_version")
    yield Finding(
        section, "nccl", (version or "yes") if torch["nccl"] else "not in this torch", version
    )
    yield Finding(
        section, "gloo", "yes" if torch["gloo"] else "not in this torch", torch["gloo"],
        problem=None if torch["gloo"] else "torch has no gloo, so CPUs cannot train together",
        remedy=None if torch["gloo"] else 'pip install --force-reinstall "torch"',
    )  # fmt: skip


def _core(torch: str | None) -> Iterator[Finding]:
    found, failure = _child("check_core")
    if found:
        yield Finding("core", "megaswitch._C", f"equals its oracle; {found['path']}", found["path"])
        return
    file = next(Path(megaswitch.__file__).parent.glob("_C.*.so"), None)
    where = f"at {file} " if file else ""
    # The oracle needs torch; without it there is no second opinion, and torch is named already.
    if torch and file:
        yield Finding("core", "megaswitch._C", f"{where}not compared: torch does not work")
        return
    yield Finding(
        "core", "megaswitch._C", f"{where}does not work", None,
        problem=f"the compiled core megaswitch._C {where}does not work: {failure}",
        remedy=f"pip install -e {Path(megaswitch.__file__).parents[1]} (needs a C++17 compiler)",
    )  # fmt: skip


def _optional(requirements: list[tuple[str, str, str]], *, has_cuda: bool) -> Iterator[Finding]:
    section = "optional"
    for package, _, extra in requirements:
        if extra in ("", "dev") or package == "megaswitch":
            continue
        version, remedy = _version(package), f'pip install "megaswitch[{extra}]"'
        value = version or "not installed"
        if package.startswith("transformer"):
            value += " (conversion tests alone use it)" if extra == "hf" and version else ""
        if extra == "te":
            if version and not has_cuda:
                value += ", not imported: there is no CUDA device"
            elif version and (failure := _child("", code="import transformer_engine.pytorch")[1]):
                value += f", which cannot be imported: {failure}"
        yield Finding(section, package, value, version, remedy=None if version else remedy)
    triton = _version("triton")
    yield Finding(
        section, "triton", triton or "not installed (CUDA builds of torch bring it)", triton
    )
    yield _apex()


def _apex() -> Finding:
    """NVIDIA's apex has no version on PyPI; the package of that name there is another."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return Finding("optional", "apex", "not installed", None)
    folder = Path(next(iter(spec.submodule_search_locations)))
    if (folder / "optimizers").is_dir() and (folder / "multi_tensor_apply").is_dir():
        return Finding("optional", "apex", f"NVIDIA's, in {folder}", str(folder))
    value = f"the package in {folder} is not NVIDIA's apex but an unrelated one of PyPI"
    return Finding("optional", "apex", value, None, remedy="pip uninstall apex")


def _launcher(torch: str | None) -> Iterator[Finding]:
    section = "launcher"
    held = {k: v for k, v in sorted(os.environ.items()) if _LAUNCHER.match(k)}
    for name, value in held.items():
        yield Finding(section, name, value, value)
    if not held:
        yield Finding(section, "environment", "none set: a single process", {})
    elif not torch:
        _, failure = _child("probe_launcher", keep_launcher=True)
        if failure:
            yield Finding(section, "reading it", "fails", None, failure)


def _self_tests(torch: str | None, *, core_works: bool) -> Iterator[Finding]:
    section = "self-test"
    names = ("one training step", "two processes")
    if torch:
        for name in names:
            yield Finding(section, name, "not tried: torch does not work")
        return
    if core_works:
        yield _training_step(section, names[0])
    else:
        yield Finding(section, names[0], "not tried: the compiled core does not work")
    failure = _two_processes()
    yield Finding(
        section, names[1], "fails" if failure else "works: gloo adds up", not failure,
        problem=failure and f"two processes cannot talk over gloo: {failure}",
        remedy="allow connections on the loopback interface, or name another in GLOO_SOCKET_IFNAME"
        if failure else None,
    )  # fmt: skip


def _training_step(section: str, name: str) -> Finding:
    found, failure = _child("train_one_step")
    if found:
        return Finding(section, name, f"works, loss {found['loss']:.2f}", True)
    return Finding(
        section, name, "fails", False, f"a training step on the CPU fails: {failure}",
        "mend what is named above first; else report this with the output of `megaswitch doctor "
        "--json`",
    )  # fmt: skip


def _two_processes() -> str | None:
    """Let two processes add up over gloo; returns what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        calls = [f"all_reduce({rank}, {folder + '/store'!r}, {_SECONDS / 3})" for rank in (0, 1)]
        processes = [_start(f"from megaswitch.cli.doctor_selftest import *; {c}") for c in calls]
        try:
            failures = [_result(process)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
    return next((failure for failure in failures if failure), None)


def _child(
    function: str, *, code: str | None = None, keep_launcher: bool = False
) -> tuple[dict[str, Any] | None, str | None]:
    """Run a function of `doctor_selftest` in a process: (its findings, None) or (None, why not)."""
    program = code or f"from megaswitch.cli.doctor_selftest import {function}; {function}()"
    return _result(_start(program, keep_launcher=keep_launcher))


def _start(program: str, *, keep_launcher: bool = False) -> subprocess.Popen[str]:
    environment = {
        k: v for k, v in os.environ.items() if keep_launcher or not _NOT_FOR_CHILDREN.match(k)
    }
    # The same package as here, wherever it was found.
    paths = [str(Path(megaswitch.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def _result(process: subprocess.Popen[str]) -> tuple[dict[str, Any] | None, str | None]:
    try:
        out, err = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"no answer within {_SECONDS} seconds"
    except BaseException:
        process.kill()
        raise
    lines = out.strip().splitlines()
    if process.returncode == 0:
        return (json.loads(lines[-1]) if lines else {}), None
    said = err.strip().splitlines()
    died = f"the process ended with code {process.returncode}"
    return None, said[-1].removeprefix("megaswitch.log.UserError: ") if said else died
