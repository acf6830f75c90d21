"""Builds the C++ core; everything else is declared in pyproject.toml."""

import sys
from glob import glob

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    sys.exit(
        "megaswitch: pybind11 is needed to build the C++ core and was not found. "
        "Install it first (`pip install pybind11`) or leave out --no-build-isolation."
    )


class BuildOrExplain(build_ext):
    """Compiles the extension; a failure ends the installation with what is missing."""

    def build_extension(self, ext: Pybind11Extension) -> None:  # type: ignore[override]
        """Build `ext`, or stop with a remedy: there is no Python path to fall back to."""
        try:
            super().build_extension(ext)
        except Exception as error:
            raise RuntimeError(
                "megaswitch: the C++ core (csrc/) could not be compiled, and it is not "
                "optional. A C++17 compiler and the Python headers are needed, e.g. "
                "`apt-get install g++ python3-dev` or `xcode-select --install`. "
                f"The compiler said: {error}"
            ) from error


setup(
    ext_modules=[
        Pybind11Extension(
            "megaswitch._C",
            sources=sorted(glob("csrc/*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra"]
            if sys.platform != "win32"
            else [],
        )
    ],
    cmdclass={"build_ext": BuildOrExplain},
)
