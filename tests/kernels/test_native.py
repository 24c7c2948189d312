"""Loading the compiled library: its choice, its threads, and what happens when it does not fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from decal.errors import ConfigError
from decal.kernels import native, ops

needs_library = pytest.mark.skipif(not native.available(), reason="the library is not built")
CACHES = (native._library, native.available, native._default, native._bound)


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Environment variables that take effect, as if decal were loaded anew."""
    for cache in CACHES:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in CACHES:
        cache.cache_clear()


def computed() -> tuple[torch.Tensor, torch.Tensor]:
    """Something that a kernel computes on several threads."""
    x = torch.arange(513 * 129, dtype=torch.float32).sin().view(513, 129)
    codes, absmax = ops.quantize_rows(x)
    return codes, absmax


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_library
def test_the_best_is_chosen_and_each_can_be_asked_for(env: pytest.MonkeyPatch) -> None:
    """Fails when DECAL_ISA is ignored, or the order of ISAS."""
    found = native.available()
    assert list(found) == [isa for isa in native.ISAS if isa in found]
    assert found[-1] == "portable"
    env.delenv("DECAL_ISA", raising=False)
    assert native.isa() == found[0]
    native._default.cache_clear()
    env.setenv("DECAL_ISA", "portable")
    assert native.isa() == "portable"
    with native.forced("none"):
        assert native.isa() is None
        assert native.kernel("built") is None


@pytest.mark.parametrize(("name", "says"), [("avx1024", "is no instruction set"), ("", None)])
def test_unknown_name(env: pytest.MonkeyPatch, name: str, says: str | None) -> None:
    """Fails when a typo in DECAL_ISA silently leaves the choice as it was."""
    env.setenv("DECAL_ISA", name)
    if says is None:
        assert native.isa() == (native.available() or (None,))[0]
        return
    with pytest.raises(ConfigError, match=f"`{name}`, which {says}"):
        computed()


def test_known_name_that_cannot_run(env: pytest.MonkeyPatch) -> None:
    """Fails when an instruction set of another processor is called (an illegal instruction)."""
    env.setattr(native, "available", lambda: ("portable",))
    env.setenv("DECAL_ISA", "amx")
    with pytest.raises(ConfigError, match="cannot run here"):
        native.isa()


def test_off(env: pytest.MonkeyPatch) -> None:
    """Fails when `off` loads the library, or an op has no other implementation."""
    env.setenv("DECAL_ISA", "off")
    assert native.available() == ()
    assert native.kernel("built") is None
    assert native.state() == {"library": "switched off by DECAL_ISA"}
    assert {choice.backend for choice in ops.explain().values()} == {"torch"}
    assert "switched off by DECAL_ISA" in ops.explain()["quantize_4bit"].reason
    off = computed()
    env.delenv("DECAL_ISA")
    for cache in CACHES:
        cache.cache_clear()
    assert same(computed(), off)


def test_no_library(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when decal cannot do without, or does not say why."""
    env.delenv("DECAL_NATIVE", raising=False)
    env.setattr(native, "LIBRARY", tmp_path / "_native.so")
    computed()
    assert "no C++ compiler" in ops.explain()["quantize_4bit"].reason


def test_a_named_library_must_be_there(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when a wrong DECAL_NATIVE falls back to another library."""
    env.setenv("DECAL_NATIVE", str(tmp_path / "none.so"))
    with pytest.raises(ConfigError, match="not a file"):
        native.isa()


def test_a_file_that_is_no_library(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when what cannot be loaded stops decal."""
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF" + bytes(64))
    env.setenv("DECAL_NATIVE", str(broken))
    assert native.isa() is None
    assert "cannot be loaded" in native.why()


@needs_library
def test_a_library_of_other_sources_is_not_used(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when an older library is called with the arguments of a newer source, or when there is
    no word of it."""
    env.delenv("DECAL_ISA", raising=False)
    env.setattr(native, "SOURCES", tmp_path)
    assert native.isa() is not None  # installed: no sources to compare with
    for cache in CACHES:
        cache.cache_clear()
    (tmp_path / "vec.h").write_text("// another day's\n")
    assert native.isa() is None
    assert native.kernel("quantize_rows") is None
    assert native.REBUILD in native.why()
    assert native.REBUILD in ops.explain()["quantize_rows"].reason
    assert native.REBUILD in native.state()["library"]
    computed()


@needs_library
def test_calls_from_several_threads(env: pytest.MonkeyPatch) -> None:
    """Fails when kernels share scratch memory between calls."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = computed()
        with ThreadPoolExecutor(4) as pool:
            results = [each.result() for each in [pool.submit(computed) for _ in range(32)]]
    finally:
        torch.set_num_threads(before)
    assert all(same(result, expected) for result in results)


@needs_library
def test_set_num_threads_is_obeyed() -> None:
    """Fails when the team's size is fixed when the library is loaded."""
    before = torch.get_num_threads()
    try:
        for wanted in (1, 2, 3):
            torch.set_num_threads(wanted)
            assert native.team() == wanted
    finally:
        torch.set_num_threads(before)


FORKS = """
import os, torch
from decal.kernels import native, ops
x = torch.arange(513 * 129, dtype=torch.float32).sin().view(513, 129)
runtimes = native._openmp_libraries()
held = lambda: [bytes(y.numpy()) for y in ops.quantize_rows(x)]  # torch itself hangs in a fork
expected = held()
assert native.team() == 2, native.team()
child = os.fork()
if child == 0:
    os._exit(0 if held() == expected and native.team() == 1 else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert native.team() == 2
assert len(runtimes) == 1 and native._openmp_libraries() == runtimes, runtimes
"""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fork_and_one_runtime() -> None:
    """Fails when a child waits for threads that fork left behind (it would hang), when
    OMP_NUM_THREADS is ignored, or when the library brings an OpenMP runtime of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKS], env=env, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_needs_no_openmp_and_no_torch() -> None:
    """Fails when it is linked with -fopenmp: a second runtime beside torch's."""
    path = os.environ.get("DECAL_NATIVE") or native.LIBRARY
    listed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed.stdout)
    assert needed
    assert not [name for name in needed if re.search(r"omp|torch|python", name)]


@needs_library
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
def test_torch_computes_what_is_watched() -> None:
    """Compilers, traces and modes that stand in for tensors. Fails when a kernel reads a fake
    tensor's memory, leaves its result out of a graph, or cuts the graph."""
    x, A = torch.randn(2, 9, 70).bfloat16()
    wanted = ops.into_rank(x, A)
    graph = torch.compile(ops.into_rank, backend="eager", fullgraph=True)
    trace = torch.jit.trace(ops.into_rank, (x * 2, A * 2))
    for found in (graph(x, A), trace(x, A)):
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)
    with FakeTensorMode() as mode:
        assert ops.into_rank(mode.from_tensor(x), mode.from_tensor(A)).shape == wanted.shape
    assert native.kernel("gemm") is not None
