"""The yardstick: operations a second of the processor's best matrix loop, as it is at this moment.

`native/peak.cpp` keeps one block of a product in registers with its operands in L1, in the
instruction set that decal uses. Without decal's library it is torch's product of 2048 x 2048
matrices, which is lower than what the processor can do: in bf16, or in float32 where the processor
multiplies no bf16.
"""

from __future__ import annotations

import ctypes
import time

import torch

from decal.kernels import native
from decal.kernels.precision import multiplies_bf16


class Peak:
    """Measures with torch's number of threads; `what` says by which loop.

    Args:
        seconds: how long a measurement takes, about.
    """

    def __init__(self, seconds: float = 0.15) -> None:
        self._dtype = torch.bfloat16 if multiplies_bf16() else torch.float32
        torchs = "bf16" if multiplies_bf16() else "float32"
        self.what = f"native loop, {native.isa()}" if native.isa() else f"torch {torchs} 2048^3"
        self._rounds = 1000
        while self._timed()[0] < seconds / 5:
            self._rounds *= 2

    def rate(self) -> float:
        """Operations a second, all threads together, median of three."""
        found = sorted(flops / seconds for seconds, flops in (self._timed() for _ in range(3)))
        return found[1]

    def _timed(self) -> tuple[float, float]:
        kernel = native.kernel("peak")
        threads = native.threads()
        if kernel is None:
            a = torch.full((2048, 2048), 0.5, dtype=self._dtype)
            times = max(1, self._rounds // 64_000)
            begun = time.perf_counter()
            for _ in range(times):
                a @ a
            return time.perf_counter() - begun, times * 2.0 * 2048**3
        done = torch.zeros(threads, dtype=torch.float64)
        begun = time.perf_counter()
        kernel(ctypes.c_int64(self._rounds), native.address(done), ctypes.c_int(threads))
        return time.perf_counter() - begun, float(done.sum())
