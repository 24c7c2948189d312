"""The compiled library: finding it, choosing its instruction set, calling it.

Knows no ops: each `native_*.py` beside this file holds the calls of some ops, under the names and
with the meaning of their reference. A function there answers NotImplemented for arguments that the
library does not take (another device or dtype, strides), and `ops.py` then asks the next backend.

Every kernel is compiled once per instruction set; the best one that the processor runs is chosen
when the library is loaded. Environment: DECAL_ISA names one of `ISAS` or `off`; DECAL_NATIVE is the
path of another build of the library. What they name and is not there is an error.

In a checkout the sources lie beside the package. A library of other sources is not used, because
ctypes cannot see what parameters its functions have; `decal env` says that it is out of date.

Threads are torch's: the library borrows the OpenMP runtime that torch has loaded and asks for
torch's number of threads at every call. They share outputs and never a sum, so no result depends
on their number; instruction sets round differently. After a fork it uses one, because the
runtime's team did not come along.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal.errors import ConfigError

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "portable")
"""Best first."""
LIBRARY = Path(__file__).with_name("_native.so")
SOURCES = Path(__file__).parents[3] / "native"
"""Where they are in a checkout; an installed package came with its library."""
REBUILD = "make native"

_forced: str | None = None
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def switched_off() -> bool:
    """Whether DECAL_ISA asks for no compiled kernels."""
    return os.environ.get("DECAL_ISA") == "off"


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is not used."""
    given = os.environ.get("DECAL_NATIVE")
    path = Path(given) if given else LIBRARY
    if switched_off():
        return None, "switched off by DECAL_ISA"
    if not path.is_file():
        if given:
            raise ConfigError(f"DECAL_NATIVE is `{given}`, which is not a file")
        return None, "not built: no C++ compiler worked when decal was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    outdated = f"{path.name} is out of date: run `{REBUILD}`"
    try:
        library.decal_supports.argtypes = [ctypes.c_char_p]
        library.decal_sources.restype = ctypes.c_char_p
        library.decal_team.argtypes = [ctypes.c_int]
        if _sources() not in (None, library.decal_sources().decode()):
            return None, outdated
        _borrow_threads(library)
    except AttributeError:
        return None, outdated
    return library, "compiled"


def _sources() -> str | None:
    """The hash of native/build.py's `sources`; None where there are none."""
    paths = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    if SOURCES / "vec.h" not in paths:
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _borrow_threads(library: ctypes.CDLL) -> None:
    """Hands over torch's OpenMP runtime, found among what the process has loaded."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    for path in _openmp_libraries():
        try:
            runtime = ctypes.CDLL(path)
            found = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
        except (OSError, AttributeError):
            continue
        library.decal_use_openmp(*found)
        return


def _openmp_libraries() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        maps = ""
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "omp" in line)
    near = Path(torch.__file__).parent
    return sorted(
        (path for path in paths if ".so" in path and "omp" in Path(path).name),
        key=lambda path: not path.startswith(str(near)),
    )


@cache
def available() -> tuple[str, ...]:
    """The instruction sets that the library has kernels for and this processor runs."""
    library, _ = _library()
    if library is None:
        return ()
    return tuple(
        isa
        for isa in ISAS
        if hasattr(library, f"decal_built_{isa}") and library.decal_supports(isa.encode())
    )


@cache
def _default() -> str | None:
    """The instruction set of DECAL_ISA, or the best one.

    Raises:
        ConfigError: DECAL_ISA names none that runs here.
    """
    wanted, found = os.environ.get("DECAL_ISA"), available()
    if not wanted or wanted == "off":
        return found[0] if found else None
    if wanted in found:
        return wanted
    library, reason = _library()
    have = f"there is {', '.join(found)}, or off" if library else reason
    known = "cannot run here" if wanted in ISAS else "is no instruction set"
    raise ConfigError(f"DECAL_ISA is `{wanted}`, which {known}: {have}")


def isa() -> str | None:
    """The instruction set in use; None where the library is not used."""
    chosen = _forced or _default()
    return None if chosen == "none" else chosen


def why() -> str:
    """How the choice came about, in a few words."""
    library, reason = _library()
    if library is None:
        return reason
    return isa() or "not used here"


def state() -> dict[str, Any]:
    """What there is of compiled kernels and what is used: plain values."""
    library, reason = _library()
    if library is None:
        return {"library": reason}
    return {
        "library": reason,
        "available": list(available()),
        "in_use": isa(),
        "threads": team(),
    }


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Inside the block the kernels of one instruction set run; `none`: the library is not used."""
    global _forced
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


@cache
def _bound(name: str, of: str) -> Any:
    library, _ = _library()
    if library is None:
        return None
    function = getattr(library, f"decal_{name}_{of}", None)
    if function is not None:
        function.restype = None
    return function


def recorded() -> bool:
    """Whether torch's operators are recorded or replaced: torch.compile, tracing, fake tensors."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return bool(torch._C._len_torch_dispatch_stack())


def kernel(name: str) -> Callable[..., None] | None:
    """The compiled function of an op in the instruction set in use; None where there is none.

    None too where torch's operators are recorded or replaced: what they do not see is lost, and
    fake tensors have no memory to read.
    """
    if recorded():
        return None
    chosen = isa()
    return None if chosen is None else _bound(name, chosen)


def threads() -> int:
    """How many threads a kernel may use now."""
    return 1 if _forked else torch.get_num_threads()


def team() -> int:
    """How many threads a kernel gets when it asks for `threads()`."""
    library, _ = _library()
    return 0 if library is None else library.decal_team(threads())


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """A tensor's memory, for a kernel; null for None."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
