"""What the products take besides tensors: a weight as it is stored, and which inputs are kept.

Knows tensors and the dropout hash; no format's name, no module. Both are plain tuples of tensors,
so that a backend can hand their addresses to a kernel without asking anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from decal.kernels import native_dropout, reference_dropout

NESTED_BLOCK_SIZE = 256
"""Quantized scales that share one scale of their own."""


class Stored(NamedTuple):
    """A frozen weight [N, K] in the layout it is stored in.

    dense   `data` is the weight itself, floating, with any strides.
    code4   `data` uint8 [(N * K + 1) // 2, 1], two codes to a byte, the first in the high nibble;
            value = code[index] * scale of its block, in float32. Blocks of `block_size` run over
            the flattened weight. `scales` float32 [blocks]; where `nested` is given, uint8 [blocks]
            and scale = table[scales] * nested[block // 256] + offset.
    rows8   `data` int8 [N, K], `scales` float32 [N]; value = data * scale / 127.
    """

    format: Literal["dense", "code4", "rows8"]
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None = None
    nested: Tensor | None = None
    """float32 [ceil(blocks / 256)]"""
    offset: Tensor | None = None
    """float32 []"""
    table: Tensor | None = None
    """float32 [256]"""
    code: Tensor | None = None
    """float32 [16]"""
    block_size: int = 64

    @property
    def written(self) -> int:
        """How often the tensors were written to in place; a frozen weight's stays as it is.

        Those made in inference mode do not count, and have no backward to be wrong in.
        """
        parts = (self.data, self.scales, self.nested, self.offset)
        return sum(x._version for x in parts if x is not None and not x.is_inference())


class Low(NamedTuple):
    """The low-rank part of a product, for some of its rows: z times a small factor."""

    z: Tensor
    """[n, r], whose rows may be strided."""
    factor: Tensor
    """[N, r] where the product is with W^T, [r, K] where it is with W; in z's dtype."""
    start: int = 0
    """Row of the product that z begins with."""

    @property
    def rows(self) -> slice:
        """The rows of the product."""
        return slice(self.start, self.start + self.z.shape[0])


class Keep(NamedTuple):
    """Which features of which rows are kept, in the two stages of the op `dropout_keep`.

        x = offset[t] + column[f];  x = x ^ (x >> 15);  x = x * factor[t];  kept where x >= least

    in 32-bit signed integers that wrap, with an arithmetic shift.
    """

    offset: Tensor
    """int32 [T]"""
    factor: Tensor
    """int32 [T]"""
    column: Tensor
    """int32 [F]"""
    least: Tensor
    """int32 [T]; of stride 0 where all rows have one."""

    def rows(self, start: int, stop: int) -> Keep:
        """The rows from `start` to `stop`, as views."""
        rows = slice(start, stop)
        return Keep(self.offset[rows], self.factor[rows], self.column, self.least[rows])

    def mask(self, start: int, stop: int) -> Tensor:
        """bool [stop - start, F]: the rows from `start` to `stop`."""
        return reference_dropout.kept(*self.rows(start, stop))

    def dropped(self, x: Tensor, start: int) -> Tensor:
        """A new [n, F]: rows x, the first of which is row `start`, with zeros where dropped."""
        return reference_dropout.dropped(x, *self.rows(start, start + x.shape[0]))

    def drop_(self, x: Tensor) -> Tensor:
        """x [T, F] with zeros where it is dropped, in place."""
        step = rows_at_once(x.shape[1], x.device)
        for start in range(0, x.shape[0], step):
            stop = start + step
            x[start:stop] = self.dropped(x[start:stop], start)
        return x


def stacked(parts: Sequence[tuple[Keep | None, int]], features: int, device: torch.device) -> Keep:
    """The masks of consecutive rows as one: pairs of a mask, None keeping all, and its rows."""
    offset, factor, least = torch.empty(
        3, sum(rows for _, rows in parts), dtype=torch.int32, device=device
    ).unbind()
    start = 0
    for keep, rows in parts:
        own = slice(start, start + rows)
        start += rows
        offset[own] = 0 if keep is None else keep.offset
        factor[own] = 1 if keep is None else keep.factor
        least[own] = reference_dropout.threshold(0.0) if keep is None else keep.least
    return Keep(offset, factor, reference_dropout.column_words(features, device), least)


def keep_words(
    seed: int,
    epoch: int,
    adapter: int,
    input: int,
    sample_ids: Tensor,
    positions: Tensor,
    features: int,
    p: float,
) -> Keep:
    """The first stage of `dropout_keep` with the same arguments; its mask has the same bits."""
    call = (seed, adapter, input, epoch)
    halves = native_dropout.row_halves(call, sample_ids, positions)
    if halves is NotImplemented:
        halves = reference_dropout.row_halves(call, sample_ids, positions)
    offset, factor = halves
    column = reference_dropout.column_words(features, offset.device)
    least = reference_dropout.threshold_word(p, offset.device).expand(offset.numel())
    return Keep(offset, factor, column, least)


def rows_at_once(features: int, device: torch.device) -> int:
    """Rows of a mask that are worth making at one time."""
    return reference_dropout.rows_at_once(features, device)
