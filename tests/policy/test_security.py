"""Rules that keep texts of users from becoming programs, and the licences of what is needed."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)
SOURCES = [p for f in ("megaswitch", "tools", "examples") for p in sorted((ROOT / f).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_text_becomes_a_program(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "os.system", "os.popen", "pickle.loads"), name
        assert not any(
            keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
            for keyword in node.keywords
        ), f"{path} starts a shell"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/slurm").glob("*.*h")), ids=lambda p: p.name
)
def test_scripts_quote_what_they_are_given(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\beval\b|(?<!\")\$@|\$\*", text)


def test_every_requirement_has_a_licence_that_allows_its_use():
    found = audit.requirements("megaswitch")
    assert {"torch", "numpy", "mpmath"} <= set(found)  # theirs, too
    refused = [n for n in found if not audit.is_allowed(n, audit.licence(n))]
    assert refused == []


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("MIT", True), ("GPL-3.0-only", False), ("MIT OR GPL-2.0-only", True), ("AGPL-3.0", False),
     ("Apache Software License", True), ("not stated", False), ("Proprietary", False)],
)  # fmt: skip
def test_licences(text, allowed):
    assert audit.is_allowed("some-package", text) == allowed
