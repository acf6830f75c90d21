"""The C++ core under the address and undefined-behaviour sanitizers, fuzzed and in daily use."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CXX = os.environ.get("CXX") or shutil.which("c++") or "c++"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", *SANITIZE]
# How long `make test-long` fuzzes.
SECONDS = int(os.environ.get("MEGASWITCH_FUZZ_SECONDS", "600"))


@pytest.fixture(scope="session", autouse=True)
def sanitizers(tmp_path_factory):
    program = tmp_path_factory.mktemp("empty") / "empty.cpp"
    program.write_text("int main() {}")
    command = [CXX, *FLAGS, str(program), "-o", str(program.with_suffix(""))]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{CXX} has no sanitizers here")


def build(folder: Path, patch: Callable[[str], str] = lambda text: text) -> Path:
    """Compile the fuzz target and its driver, with `indexed.cpp` patched."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    indexed = source / "indexed.cpp"
    indexed.write_text(patch(indexed.read_text(encoding="utf-8")), encoding="utf-8")
    objects = []
    for name in ("fuzz/target", "indexed", "bus_guard"):
        objects.append(folder / f"{Path(name).name}.o")
        command = [CXX, *FLAGS, "-fsanitize-coverage=trace-pc", "-c", source / f"{name}.cpp"]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    driver = folder / "driver"
    command = [CXX, *FLAGS, source / "fuzz/driver.cpp", *objects, "-o", driver]
    subprocess.run(command, check=True)
    return driver


def fuzz(driver: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [driver, *map(str, arguments)],
        env={**os.environ, "TMPDIR": str(driver.parent), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


def no_finding(driver: Path, seconds: int) -> None:
    finding = driver.parent / "finding"
    done = fuzz(driver, "--seconds", str(seconds), "--seed", "0", "--finding", finding)
    assert done.returncode == 0, f"{finding}, {driver}:\n{done.stderr[-4000:]}"
    print(done.stdout)  # shown with -s
    assert "no finding in" in done.stdout


def test_some_seconds_of_fuzzing_find_nothing(driver):
    no_finding(driver, 4)


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 600)
def test_ten_minutes_of_fuzzing_find_nothing(driver):
    no_finding(driver, SECONDS)


# Checks that no other one makes up for, by their text, and what is put in their place.
BUGS = {
    "an offset is believed": ("offsets[at] < 0 || static_cast<uint64_t>(offsets[at]) != ", "0 > "),
    "the sum of lengths is believed": ("total * token_bytes_ != bin_.size()", "false"),
    "the count is multiplied": ("num_sequences_ > body / kBytesPerSequence", "false"),
    "a boundary may lie before the last": ("boundaries[at] < previous || ", ""),
    "a read may be too long": ("count > size - start", "false"),
    "a cut is not looked for": ("static_cast<uint64_t>(status.st_size) >= size_", "true"),
    "a bus error is not caught": ("copy_mapped(to, data_ + start, bytes)",
                                  "std::memcpy(to, data_ + start, bytes) != nullptr"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", BUGS)
def test_the_fuzzer_finds_checks_that_are_missing(tmp_path, name):
    check, instead = BUGS[name]

    def without(text: str) -> str:
        assert text.count(check) == 1, check
        return text.replace(check, instead)

    driver = build(tmp_path, without)
    done = fuzz(driver, "--seconds", "240", "--seed", "0", "--finding", tmp_path / "finding")
    assert done.returncode != 0
    # What was written down fails again.
    assert fuzz(driver, tmp_path / "finding").returncode != 0


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_data_suite_passes_under_sanitizers(tmp_path):
    """The package beside a core built with sanitizers, below which Python itself is not built."""
    package = tmp_path / "megaswitch"
    shutil.copytree(
        ROOT / "megaswitch", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    flags = {"CFLAGS": " ".join(FLAGS[1:]), "LDFLAGS": " ".join(SANITIZE)}
    built = ["--build-lib", tmp_path, "--build-temp", tmp_path / "objects"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *built],
        cwd=ROOT, env={**os.environ, **flags}, check=True,
    )  # fmt: skip
    assert list(package.glob("_C*.so"))
    # The sanitizer looks for what throws when it starts, long before the core brings it along.
    libraries = [
        subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "LD_PRELOAD": " ".join(libraries),
        # Python keeps what it allocates to its end; who handles SIGBUS is what some tests test.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0",
        "OMP_NUM_THREADS": "1",
    }
    where = "import megaswitch._C as core; print(core.__file__)"
    loaded = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.startswith(str(package))
    suite = ROOT / "tests/unit/data"
    names = ["indexed", "damaged_files", "cut_files", "merge", "loader", "permutation",
             "span_corruption", "philox"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not long", "-x", "--timeout", "1200",
         "-c", ROOT / "pyproject.toml", "--capture=sys",
         *(suite / f"test_{name}.py" for name in names)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
