"""torch's deterministic algorithms while a run trains, and a word where an operation has none.

A resumed run is the same to the bit only if the same operation on the same numbers gives the same
bits. On a CPU most do; sums that threads scatter (index_put, scatter_add) do only in torch's
deterministic mode. On a GPU many kernels add in whatever order their blocks finish; the mode
chooses others, cuBLAS needs a workspace of fixed size, which it takes from the environment when it
is first used.

Operations without a deterministic kernel are not refused: a run that differs in its last bits is
worth more than no run. They are said once each, in one line.

Rejected: filling fresh memory with NaN, which the mode does by default. It finds reads of memory
that nobody wrote and costs a pass over every tensor.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from decal.train.events import Event, Note

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FRESH: Any = torch.utils.deterministic
"""A module whose one setting is a property that type checkers do not see."""
_WITHOUT = re.compile(r"^(.{1,80}?) does not have a deterministic implementation")
_CUBLAS = re.compile(r"CuBLAS and it is not deterministic|" + WORKSPACE)


def set_workspace() -> None:
    """Asks cuBLAS for a workspace with which it is deterministic; call before anything runs on a
    GPU. A value that the user has set stays."""
    os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def deterministic(observe: Callable[[Event], None]) -> Iterator[None]:
    """Deterministic algorithms inside the block; what has none is observed once, as a Note."""
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _FRESH.fill_uninitialized_memory
    said: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Any, *rest: Any, **named: Any) -> None:
            what = _lacking(str(message))
            if what is None:
                show(message, *rest, **named)
            elif what not in said:
                said.add(what)
                text = f"{what} is not deterministic here: a resumed run differs in its last bits"
                observe(Note(text=text))

        warnings.showwarning = shown
        for pattern in (_WITHOUT, _CUBLAS):
            warnings.filterwarnings("always", message=f".*{pattern.pattern.lstrip('^')}")
        torch.use_deterministic_algorithms(True, warn_only=True)
        _FRESH.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=only_warned)
            _FRESH.fill_uninitialized_memory = filled


def _lacking(message: str) -> str | None:
    """The operation that a warning of the deterministic mode is about; None for other warnings."""
    found = _WITHOUT.search(message)
    if found:
        return f"`{found[1]}`"
    return "cuBLAS" if _CUBLAS.search(message) else None
