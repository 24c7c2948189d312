"""Whether a merged tensor, as it lies on the disk, is the base's weight plus the adapter's delta.

Two questions are put to every tensor that gained a delta D = scale * B A. W is the weight that
training computed with, W' what was read again, u half of its dtype's eps (2^-8 for bfloat16), the
most that rounding once moves a number, relative to its size:

    number by number    |W' - (W + D)| <= u |W + D| + slack
    as a layer          || (W' - W) X - scale * B (A X) ||  relative to  || scale * B (A X) ||

The first is exact: nothing but one rounding lies between the file and the sum. `slack` is float32's
own error of the sum and of B A, at most 2 (r + 2) 2^-24 |b_i| |a_j| for row i of B and column j of
A (Cauchy-Schwarz). It is made again slice by slice from the factors, not taken from what was added.

The second goes another way, through A X and never through B A, and it is the one a reader can
judge: 0 is right, 1 is a merge that did nothing, or one that added the delta twice. X holds signs
drawn from a fixed seed, [in, 8], so that || E X ||^2 is 8 || E ||^2 in the mean for any error E.
(W' - W) X is W' X - W X; the difference is taken first, because W X is larger than D X by the ratio
of the weights, and float32 would lose the digits in question.

Rounding alone leaves a relative error of about 0.4 u ||W|| / ||D||: in bfloat16 13 % for a delta of
1.25 % of the weight, more than 100 % for one of 0.1 %. A fixed limit would fail right merges or
pass wrong ones. So the limit is what rounding can explain: 1.5 times the norm of the bounds of the
first question, which is three to four times the expected error and leaves room for what X happens
to be; plus 1e-4 for the sums in float32. Where that is above 0.9 (bfloat16: a delta of less than
0.7 % of the weight) a merge that did nothing could pass the second question. The tensor is then
counted as `faint`, and the first question, which needs no statistics, is all there is.

What is left of D in a file is counted on the way:

    survival  <W' - W, D> / <D, D>        1 if it is all there, 0 if the merge did nothing
    error     ||W' - W - D|| / ||D||      rounding's noise, relative to what was trained
    unmoved   share of the weights that D should move and that are as they were

Knows no files and no keys.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from decal.weights.delta import FileDelta

__all__ = ["Finding", "Verification", "check_delta"]

PROBES = 8
"""Columns of X."""
BLIND = 0.9
"""Where rounding explains more of the delta than this, the second question says nothing."""
NOISY = 0.5
"""Error of rounding, relative to all deltas, from which the output is said to hold them badly."""
_SCATTER = 1.5
_SUMS = 1e-4
_SLICE = 1 << 18
"""Numbers looked at at once: few enough to stay in a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one tensor."""

    key: str
    module: str
    relative: float
    """Error of the layer's output, relative to what the delta adds to it."""
    allowed: float
    """How much of it rounding can explain."""
    off: int
    """Numbers that are further from the sum than one rounding."""
    numbers: int
    meant: float
    """<D, D>"""
    kept: float
    """<W' - W, D>"""
    missed: float
    """||W' - W - D||^2"""
    should_move: int
    stayed: int
    gap: float | None = None
    """||W16 - W4||^2, stored weight against dequantized one, of a base quantized in training."""

    @property
    def faint(self) -> bool:
        """Rounding may hide the whole delta, as far as a layer's output can tell."""
        return self.allowed > BLIND

    @property
    def right(self) -> bool:
        """The tensor is the sum, rounded once."""
        return self.off == 0 and (self.faint or self.relative <= self.allowed)

    @property
    def lost(self) -> bool:
        """The delta is not zero, and nothing of it is left."""
        return self.meant > 0 and self.kept <= 0

    def problem(self) -> str:
        """The tensor and what is wrong with it, in one line."""
        share = f"{self.off:,} of {self.numbers:,} numbers are further than one rounding from"
        return (
            f"{self.module}: {share} base + delta; the layer's output is off by"
            f" {self.relative:.3g} of what the delta adds (0 is right, 1 is no delta at all;"
            f" rounding explains {self.allowed:.2g})"
        )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All findings of one merge."""

    findings: tuple[Finding, ...]
    pairs: int
    """A/B pairs of the adapter, each used once."""
    same: int = 0
    """Tensors without a delta whose bytes on disk are those that were meant."""

    @property
    def worst(self) -> Finding | None:
        """The tensor whose layer is furthest from right, faint ones apart where there are others"""
        clear = [found for found in self.findings if not found.faint]
        return max(clear or self.findings, key=lambda found: found.relative, default=None)

    @property
    def faint(self) -> list[Finding]:
        """Tensors whose delta is too small for the dtype to be told from rounding."""
        return [found for found in self.findings if found.faint]

    @property
    def survival(self) -> float | None:
        """Share of the deltas that the output holds; None if all deltas are zero."""
        meant = sum(found.meant for found in self.findings)
        return sum(found.kept for found in self.findings) / meant if meant else None

    @property
    def error(self) -> float | None:
        """Size of rounding's noise relative to all deltas; None if all deltas are zero."""
        meant = sum(found.meant for found in self.findings)
        return math.sqrt(sum(f.missed for f in self.findings) / meant) if meant else None

    @property
    def unmoved(self) -> float | None:
        """Share of the weights that should have moved and did not."""
        should = sum(found.should_move for found in self.findings)
        return sum(found.stayed for found in self.findings) / should if should else None

    @property
    def quantization(self) -> dict[str, float] | None:
        """||quantization error|| / ||delta|| by kind of layer, and of `all`; None without one."""
        kinds: dict[str, list[Finding]] = defaultdict(list)
        for found in self.findings:
            if found.gap is not None and found.meant:
                kinds[found.module.rpartition(".")[2]].append(found)
        if not kinds:
            return None
        every = [found for kind in kinds.values() for found in kind]
        return {"all": _ratio(every), **{k: _ratio(v) for k, v in sorted(kinds.items())}}

    def facts(self) -> dict[str, Any]:
        """In numbers, as a record keeps them."""
        worst = self.worst
        return {
            "pairs": self.pairs,
            "modules": len(self.findings),
            "worst_error": worst and worst.relative,
            "worst_module": worst and worst.module,
            "explained_by_rounding": worst and worst.allowed,
            "too_small_for_dtype": len(self.faint),
            "same_bytes": self.same,
        }


def _ratio(found: Sequence[Finding]) -> float:
    return math.sqrt(sum(f.gap or 0.0 for f in found) / sum(f.meant for f in found))


def check_delta(
    key: str, before: Tensor, after: Tensor, delta: FileDelta, stored: Tensor | None = None
) -> Finding:
    """Holds one tensor as it was read again against the sum it should be.

    Args:
        before: W in the file's orientation, in any floating dtype.
        after: W' of the same shape, in the dtype it was written in.
        stored: W as the base's file has it, where training dequantized another.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    parts = delta.low_rank
    A, B = (t.detach().cpu().to(wide) for t in (parts.A, parts.B))
    left, unit = B * parts.scale, 2.0 ** (-53 if wide == torch.float64 else -24)
    if delta.transposed:
        before, after = before.T, after.T
        stored = None if stored is None else stored.T
    limits = torch.finfo(after.dtype)
    # Far from all sums: a row's bound takes the longest column of A, which costs no further matrix.
    slack = 2 * (A.shape[0] + 2) * unit * left.norm(dim=1) * A.norm(dim=0).amax()
    slack += limits.smallest_normal * limits.eps
    signs = _signs(A.shape[1]).to(wide)
    sums = _Sums()
    for part in _rows(before):
        w, new, d = before[part].to(wide), after[part].to(wide), left[part] @ A
        wanted = w + d
        bound = wanted.abs().mul_(limits.eps / 2 + 2 * unit).add_(slack[part, None])
        sums.add(d, new - w, new - wanted, bound, signs)
        if stored is not None:
            sums.gap += float((stored[part].to(wide) - w).square_().sum(dtype=torch.float64))
    adds = left.double() @ (A.double() @ signs.double())
    return sums.finding(key, delta.module or key, adds, stored is not None)


class _Sums:
    """What is added up over the slices of one tensor."""

    def __init__(self) -> None:
        self.off = self.numbers = self.should_move = self.stayed = 0
        self.meant = self.kept = self.missed = self.bounds = self.gap = 0.0
        self._moves: list[Tensor] = []

    def add(self, d: Tensor, moved: Tensor, wrong: Tensor, bound: Tensor, signs: Tensor) -> None:
        # NaN is never within a bound.
        self.numbers += d.numel()
        self.off += d.numel() - int((wrong.abs() <= bound).sum())
        self._moves.append((moved @ signs).double())
        self.meant += float(torch.dot(d.flatten(), d.flatten()))
        self.kept += float(torch.dot(moved.flatten(), d.flatten()))
        self.missed += float(torch.dot(wrong.flatten(), wrong.flatten()))
        self.bounds += float(torch.dot(bound.flatten(), bound.flatten()))
        should = d != 0
        self.should_move += int(should.sum())
        self.stayed += int(should.logical_and_(moved == 0).sum())

    def finding(self, key: str, module: str, adds: Tensor, gap: bool) -> Finding:
        size = float(adds.norm())
        error = float((torch.cat(self._moves) - adds).norm())
        noise = _SCATTER * math.sqrt(PROBES * self.bounds)
        if not size:  # nothing was trained, and rounding is all that may have happened
            error, noise, size = (0.0 if error <= noise else math.inf), 0.0, 1.0
        return Finding(
            key=key,
            module=module,
            relative=error / size,
            allowed=noise / size + _SUMS,
            off=self.off,
            numbers=self.numbers,
            meant=self.meant,
            kept=self.kept,
            missed=self.missed,
            should_move=self.should_move,
            stayed=self.stayed,
            gap=self.gap if gap else None,
        )


def _rows(weight: Tensor) -> Sequence[slice]:
    count, width = weight.shape
    step = max(1, _SLICE // max(1, width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@cache
def _signs(count: int) -> Tensor:
    """[count, PROBES] of +1 and -1, the same in every process."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(0, 2, (count, PROBES), generator=generator, dtype=torch.int8)
    return drawn * 2 - 1
