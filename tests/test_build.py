"""native/build.py and setup.py: a library where there is a compiler, decal without it elsewhere."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from decal.kernels import native

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "native" / "build.py"

TRAINS = """
import torch
from decal.kernels import native, ops
assert native.isa() is None, native.why()
print(native.why())
x = torch.randn(3, 64, requires_grad=True)
packed, absmax = ops.quantize_8bit(torch.randn(128), ops.dynamic_map(), 64)
w = ops.dequantize_8bit(packed, absmax, ops.dynamic_map(), 64).view(2, 64)
(x @ w.T).square().sum().backward()
assert torch.isfinite(x.grad).all()
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """build.py with its objects in a folder of the test."""
    loaded = runpy.run_path(str(BUILD))
    monkeypatch.setitem(loaded["build"].__globals__, "OBJECTS", tmp_path / "objects")
    return SimpleNamespace(**{**loaded, "into": loaded["build"].__globals__})


def needs_compiler() -> None:
    if sys.platform == "win32" or runpy.run_path(str(BUILD))["compiler"]() is None:
        pytest.skip("no C++ compiler")


def exports(library: Path) -> set[str]:
    """The names of the library that begin with decal_, as they stand in its string table."""
    found = library.read_bytes().split(b"\0")
    return {name.decode() for name in found if name.startswith(b"decal_")}


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **env}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


def test_one_source_builds_and_is_kept(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails when an object is compiled again though nothing changed, or not again after a change of
    a header; when an instruction set that the compiler does not know stops the others."""
    needs_compiler()
    small = tmp_path / "native"
    small.mkdir()
    for name in ("built.cpp", "isa.cpp", "parallel.cpp", "parallel.h", "vec.h"):
        shutil.copy(ROOT / "native" / name, small)
    monkeypatch.setitem(build.into, "HERE", small)
    monkeypatch.setitem(build.into["ISAS"], "strange", ["-mno-such-instructions"])
    isas = ("portable", "strange", "of_another_processor")
    made = build.build(tmp_path / "out" / "_native.so", isas=isas)
    assert {"decal_built_portable", "decal_sources", "decal_supports"} <= exports(made)
    assert "decal_built_strange" not in exports(made)
    objects = {path: path.stat().st_mtime_ns for path in (tmp_path / "objects").glob("*.o")}
    assert build.build(made, isas=isas) == made
    assert objects == {p: p.stat().st_mtime_ns for p in (tmp_path / "objects").glob("*.o")}
    with (small / "vec.h").open("a") as header:
        header.write("// changed\n")
    build.build(made, isas=isas)
    assert len(list((tmp_path / "objects").glob("*.o"))) > len(objects)
    assert not list(tmp_path.rglob(f"*.{os.getpid()}"))


def test_both_sides_hash_the_same_sources(build: SimpleNamespace) -> None:
    """Fails when the library that was built just now is said to be out of date."""
    assert native._sources() == build.sources()


def test_no_compiler(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails when a missing compiler is an error."""
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert build.compiler() is None
    assert build.build(tmp_path / "_native.so") is None
    assert not (tmp_path / "_native.so").exists()


def test_a_compiler_that_fails_leaves_the_old_library(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails when half a library is left, or the failure is not told."""
    if shutil.which("false") is None:
        pytest.skip("no `false`")
    monkeypatch.setenv("CXX", "false")
    library = tmp_path / "_native.so"
    library.write_bytes(b"old")
    with pytest.raises(subprocess.CalledProcessError):
        build.build(library, isas=["portable"])
    assert library.read_bytes() == b"old"


def test_an_older_library_is_left_alone(tmp_path: Path) -> None:
    """Fails when a library that lacks a function of today crashes decal."""
    needs_compiler()
    source, old = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" int decal_supports(const char*) { return 1; }\n')
    compiler = runpy.run_path(str(BUILD))["compiler"]()
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", old], check=True)
    done = run_python(TRAINS, DECAL_NATIVE=str(old))
    assert done.returncode == 0, done.stderr
    assert native.REBUILD in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["c++", "false", "no-such-compiler"])
def test_wheel(compiler: str, tmp_path: Path) -> None:
    """Fails when the wheel lacks the library, is bound to one Python, or is called pure though it
    is not; when without a compiler there is no wheel."""
    if compiler == "c++":
        needs_compiler()
    where = tmp_path / "decal"
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
    where.mkdir()
    for name in names:
        shutil.copy(ROOT / name, where)
    leave = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("native", "src"):
        shutil.copytree(ROOT / name, where / name, ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(tmp_path / "dist"), "."]
    env = {**os.environ, "CXX": compiler}
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert "-py3-none-" in wheel.name
    if compiler == "c++":
        assert libraries == ["decal/kernels/_native.so"]
        assert not wheel.name.endswith("-any.whl")
    else:
        assert libraries == []
        assert wheel.name.endswith("-any.whl")


def test_instruction_sets_share_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A function that two of them define under one name is linked from either.

    Fails when a kernel uses std::vector, whose functions would then run AVX-512 on a processor
    without it.
    """
    needs_compiler()
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols with")
    loaded = runpy.run_path(str(BUILD))
    commands: list[list[object]] = []
    real = subprocess.run

    def run(command: list[object], **given: object) -> object:
        commands.append(command)
        return real(command, **given)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", run)
    loaded["build"](tmp_path / "_native.so")  # its objects are those that `make native` keeps
    linked = next(command for command in commands if "-shared" in command)
    objects = [o for o in linked if str(o).endswith(".o")]
    kernels = [o for o in objects if Path(str(o)).name.split("-")[0] not in loaded["ONCE"]]
    text = subprocess.check_output(["nm", "--demangle", "--defined-only", *map(str, kernels)])
    symbols = [line.split(maxsplit=2) for line in text.decode().splitlines()]
    weak = {s[2] for s in symbols if len(s) == 3 and s[1] in "WVu" and "decal_" not in s[2]}
    assert not weak
