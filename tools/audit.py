"""Licences of all that MegaSwitch needs, and vulnerabilities that are known of it: `make audit`.

Looks at the installed versions of MegaSwitch's requirements and of theirs. Ends with code 1 if a
licence is not on the list below, or if the index knows a vulnerability.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Licences under which a product may be given on together with what uses it, by a word of theirs.
ALLOWED = (
    "apache", "mit", "bsd", "psf", "python software foundation", "isc", "mpl", "mozilla public",
    "unlicense", "zlib", "hpnd", "historical permission", "0bsd", "cnri-python", "public domain",
)  # fmt: skip
# NVIDIA's libraries, which CUDA builds of torch bring along; their terms allow that.
PROPRIETARY = re.compile(r"^(nvidia-|cuda-)")


def requirements(root: str, extras: frozenset[str] = frozenset()) -> dict[str, str]:
    """Installed versions of `root`'s requirements and, in turn, of theirs."""
    found: dict[str, str] = {}
    waiting = [(root, extras)]
    while waiting:
        name, wanted = waiting.pop()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            match = re.match(r"([\w.-]+)(?:\[([\w, -]+)\])?", line)
            extra = re.search(r"extra == [\"']([\w-]+)[\"']", line)
            if match is None or (extra and extra[1] not in wanted):
                continue
            key = re.sub(r"[-_.]+", "-", match[1]).lower()
            if key in found:
                continue
            try:
                found[key] = importlib.metadata.version(key)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform
            more = frozenset(part.strip() for part in (match[2] or "").split(",") if part.strip())
            waiting.append((key, more))
    return dict(sorted(found.items()))


def licence(name: str) -> str:
    """What a package says of its licence: an SPDX expression, classifiers, or its first words."""
    data = importlib.metadata.metadata(name)
    if expression := data.get("License-Expression"):
        return expression
    classifiers = [c for c in data.get_all("Classifier") or [] if c.startswith("License ::")]
    if classifiers:
        return "; ".join(c.rpartition(" :: ")[2] for c in classifiers)
    return (data.get("License") or "not stated").strip().splitlines()[0][:60]


def is_allowed(name: str, text: str) -> bool:
    """Whether a package under this licence may be a requirement."""
    if PROPRIETARY.match(name):
        return True
    # A choice needs one allowed licence; what must be kept together needs all.
    words = text.lower()
    if "agpl" in words or re.search(r"\bgpl", words):
        return " or " in words and any(word in words for word in ALLOWED)
    return any(word in words for word in ALLOWED)


def vulnerabilities(found: dict[str, str]) -> int:
    """Ask the index with pip-audit; its exit code, not 0 either where the index does not answer."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        pins = [f"{name}=={version.partition('+')[0]}" for name, version in found.items()]
        listed.write_text("\n".join(pins) + "\n")
        words = ["-m", "pip_audit", "--strict", "--no-deps", "--disable-pip", "-r", str(listed)]
        return subprocess.run([sys.executable, *words], check=False).returncode


def main() -> int:
    """Run both checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--licences-only", action="store_true", help="ask no index")
    options = parser.parse_args()
    found = requirements("megaswitch")
    refused = []
    for name, version in found.items():
        text = licence(name)
        mark = " " if is_allowed(name, text) else "!"
        refused += [name] if mark == "!" else []
        print(f"{mark} {name:28} {version:16} {text}")
    if refused:
        print(f"licences not on the list of {__file__}: {', '.join(refused)}", file=sys.stderr)
    if options.licences_only:
        return int(bool(refused))
    return int(bool(refused) or bool(vulnerabilities(found)))


if __name__ == "__main__":
    sys.exit(main())
