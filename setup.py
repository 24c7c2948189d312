"""Compiles the kernels when decal is installed; all else about the package is in pyproject.toml.

Wheels hold the library and are tagged py3-none-PLATFORM: it uses nothing of Python's. An editable
install puts it beside its Python files. Without a compiler, or where it fails, the package is
installed without the library, with a warning, and runs in plain torch.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


@cache
def library() -> Path | None:
    """The library, compiled in build/; None where it cannot be."""
    build = runpy.run_path(str(HERE / "native" / "build.py"))["build"]
    reason = "no C++ compiler found ($CXX, c++, g++, clang++)"
    try:
        made: Path | None = build(HERE / "build" / "native" / "_native.so")
    except (OSError, subprocess.CalledProcessError) as error:
        made, reason = None, f"the C++ compiler failed: {error}"
    if made is None:
        warnings.warn(f"{reason}; decal is installed without compiled kernels", stacklevel=2)
    return made


class BuildPy(build_py):
    """Python files, and the library beside them."""

    def run(self) -> None:
        super().run()
        target = Path("src" if self.editable_mode else self.build_lib) / self._beside()
        if (made := library()) is None:
            if not self.editable_mode:
                target.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        shutil.copy2(made, part)
        part.rename(target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        made = [] if library() is None else [str(Path(self.build_lib) / self._beside())]
        return [*super().get_outputs(include_bytecode), *made]

    @staticmethod
    def _beside() -> Path:
        return Path("decal", "kernels", "_native.so")


class Wheel(bdist_wheel):
    """Of this platform and any Python 3 with the library, of any platform without it."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = library() is None
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
