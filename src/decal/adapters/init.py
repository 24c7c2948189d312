"""Starting values of low-rank factors: pure functions of a shape, a rank and a generator.

Knows no modules and no models. Every layer draws from its own generator, seeded by the run's seed
and the layer's name, always on the CPU: what a layer starts from depends neither on which other
layers are adapted, nor on their order, nor on the device. (One generator for the whole model was
the alternative; adding a target would then change the start of all layers behind it.)
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor

Start = bool | Literal["gaussian"]
_MASTER: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Whatever torch's defaults are."""


def module_generator(seed: int, module: str) -> torch.Generator:
    """A CPU generator that depends on the run's seed and the module's name only."""
    digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniform_by_fan_in(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """float32 [rows, columns], uniform in +-1/sqrt(columns): He et al. 2015 with slope sqrt(5)."""
    bound = shape[1] ** -0.5
    return torch.empty(shape, **_MASTER).uniform_(-bound, bound, generator=generator)


def start_values(
    shape: tuple[int, int],
    r: int,
    how: Start,
    generator: torch.Generator,
    kind: str = "linear",
) -> tuple[Tensor, Tensor]:
    """A float32 [r, in] and B float32 [out, r] for a weight of `shape` [out, in].

    `how` is PEFT's `init_lora_weights`: True draws A uniformly by fan-in, "gaussian" draws it
    normal with deviation 1/r, both with B = 0, so that training starts from the base model. False
    draws B too: an adapter that acts from the first step, for tests.

    For an embedding it is the other way round, as in PEFT: A, which has a column for every token,
    is zero and B is standard normal, for True and "gaussian" alike; False draws both so.
    """
    rows, columns = shape
    if kind == "embedding":
        B = torch.empty(rows, r, **_MASTER).normal_(generator=generator)
        A = torch.zeros(r, columns, **_MASTER)
        return (A if how else A.normal_(generator=generator)), B
    if how == "gaussian":
        A = torch.empty(r, columns, **_MASTER).normal_(0.0, 1.0 / r, generator=generator)
    else:
        A = uniform_by_fan_in((r, columns), generator)
    B = torch.zeros(rows, r, **_MASTER) if how else uniform_by_fan_in((rows, r), generator)
    return A, B
