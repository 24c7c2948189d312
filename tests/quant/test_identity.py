"""The identity is the same for the same bytes and differs for everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from decal.errors import QuantError
from decal.quant import Packed, Recipe, quant_format
from decal.quant.identity import combine, digest, identity

PINNED = "bfd4d906dc4963ade95caa749db413da0206ec12db709957f28a367cfd9b45b8"
"""Stored with adapters: a change of it makes every older adapter look foreign."""


def weights() -> list[tuple[str, Packed]]:
    """Values without randomness: whole multiples of 1/512, the same on every machine."""
    fmt = quant_format("nf4")
    names = ("b.q_proj", "a.q_proj", "a.k_proj")
    steps = torch.arange(33 * 77).view(33, 77)
    values = [(steps * factor % 1009 - 504) / 512 for factor in (211, 307, 401)]
    recipe = Recipe(format="nf4")
    return [(n, fmt.quantize(v, recipe)) for n, v in zip(names, values, strict=True)]


def flipped(packed: Packed, key: str) -> Packed:
    part = packed.parts[key].clone()
    part.view(-1)[-1:].view(torch.uint8)[-1] ^= 1
    return replace(packed, parts={**packed.parts, key: part})


CHANGES: dict[str, Callable[[str, Packed], tuple[str, Packed]]] = {
    "name": lambda n, p: (n + "x", p),
    "block size": lambda n, p: (n, replace(p, recipe=replace(p.recipe, block_size=128))),
    "double": lambda n, p: (n, replace(p, recipe=replace(p.recipe, double=False))),
    "format": lambda n, p: (n, replace(p, recipe=replace(p.recipe, format="fp4"))),
    "shape": lambda n, p: (n, replace(p, shape=(77, 33))),
    "dtype": lambda n, p: (n, replace(p, dtype=torch.bfloat16)),
    "a code": lambda n, p: (n, flipped(p, "weight_packed")),
    "a scale": lambda n, p: (n, flipped(p, "absmax")),
    "a nested scale": lambda n, p: (n, flipped(p, "nested_absmax")),
    "the offset": lambda n, p: (n, flipped(p, "nested_offset")),
}


def test_it_is_deterministic_and_knows_no_order() -> None:
    """Also one weight at a time, and quantized anew. Fails if digests are not sorted by name."""
    first = identity(weights())
    assert first == identity(reversed(weights()))
    assert first == combine({name: digest(name, packed) for name, packed in weights()})
    assert first == PINNED
    assert identity([]) != first


@pytest.mark.parametrize("what", CHANGES)
def test_everything_counts(what: str) -> None:
    """One bit of any part, or one field. Fails if it is left out of the hash."""
    named = weights()
    changed = [CHANGES[what](*named[0]), *named[1:]]
    assert identity(changed) != identity(named)


def test_two_weights_that_change_names_are_noticed() -> None:
    """Fails if names are hashed apart from their bytes."""
    (a, x), (b, y), rest = weights()
    assert identity([(a, y), (b, x), rest]) != identity([(a, x), (b, y), rest])


def test_a_name_comes_once() -> None:
    """Fails if the second weight of a name replaces the first."""
    named = weights()
    with pytest.raises(QuantError, match=r"two quantized weights are called `b\.q_proj`"):
        identity([*named, named[0]])
