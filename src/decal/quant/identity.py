"""The quantizer's identity: a hash of what a quantized base is made of.

Knows packed weights only. Two bases with one identity dequantize to the same bits, so an adapter
trained on one is right on the other. Hashed per weight, under its name: format, block size, double,
shape, source dtype, and the bytes of every part with its own name, shape and dtype. The per-weight
digests are then hashed in the order of names, so weights can be hashed one at a time as they are
loaded, in any order, and dropped.

    digests[name] = digest(name, packed)        as weights stream by
    combine(digests)                            equals identity(all of them)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from decal.errors import QuantError
from decal.quant.base import Packed


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes, row-major, as an array; copied only where they are not laid out so."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def digest(name: str, packed: Packed) -> str:
    """sha256 hex of one packed weight under its name."""
    recipe = packed.recipe
    parts = sorted(packed.parts.items())
    head = {
        "name": name,
        "format": recipe.format,
        "block_size": recipe.block_size,
        "double": recipe.double,
        "shape": list(packed.shape),
        "dtype": str(packed.dtype),
        "parts": [[key, str(part.dtype), list(part.shape)] for key, part in parts],
    }
    hashed = hashlib.sha256(json.dumps(head, sort_keys=True).encode() + b"\n")
    for _, part in parts:
        hashed.update(_bytes(part))
    return hashed.hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """sha256 hex over all weights' digests, sorted by name."""
    hashed = hashlib.sha256()
    for name in sorted(digests):
        hashed.update(f"{digests[name]}\n".encode())
    return hashed.hexdigest()


def identity(named: Iterable[tuple[str, Packed]]) -> str:
    """sha256 hex over all packed weights, whatever order they come in.

    Raises:
        QuantError: a name comes twice.
    """
    digests: dict[str, str] = {}
    for name, packed in named:
        if name in digests:
            raise QuantError(f"two quantized weights are called `{name}`")
        digests[name] = digest(name, packed)
    return combine(digests)
