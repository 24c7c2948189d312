"""Compiles native/ into one shared library: every kernel once per instruction set.

    python native/build.py                      src/decal/kernels/_native.so
    python native/build.py --sanitize FOLDER    with AddressSanitizer and UBSan, elsewhere
    python native/build.py --isas portable,avx2 --library FILE    some of it only

Knows nothing of Python's or torch's headers: the library has a plain C interface, so one build
serves every Python and every torch. Objects are kept in build/native and made anew only where a
source or the flags changed. Installing decal calls `build`; without a compiler it does nothing, and
decal runs in plain torch. An instruction set whose flags the compiler does not know is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent / "src" / "decal" / "kernels" / "_native.so"
OBJECTS = HERE.parent / "build" / "native"

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-exceptions"]
COMMON += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"]
COMMON += ["-Wno-maybe-uninitialized"]
CLANG = ["-Wno-unknown-warning-option"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]

EMULATED = ["-DEMULATED_TILES"]

ISAS: dict[str, list[str]] = {"portable": []}
"""Flags by instruction set; each gets its own copy of every kernel."""
if platform.machine().lower() in ("x86_64", "amd64"):
    avx512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    avx512 += ["-mprefer-vector-width=512"]
    bf16 = [*avx512, "-mavx512bf16", "-DDOT_BF16"]
    ISAS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": avx512,
        "avx512bf16": bf16,
        "amx": [*bf16, "-mamx-tile", "-mamx-bf16", "-DAMX"],
    }

EXACT = {"quantize.cpp": ["-ffp-contract=off"]}
"""Sources whose results must not depend on whether a multiplication and an addition were fused."""
ONCE = {"isa.cpp", "parallel.cpp"}
"""Sources that are not kernels."""


def compiler() -> list[str] | None:
    """The C++ compiler of $CXX, or the usual names; None where there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    names = [given] if given else [["c++"], ["g++"], ["clang++"]]
    return next((name for name in names if shutil.which(name[0])), None)


def known(found: list[str], isa: str) -> bool:
    """Whether the compiler takes the flags of an instruction set, and it is one of this machine."""
    if isa not in ISAS:
        return False
    command = [*found, *ISAS[isa], "-Werror", "-x", "c++", "-c", os.devnull, "-o"]
    part = OBJECTS / f"known-{os.getpid()}.o"
    done = subprocess.run([*command, part], capture_output=True).returncode == 0
    part.unlink(missing_ok=True)
    return done


def jobs(isas: Sequence[str], flags: list[str]) -> list[tuple[Path, list[str]]]:
    """(source, flags) of every object."""
    found = []
    stamp = {"isa.cpp": [f'-DSOURCES="{sources()}"']}
    for source in sorted(HERE.glob("*.cpp")):
        exact = EXACT.get(source.name, [])
        if source.name in ONCE:
            found.append((source, [*flags, *exact, *stamp.get(source.name, [])]))
        else:
            found += [(source, [*flags, *ISAS[isa], f"-DISA={isa}", *exact]) for isa in isas]
    return found


def sources() -> str:
    """A hash of all sources; native.py computes it too, and leaves an older library alone."""
    paths = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def build(
    library: Path = LIBRARY,
    *,
    sanitize: bool = False,
    emulate: bool = False,
    isas: Sequence[str] = tuple(ISAS),
) -> Path | None:
    """Writes the library; returns its path, or None where there is no compiler.

    With `emulate` the tile instructions of amx are loops (native/tiles.h), for tests on processors
    without them.

    Raises:
        subprocess.CalledProcessError: the compiler refused a source; its words are on stderr.
        OSError: a file cannot be written.
    """
    found = compiler()
    if found is None or sys.platform == "win32":
        return None
    flags = [*COMMON, *(SANITIZED if sanitize else []), *(EMULATED if emulate else [])]
    version = subprocess.run([*found, "--version"], capture_output=True, text=True).stdout
    if "clang" in version:
        flags = [*flags, *CLANG]
    headers = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")))
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compiled(job: tuple[Path, list[str]]) -> Path:
        source, given = job
        text = source.read_bytes() + headers
        key = hashlib.sha256(repr((found, version, given)).encode() + text).hexdigest()[:16]
        target = OBJECTS / f"{source.name}-{key}.o"
        if not target.exists():
            command = [*found, *given, "-I", HERE, "-c", source, "-o"]
            _whole(target, lambda part: subprocess.run([*command, part], check=True))
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        taken = [isa for isa in isas if known(found, isa)]
        objects = list(pool.map(compiled, jobs(taken, flags)))
    library.parent.mkdir(parents=True, exist_ok=True)
    link = [*found, "-shared", "-pthread", *(SANITIZED if sanitize else []), *objects, "-o"]
    _whole(library, lambda part: subprocess.run([*link, part], check=True))
    return library


def preload() -> str:
    """What LD_PRELOAD must hold for a sanitized library in a Python that is not.

    libstdc++ is part of it: the sanitizer looks for the throwing of exceptions when it starts, and
    Python itself does not bring it.
    """
    found = compiler() or ["c++"]
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    asked = ([*found, f"-print-file-name={name}"] for name in names)
    return ":".join(subprocess.check_output(each, text=True).strip() for each in asked)


def _whole(target: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside its place and renamed: nobody ever sees half of it."""
    part = target.with_suffix(f".{os.getpid()}")
    try:
        write(part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile decal's kernels.")
    parser.add_argument("--sanitize", metavar="FOLDER", type=Path)
    parser.add_argument("--emulate", action="store_true", help="amx in plain loops")
    parser.add_argument("--library", metavar="FILE", type=Path, default=LIBRARY)
    parser.add_argument("--isas", default=",".join(ISAS), help="of these: %(default)s")
    parser.add_argument("--preload", action="store_true", help="print LD_PRELOAD for --sanitize")
    given = parser.parse_args()
    if given.preload:
        print(preload())
        return 0
    library = given.sanitize / LIBRARY.name if given.sanitize else given.library
    try:
        made = build(
            library,
            sanitize=bool(given.sanitize),
            emulate=given.emulate,
            isas=given.isas.split(","),
        )
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]} failed (exit code {error.returncode})", file=sys.stderr)
        return 1
    print(made or "no C++ compiler found: decal will run in plain torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
