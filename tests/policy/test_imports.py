"""Importing costs nothing that a laptop lacks."""

import subprocess
import sys

PROBE = """
import importlib.abc, pkgutil, sys

FORBIDDEN = {"transformers", "transformer_engine", "matplotlib", "datasets", "apex", "pyarrow"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import megaswitch
for module in pkgutil.walk_packages(megaswitch.__path__, "megaswitch."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
# torch looks for some of these itself, so that only what was imported counts.
assert not {"sklearn", "scipy", "rouge_score", "sacrebleu"} & set(sys.modules)
"""


def test_no_module_needs_an_extra():
    subprocess.run([sys.executable, "-c", PROBE], check=True, timeout=120)


def test_help_does_not_import_torch():
    code = (
        "import sys; from click.testing import CliRunner; from megaswitch.cli import cli;"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
