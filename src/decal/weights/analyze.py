"""What an adapter learned: the singular values of each delta scale * B A, and what they say.

With B = Q1 R1 and A' = Q2 R2 (QR, Q with orthonormal columns) the product is Q1 (R1 R2') Q2', so
its singular values are those of R1 R2', a matrix of r squared; the delta [out, in] is never formed.
Rejected: eigenvalues of B'B AA', which are the squares: of a value below 1e-8 of the largest
nothing would be left.

The numbers that are made of them, s_1 >= s_2 >= ... >= 0:

    norm             sqrt(sum s_i^2), the Frobenius norm of the delta
    energy           s_i^2 over their sum. By Eckart and Young (1936) no matrix of rank k is closer
                     to the delta than its first k directions, which keep the first k energies
    directions(p)    the fewest whose energies come to p
    effective rank   exp(-sum p_i log p_i) with p_i = s_i / sum s (Roy and Vetterli, 2007)
    stable rank      sum s_i^2 / s_1^2 (Rudelson and Vershynin, 2007), never above the rank

Everything is in float64. Energy is energy of the weights' change and not quality: a direction of
little energy may matter to the task.

Knows no models and no folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from decal.config import LoraConfig
from decal.store.peft import LoraTensors

__all__ = [
    "ModuleSpectrum",
    "Place",
    "frobenius",
    "kept_by",
    "places",
    "singular_values",
    "smallest_rank",
    "spectra",
]

_CHUNK = 1 << 24
"""Elements that are squared and added at once."""
_ROUNDING = 1e-12
"""Of the whole energy; sums of float64 numbers are no closer."""


def singular_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The singular values of scale * B A, float64, the largest first.

    Args:
        A: [r, in], B: [out, r]; any floating dtype.

    Returns:
        min(r, out, in) values.
    """
    left = torch.linalg.qr(B.detach().cpu().double(), mode="r").R
    right = torch.linalg.qr(A.detach().cpu().double().T, mode="r").R
    return torch.linalg.svdvals(left @ right.T) * abs(scale)


@dataclass(frozen=True, kw_only=True)
class ModuleSpectrum:
    """What one module's delta holds."""

    module: str
    r: int
    shape: tuple[int, int]
    """[out, in]; of an embedding [dimensions, vocabulary]."""
    scaling: float
    values: tuple[float, ...]
    """Singular values, the largest first."""
    bias: float | None = None
    """Norm of what B's own bias adds (lora_bias); no part of the numbers below."""
    embedding: bool = False

    @property
    def norm(self) -> float:
        return math.sqrt(self.energy)

    @property
    def energy(self) -> float:
        return math.fsum(v * v for v in self.values)

    @property
    def effective_rank(self) -> float:
        """Between 1 and r; 0 of a delta that is zero."""
        whole = math.fsum(self.values)
        shares = [v / whole for v in self.values if v > 0.0] if whole else []
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """Between 1 and r; 0 of a delta that is zero."""
        largest = self.values[0] if self.values else 0.0
        return math.fsum((v / largest) ** 2 for v in self.values) if largest else 0.0

    def directions(self, share: float) -> int:
        """The fewest directions that hold `share` of the energy; 0 of a delta that is zero."""
        return _first([v * v for v in self.values], share)


def spectra(
    tensors: Mapping[str, LoraTensors], config: LoraConfig, embeddings: frozenset[str] = frozenset()
) -> list[ModuleSpectrum]:
    """The spectrum of every module, in the order of `tensors`, each with its own r and alpha."""
    found = []
    for module, parts in tensors.items():
        scale = config.scaling_of(module)
        bias = None if parts.bias is None else abs(scale) * frobenius(parts.bias)
        found.append(
            ModuleSpectrum(
                module=module,
                r=parts.A.shape[0],
                shape=(parts.B.shape[0], parts.A.shape[1]),
                scaling=scale,
                values=tuple(singular_values(parts.A, parts.B, scale).tolist()),
                bias=bias,
                embedding=module in embeddings,
            )
        )
    return found


def kept_by(found: Sequence[ModuleSpectrum]) -> list[float]:
    """Share of the energy of all modules together that one rank everywhere keeps, for r = 1, 2, ...

    Empty where all deltas are zero.
    """
    longest = max((len(s.values) for s in found), default=0)
    columns = [
        math.fsum(s.values[i] ** 2 for s in found if i < len(s.values)) for i in range(longest)
    ]
    whole = math.fsum(columns)
    # The last sum is the whole, whatever rounding made of it.
    return [*(part / whole for part in list(accumulate(columns))[:-1]), 1.0] if whole else []


def smallest_rank(found: Sequence[ModuleSpectrum], share: float) -> int:
    """The smallest one rank everywhere that keeps `share` of all modules' energy together."""
    kept = kept_by(found)
    return next((r for r, part in enumerate(kept, 1) if part >= share - _ROUNDING), len(kept))


def _first(energies: Sequence[float], share: float) -> int:
    whole = math.fsum(energies)
    if not whole:
        return 0
    limit = (share - _ROUNDING) * whole
    sums = accumulate(energies)
    return next((i for i, part in enumerate(sums, 1) if part >= limit), len(energies))


def frobenius(tensor: Tensor) -> float:
    """The Frobenius norm, summed in float64 a chunk at a time."""
    flat = tensor.detach().reshape(-1)
    squares = [float(chunk.double().square().sum()) for chunk in flat.split(_CHUNK)]
    return math.sqrt(math.fsum(squares))


class Place(NamedTuple):
    """Where a module stands in the model."""

    layer: int | None
    """None of what stands outside the layers: embeddings, the head."""
    kind: str
    """`q_proj`; as much of the path as tells kinds apart."""


def places(modules: Sequence[str]) -> dict[str, Place]:
    """Layer and kind of every module: the first number in its path, and what follows it.

    Further numbers, those of experts, become `*`: all experts of a layer are one kind.
    """
    split: dict[str, tuple[int | None, str]] = {}
    for module in modules:
        parts = module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        rest = parts if at is None else parts[at + 1 :] or parts[:at]
        layer = None if at is None else int(parts[at])
        split[module] = layer, ".".join("*" if part.isdecimal() else part for part in rest)
    kinds = {kind for _, kind in split.values()}
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return {
        module: Place(layer, last if ends.count(last := kind.rpartition(".")[2]) == 1 else kind)
        for module, (layer, kind) in split.items()
    }
