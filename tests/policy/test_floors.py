"""The house keeps its floors: imports point downward, siblings never import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "megaswitch"
FLOORS = [
    {
        "log",
        "files",
        "events",
        "metrics_file",
        "storage",
        "presets",
        "schema",
        "schema_data",
        "schema_distill",
        "schema_fault",
        "schema_fp8",
        "schema_keys",
        "schema_moe",
        "rules",
        "rules_distill",
        "rules_moe",
        "rules_parallel",
        "config",
        "native",
    },
    {"parallel"},
    {"layers"},
    {"model", "data"},
    {"optim", "checkpoint"},
    {"train"},
    {"scale"},
    {"cli", "__init__"},
    {"__main__"},
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}
MODULES = sorted(ROOT.rglob("*.py"))


def house_of(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            assert node.module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    here = house_of(path)
    assert here in FLOOR_OF, f"give {here} a floor"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "megaswitch" or len(parts) < 2 or parts[1] not in FLOOR_OF:
            continue
        there = parts[1]
        below = FLOOR_OF[there] < FLOOR_OF[here]
        ground = FLOOR_OF[there] == FLOOR_OF[here] == 0
        assert there == here or below or ground, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_named_module_imports(path):
    owners = {
        "megaswitch._C": "native.py",
        "transformer_engine": "layers/te_backend.py",
        "transformers": None,  # parity is for tests; the package never needs it
        "pickle": None,
    }
    for name in imported(path):
        for guarded, owner in owners.items():
            if name == guarded or name.startswith(guarded + "."):
                assert str(path.relative_to(ROOT)) == owner, f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "model").rglob("*.py")), ids=lambda p: p.name)
def test_the_model_names_no_rank_or_group(path):
    assert not any(name.startswith("torch.distributed") for name in imported(path))
    assert "megaswitch.parallel.mesh" not in imported(path)


def test_files_and_functions_stay_short():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
