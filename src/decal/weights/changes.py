"""What an adapter makes of its base's files, key by key, and whether it fits them.

A tensor of the base gains a delta, is replaced whole (modules_to_save, biases), or is left out (the
head of another task); a tensor may be added (a classifier's head). Everything is checked before
anything is written, and all misfits are one error.

Knows no model: keys and shapes are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from decal.errors import AdapterError, QuantError, first_of, nearest
from decal.store.base import BaseFiles
from decal.store.tensorfile import TensorSpec
from decal.weights.delta import FileDelta

__all__ = ["FLOATS", "Changes", "Dequantized", "check_changes"]

FLOATS = ("F64", "F32", "F16", "BF16")


class Dequantized(NamedTuple):
    """The weight that training computed with, for one file key."""

    convert: Callable[[Tensor], Tensor]
    """From the stored tensor to the weight, in the file's orientation, in any floating dtype."""
    spec: TensorSpec | None = None
    """The weight's dtype and shape where the file stores codes; else those of the stored one."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """An adapter as changes of its base's folder. Every key is a file key."""

    deltas: Mapping[str, FileDelta]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Key of the base -> what stands there instead."""
    added: Mapping[str, Tensor] = field(default_factory=dict)
    """Key that the base lacks -> its tensor."""
    dropped: frozenset[str] = frozenset()
    """Keys of the base that are not written."""
    dequantized: Mapping[str, Dequantized] = field(default_factory=dict)
    """All quantized weights, those without a delta as well."""
    compared: Mapping[str, Dequantized] = field(default_factory=dict)
    """Weights of training that the deltas do not go onto here: only their distance is taken."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Key -> key of the tensor that it shares, as the architecture ties them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json; None takes one out."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further text files: name -> content."""
    name: str = "adapter"
    """The adapter's folder, for messages."""
    trained_on: str | None = None
    """The base that its config names, for messages."""

    @property
    def touched(self) -> frozenset[str]:
        """Keys that get another value than training found there."""
        return frozenset(self.deltas) | frozenset(self.replaced)


def check_changes(base: BaseFiles, changes: Changes, sources: Mapping[str, TensorSpec]) -> None:
    """Holds the changes against the tensors they are made of, `sources`.

    Raises:
        AdapterError: deltas or tensors for keys the base lacks, or of other shapes.
        QuantError: quantized weights that the base lacks.
    """
    touched = sorted(changes.touched)
    missing = [key for key in touched if key not in sources]
    misfits = {key: _misfit(changes, key, sources) for key in touched}
    problems = [text for text in misfits.values() if text]
    if problems:
        wrong = len(problems) - len(missing)
        counts = [f"{len(missing)} of {len(touched)} tensors are not in the base"] * bool(missing)
        counts += [f"{wrong} of {len(touched)} tensors have the wrong shape"] * bool(wrong)
        known = f"the adapter was trained on `{changes.trained_on}` (adapter_config.json)"
        raise AdapterError(
            f"adapter `{changes.name}` does not fit base `{base.folder}`: {', '.join(counts)}",
            details=[first_of(problems)],
            hint=known if changes.trained_on else "merge onto the base the adapter was trained on",
        )
    unknown = sorted(changes.dequantized.keys() - sources.keys() - changes.tied.keys())
    if unknown:
        raise QuantError(
            f"{len(unknown)} of {len(changes.dequantized)} quantized weights are not in base "
            f"`{base.folder}`",
            details=unknown[:1],
        )


def _misfit(changes: Changes, key: str, sources: Mapping[str, TensorSpec]) -> str | None:
    delta, whole = changes.deltas.get(key), changes.replaced.get(key)
    name = (delta.module if delta else "") or key
    if key not in sources:
        close = nearest(key, list(sources))
        return f"{name}: no tensor `{key}`" + (f", but `{close}`" if close else "")
    spec = sources[key]
    if whole is not None and whole.shape != spec.shape:
        return f"{name}: adapter has {list(whole.shape)}, base has {list(spec.shape)}"
    return None if delta is None else _misshapen(delta, name, spec)


def _misshapen(delta: FileDelta, name: str, spec: TensorSpec) -> str | None:
    (a, b), stored = delta.shape, spec.shape
    if len(stored) != 2 or spec.dtype not in FLOATS:
        return f"{name}: base has {spec.dtype} {list(stored)}, no weight matrix"
    if (a, b) == stored:
        return None
    names = ("in", "out") if delta.transposed else ("out", "in")
    i = 1 if b != stored[1] else 0
    return f"{name}: adapter expects {names[i]}={(a, b)[i]}, base has {names[i]}={stored[i]}"
