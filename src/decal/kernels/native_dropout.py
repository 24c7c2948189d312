"""The compiled dropout bits: both stages of reference_dropout.py, bit for bit."""

from __future__ import annotations

from ctypes import c_int, c_int32, c_int64, c_uint64
from typing import Any

import torch
from torch import Tensor

from decal.kernels import native
from decal.kernels.reference_dropout import call_word, column_words, threshold

_ALONE = 1 << 16
"""Bits that one thread draws sooner than a second one wakes up."""


def row_halves(
    call: tuple[int, ...], sample_ids: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor] | Any:
    """As reference_dropout.row_halves."""
    run = native.kernel("dropout_words")
    counters = (sample_ids, positions)
    sound = sample_ids.ndim == 1 and sample_ids.shape == positions.shape
    if run is None or not sound or any(x.device.type != "cpu" for x in counters):
        return NotImplemented
    if any(x.dtype != torch.int64 or not x.is_contiguous() for x in counters):
        return NotImplemented
    offset, factor = torch.empty(2, sample_ids.numel(), dtype=torch.int32, device="cpu").unbind()
    run(
        c_uint64(call_word(call)),
        *(native.address(x) for x in counters),
        c_int64(sample_ids.numel()),
        native.address(offset),
        native.address(factor),
    )
    return offset, factor


def dropout_keep(
    seed: int,
    epoch: int,
    adapter: int,
    input: int,
    sample_ids: Tensor,
    positions: Tensor,
    features: int,
    p: float,
) -> Tensor | Any:
    """As reference_dropout.dropout_keep."""
    run = native.kernel("dropout_keep")
    halves = row_halves((seed, adapter, input, epoch), sample_ids, positions)
    if run is None or halves is NotImplemented:
        return NotImplemented
    column = column_words(features, sample_ids.device)
    keep = torch.empty(sample_ids.numel(), features, dtype=torch.bool, device="cpu")
    run(
        *(native.address(words) for words in (*halves, column)),
        c_int32(threshold(p)),
        c_int64(sample_ids.numel()),
        c_int64(features),
        native.address(keep),
        c_int(1 if keep.numel() < _ALONE else native.threads()),
    )
    return keep
