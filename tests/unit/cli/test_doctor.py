"""`megaswitch doctor`, above all where something is broken: that is when it is called."""

import json
import os
import sys
from pathlib import Path

import click
import pytest

import megaswitch as package
from megaswitch.cli import doctor_checks
from megaswitch.cli.doctor_checks import Finding
from tests.unit.cli.commands import megaswitch, printed, refusal, report, run

FOUND = {"version": "2", "gloo": True, "nccl": True, "cuda_build": "12.8", "nccl_version": "2.26.2"}


@pytest.fixture
def stub(tmp_path):
    """Put a broken module before the real ones, for this process's children too."""

    def write(name: str, code: str) -> dict[str, str]:
        folder = tmp_path / "stubs" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path / "stubs")}

    return write


def doctor(**environment):
    process = megaswitch("doctor", "--json", **environment)
    return process, json.loads(process.stdout)


def test_it_trains_here():
    process, found = doctor(OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert found["can_train"]
    assert found["problems"] == []
    assert found["versions"]["torch"]["value"].startswith("2.")
    assert found["core"]["megaswitch._C"]["value"].endswith(".so")
    assert found["self-test"]["one training step"]["value"]
    assert found["self-test"]["two processes"]["value"]


def test_a_torch_that_cannot_be_imported(stub):
    process, found = doctor(**stub("torch", "raise OSError('libcudart.so.12: no such file')"))
    assert process.returncode == 2
    assert not found["can_train"]
    (problem,) = found["problems"]
    assert "libcudart.so.12: no such file" in problem["problem"]
    assert problem["remedy"] == 'pip install --force-reinstall "torch>=2.11"'
    assert found["versions"]["numpy"]["value"]
    assert "libcudart" in process.stderr


def test_all_problems_at_once(stub, tmp_path):
    stub("sentencepiece", "raise RuntimeError('bad build')")
    environment = stub("torch", "import sys; sys.exit(3)")
    process, found = doctor(**environment)
    assert process.returncode == 2
    texts = [p["problem"] for p in found["problems"]]
    assert len(texts) == 2
    assert any("bad build" in t for t in texts)
    assert any("ended with code 3" in t for t in texts)
    assert "2 problems keep MegaSwitch from training here" in process.stderr


def test_a_core_that_cannot_be_loaded(tmp_path):
    """A copy of the package whose core is no library; torch works."""
    root = tmp_path / "copy"
    root.mkdir()
    source = Path(package.__file__).parent
    for file in source.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            target = root / "megaswitch" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    (core,) = (root / "megaswitch").glob("_C.*.so")
    core.unlink()
    core.write_text("not a library")
    process, found = doctor(PYTHONPATH=str(root), PYTHONSAFEPATH="1")
    assert process.returncode == 2
    (first,) = found["problems"]
    assert "the compiled core megaswitch._C" in first["problem"]
    assert str(core) in first["problem"]
    assert first["remedy"].startswith(f"pip install -e {root}")


def test_a_rank_that_is_not_the_first_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(doctor_checks, "check_everything", lambda: [Finding("a", "b", "c")])
    monkeypatch.setenv("RANK", "1")
    assert printed(capsys, "doctor") == ""


def test_people_see_marks_and_remedies(monkeypatch, capsys):
    findings = [
        Finding("a", "fine", "1.0"),
        Finding("a", "bad", "0.1", problem="bad 0.1 is old", remedy="pip install bad"),
        Finding("b", "nice", "missing", remedy="pip install nice"),
    ]
    monkeypatch.setattr(doctor_checks, "check_everything", lambda: findings)
    message = refusal("doctor")
    assert message.startswith("1 problem keeps MegaSwitch from training here")
    assert "bad 0.1 is old; pip install bad" in message
    out = capsys.readouterr().out
    assert "✗ 0.1" in out
    assert "missing  (pip install nice)" in out


def fake_child(monkeypatch, **results):
    calls = []

    def child(function, *, code=None, keep_launcher=False):
        calls.append(code or function)
        return results.get(function, ({}, None))

    monkeypatch.setattr(doctor_checks, "_child", child)
    return calls


def test_devices_and_their_abilities(monkeypatch):
    device = {"name": "H100", "memory_bytes": 80 << 30, "compute_capability": "9.0"}
    old = {"name": "V100", "memory_bytes": 16 << 30, "compute_capability": "7.0"}
    devices = [device | {"bf16": True, "fp8": True}, old | {"bf16": False, "fp8": False}]
    lines = {f.name: f.value for f in doctor_checks._devices(FOUND | {"devices": devices}, None)}
    assert lines["cuda:0"] == "H100, 80.0 GiB, compute capability 9.0, bf16 and fp8"
    assert lines["cuda:1"].endswith("no bf16 and no fp8")
    assert lines["nccl"] == "2.26.2"


def test_a_torch_without_gloo_is_a_problem():
    found = FOUND | {"devices": [], "gloo": False}
    (problem,) = (f for f in doctor_checks._devices(found, None) if f.problem)
    assert problem.name == "gloo"


@pytest.mark.parametrize("has_cuda", [False, True])
def test_transformer_engine_is_never_imported_without_a_gpu(monkeypatch, has_cuda):
    failure = "RuntimeError: Found no NVIDIA driver"
    calls = fake_child(monkeypatch, **{"": (None, failure)})
    monkeypatch.setattr(doctor_checks, "_version", lambda package: "2.1")
    requirements = [("transformer-engine", "2.0", "te")]
    findings = {f.name: f for f in doctor_checks._optional(requirements, has_cuda=has_cuda)}
    value = findings["transformer-engine"].value
    assert calls == (["import transformer_engine.pytorch"] if has_cuda else [])
    assert (failure if has_cuda else "not imported: there is no CUDA device") in value
    assert "transformer_engine" not in sys.modules


def test_a_missing_extra_comes_with_its_line():
    requirements = [("no-such-thing", "1", "plot")]
    (finding,) = list(doctor_checks._optional(requirements, has_cuda=False))[:1]
    assert finding.remedy == 'pip install "megaswitch[plot]"'
    assert finding.problem is None


@pytest.mark.parametrize("nvidia", [False, True])
def test_apex_is_told_by_its_contents(tmp_path, monkeypatch, nvidia):
    folder = tmp_path / "apex"
    for part in ("optimizers", "multi_tensor_apply") if nvidia else ("lib",):
        (folder / part).mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('never import this')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor_checks._apex()
    assert ("NVIDIA's, in" in finding.value) == nvidia
    assert finding.remedy == (None if nvidia else "pip uninstall apex")


@pytest.mark.parametrize(
    ("requirement", "version", "problem"),
    [
        (("nothing-like-it", "1", ""), None, "nothing-like-it is not installed"),
        (("numpy", "10.0", ""), None, "is older than 10.0"),
        (("numpy", "1.2", ""), None, None),
    ],
)
def test_versions_are_compared(requirement, version, problem):
    finding = list(doctor_checks._versions([requirement], None))[-1]
    assert (problem or "") in (finding.problem or "")
    assert bool(finding.problem) == bool(problem)
    if problem:
        assert finding.remedy == f'pip install "{requirement[0]}>={requirement[1]}"'


def test_version_numbers():
    assert doctor_checks._numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor_checks._numbers("2.9") < doctor_checks._numbers("2.11")
    assert doctor_checks._numbers("3.0rc1") == (3, 0)


def test_the_requirements_are_those_of_the_package():
    found = {name: (least, extra) for name, least, extra in doctor_checks._requirements()}
    assert found["torch"] == ("2.11", "")
    assert found["transformer-engine"] == ("2.0", "te")


@pytest.mark.parametrize(
    ("torch", "core", "problems"),
    [
        (None, ({"path": "x.so"}, None), 0),
        (None, (None, "differs"), 1),
        ("broken", (None, "No module named torch"), 0),
    ],
)
def test_the_core_is_blamed_for_its_own_faults_alone(monkeypatch, torch, core, problems):
    fake_child(monkeypatch, check_core=core)
    assert len([f for f in doctor_checks._core(torch) if f.problem]) == problems


def test_a_failing_self_test_is_a_problem(monkeypatch):
    fake_child(monkeypatch, train_one_step=(None, "boom"))
    monkeypatch.setattr(doctor_checks, "_two_processes", lambda: "no route")
    problems = [f.problem for f in doctor_checks._self_tests(None, core_works=True)]
    assert problems == [
        "a training step on the CPU fails: boom",
        "two processes cannot talk over gloo: no route",
    ]
    problems = [f.problem for f in doctor_checks._self_tests(None, core_works=False)]
    assert problems == [None, "two processes cannot talk over gloo: no route"]


def test_a_half_set_launcher_is_a_problem(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    (problem,) = (f.problem for f in doctor_checks._launcher(None) if f.problem)
    assert "RANK and LOCAL_RANK not set" in problem


def test_children_are_not_ranks_and_may_hang(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    code = "import json, os; print(json.dumps(sorted(os.environ)))"
    found, _ = doctor_checks._child("", code=code)
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & set(found)
    monkeypatch.setattr(doctor_checks, "_SECONDS", 0.2)
    found, failure = doctor_checks._child("", code="import time; time.sleep(60)")
    assert found is None
    assert "no answer" in failure


def test_little_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor_checks, "_FREE_BYTES", 1 << 62)
    assert len([f for f in doctor_checks._machine() if f.problem]) == 2


def test_memory_is_read():
    memory = doctor_checks._memory()
    assert 0 < memory["MemAvailable"] <= memory["MemTotal"]
    assert memory["MemTotal"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 1.01


def test_json_of_a_report(monkeypatch, capsys):
    findings = [Finding("versions", "python", "3.11 (x)", "3.11")]
    monkeypatch.setattr(doctor_checks, "check_everything", lambda: findings)
    found = report(capsys, "doctor")
    assert found["versions"]["python"] == {"value": "3.11", "text": "3.11 (x)", "remedy": None}


# ---------------------------------------------------------------- layouts

LAYOUT = ("doctor", "--layout", "examples/parallel/everything.toml")


def test_a_layout_is_shown_without_any_rank(capsys):
    out = printed(capsys, *LAYOUT, "--ranks", 16, "--parallel.zero=full")
    first, head, *rows = out.splitlines()
    assert first == "16 ranks = pp 2 × dp 4 × tp 2, dp = edp 2 × ep 2"
    assert head.split() == ["axis", "size", "with", "rank", "0", "spread", "over", "it"]
    assert [row.split()[0] for row in rows] == ["pp", "dp", "edp", "ep", "tp"]
    found = report(capsys, *LAYOUT, "--ranks", 16)
    assert found["ranks"] == 16
    assert found["axes"]["edp"] == {"size": 2, "stride": 4, "spread": "copies of the experts"}


def test_a_layout_that_does_not_fit_is_refused():
    message = refusal(*LAYOUT, "--ranks", 12, "--parallel.tp=3")
    assert "parallel.tp=3 must divide model.num_heads=4 (switch-tiny)" in message


@pytest.mark.parametrize("words", [LAYOUT, ("doctor", "--ranks", "2"), ("doctor", "--jsn")])
def test_options_that_make_no_sense(words):
    with pytest.raises(click.UsageError):
        run(*words)
