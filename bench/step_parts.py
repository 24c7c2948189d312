"""Where decal's step goes: seconds by op, in the process that takes the steps.

Every backend of every op, and every compiled kernel, is wrapped in a timer. A timer does not count
what timers inside it count, so that sums are right however an op calls others. What runs outside
of ops is `other`: autograd, allocation, what transformers' modules compute themselves.

The clock is read twice a call, some thousand times a step: under a thousandth of it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from decal.kernels import native, native_project, ops

PARTS: dict[str, tuple[str, ...]] = {
    "linears": ("project", "dequantize", "quantize", "int8", "gemv"),
    "adapters": ("into_rank", "over_rows", "keep_words", "skinny"),
    "attention": ("attention",),
    "head and loss": ("softmax_loss", "head"),
    "elementwise": ("rms_norm", "swiglu", "rotate", "rope", "dropout", "norm", "add"),
    "optimizer": ("optimizer", "adamw"),
}
"""Part of a step -> beginnings of the names of its ops and kernels."""
OTHER = "other"


def part_of(name: str) -> str:
    """The part that an op or kernel belongs to."""
    for part, beginnings in PARTS.items():
        if name.startswith(beginnings):
            return part
    return OTHER


class Parts:
    """Seconds and operations by part since the last `take`.

    Args:
        vocabulary: a product with a weight of so many rows is the head's.
    """

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary
        self._seconds: dict[str, float] = defaultdict(float)
        self._flops: dict[str, float] = defaultdict(float)
        self._backends: dict[str, str] = {}
        self._inside: list[list[Any]] = []

    def wrap(self) -> None:
        """From now on all ops of this process are timed."""
        for op, backends in ops.BACKENDS.items():
            for backend, function in list(backends.items()):
                backends[backend] = self._timed_op(op, backend, function)
        find, send = native.kernel, native_project.send

        def kernel(name: str) -> Callable[..., None] | None:
            found = find(name)
            if found is None or name == "gemm":  # which takes its own time, product by product
                return found
            return lambda *args: self._call(name, found, args)

        native.kernel = kernel
        native_project.send = lambda products: self._sent(send, products)

    def timed(self, part: str, function: Callable[[], Any]) -> Any:
        """Calls a function under the name of a part."""
        return self._call(part, function, ())

    def take(self) -> dict[str, Any]:
        """Since the last time: seconds of every part, operations of the linears, backends by op."""
        found = {
            "seconds_by_part": {part: self._seconds[part] for part in PARTS},
            "linear_flops": self._flops["linears"],
            "backends": dict(self._backends),
        }
        for held in (self._seconds, self._flops, self._backends):
            held.clear()
        return found

    def _timed_op(self, op: str, backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            rows, flops = _product(op, args)
            name = "head" if rows == self._vocabulary else op
            answer = self._call(name, function, args)
            if answer is not NotImplemented:
                self._backends[op] = backend
                self._flops[part_of(name)] += flops
            return answer

        return call

    def _call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._inside and (self._inside[-1][0] == "head" or part_of(name) == OTHER):
            name = self._inside[-1][0]  # the head's products are ops of another part by their names
        frame = [name, 0.0]
        self._inside.append(frame)
        begun = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent = time.perf_counter() - begun
            self._inside.pop()
            self._seconds[part_of(name)] += spent - frame[1]
            if self._inside:
                self._inside[-1][1] += spent

    def _sent(self, send: Callable[..., None], products: list[Any]) -> None:
        """Products that one call makes, whichever op is running when it is made."""
        begun = time.perf_counter()
        send(products)
        spent = time.perf_counter() - begun
        parts = [part_of(self._name(product)) for product in products]
        for part, product in zip(parts, products, strict=True):
            self._seconds[part] += product.seconds
        self._seconds[parts[-1]] += spent - sum(product.seconds for product in products)
        if self._inside:
            self._inside[-1][1] += spent

    def _name(self, product: Any) -> str:
        depths = [product.segments[i].k for i in range(product.count)]
        return "head" if self._vocabulary in (product.N, *depths) else product.op


def _product(op: str, args: tuple[Any, ...]) -> tuple[int, float]:
    """Rows of the largest weight of a product, and its operations; zeros for other ops."""
    if op == "project":
        return args[1].shape[0], 2.0 * args[0].shape[0] * args[1].shape[0] * args[1].shape[1]
    if op == "project_back":
        flops = sum(2.0 * g.shape[0] * w.shape[0] * w.shape[1] for g, w in args[0])
        return max(w.shape[0] for _, w in args[0]), flops
    return 0, 0.0
