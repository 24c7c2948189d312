"""Compiles native/ into one shared library: every kernel once per instruction set.

    python native/build.py                      src/decal/kernels/_native.so
    python native/build.py --sanitize FOLDER    with AddressSanitizer and UBSan, elsewhere

Knows nothing of Python's or torch's headers: the library has a plain C interface, so one build
serves every Python and every torch. Objects are kept in build/native and made anew only where a
source or the flags changed. Installing decal calls `build`; without a compiler it does nothing, and
decal runs in plain torch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent / "src" / "decal" / "kernels" / "_native.so"
OBJECTS = HERE.parent / "build" / "native"

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-exceptions"]
COMMON += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]

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
    given = os.environ.get("CXX", "").split()
    names = [given] if given else [["c++"], ["g++"], ["clang++"]]
    return next((name for name in names if shutil.which(name[0])), None)


def jobs(flags: list[str]) -> list[tuple[str, list[str]]]:
    """(source, flags) of every object."""
    found = []
    for source in sorted(path.name for path in HERE.glob("*.cpp")):
        isas = {"": []} if source in ONCE else ISAS
        for isa, special in isas.items():
            name = [f"-DISA={isa}"] if isa else []
            found.append((source, [*flags, *special, *name, *EXACT.get(source, [])]))
    return found


def build(library: Path = LIBRARY, *, sanitize: bool = False) -> Path | None:
    """Writes the library; returns its path, or None where there is no compiler.

    Raises:
        subprocess.CalledProcessError: the compiler refused a source; its words are on stderr.
    """
    found = compiler()
    if found is None or sys.platform == "win32":
        return None
    flags = [*COMMON, *SANITIZED] if sanitize else COMMON
    version = subprocess.run([*found, "--version"], capture_output=True, text=True).stdout
    headers = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")))
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compiled(job: tuple[str, list[str]]) -> Path:
        source, given = job
        text = (HERE / source).read_bytes() + headers
        key = hashlib.sha256(repr((found, version, given)).encode() + text).hexdigest()[:16]
        target = OBJECTS / f"{source}-{key}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            subprocess.run(
                [*found, *given, "-c", HERE / source, "-o", part, "-x", "none"], check=True
            )
            part.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compiled, jobs(flags)))
    link = ["-shared", "-pthread", *(SANITIZED if sanitize else [])]
    part = library.with_suffix(f".{os.getpid()}")
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*found, *link, *objects, "-o", part], check=True)
    part.rename(library)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile decal's kernels.")
    parser.add_argument("--sanitize", metavar="FOLDER", type=Path)
    folder = parser.parse_args().sanitize
    if folder is not None:
        print(build(folder / "_native.so", sanitize=True))
        return
    print(build() or "no C++ compiler found: decal will run in plain torch")


if __name__ == "__main__":
    main()
