"""`decal env`: versions, machine and kernels. Loads no model and touches no network."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from decal.kernels import native, ops
from decal.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")
PEERS = ("peft", "bitsandbytes", "accelerate", "triton")

ISA = [
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
]
"""Processor flags that decide which kernels can run."""


def env() -> dict[str, Any]:
    """What a bug report needs: plain values, ready for JSON. Memory is in bytes."""
    return {
        "versions": _versions(),
        "system": {
            "os": platform.platform(),
            "machine": platform.machine(),
            "python": platform.python_implementation(),
        },
        "cpu": _cpu(),
        "memory": memory(),
        "gpus": _gpus(),
        "native": native.state(),
        "kernels": {name: _choice(choice) for name, choice in ops.explain().items()},
    }


def _versions() -> dict[str, str]:
    found = {"decal": __version__, "python": platform.python_version()}
    for name in (*PACKAGES, *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in PACKAGES:
                found[name] = "not installed"
    return found


def _cpu() -> dict[str, Any]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in ISA if flag in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty on systems without it."""
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        if not line.strip():
            break
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _usable_cores() -> int | None:
    """Cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def memory() -> dict[str, int]:
    """Bytes of memory, of what is free now, and of a container's limit if there is one."""
    found: dict[str, int] = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[{"MemTotal": "total", "MemAvailable": "available"}[name]] = (
                int(rest.split()[0]) * 1024
            )
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        found["limit"] = int(limit)
    return found


def _gpus() -> list[dict[str, Any]]:
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            {
                "name": p.name,
                "memory": p.total_memory,
                "capability": f"{p.major}.{p.minor}",
                "bf16": torch.cuda.is_bf16_supported(),
            }
            for p in found
        ]
    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU (mps)"}]
    return []


def _choice(choice: Any) -> str:
    """`torch: the only implementation` for a (backend, reason) pair."""
    return ": ".join(str(part) for part in choice if part)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
