"""Compiled dropout bits are the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decal.kernels import native, native_dropout, reference_dropout

CALL = (3, -1, 1 << 70, 12)
"""seed, epoch, adapter, input"""

isas = pytest.mark.parametrize("isa", native.available())


def counters(rows: int) -> tuple[Tensor, Tensor]:
    """Ids and positions, negative and large ones among them."""
    limit = 1 << 62
    return torch.randint(-limit, limit, (rows,)), torch.arange(rows) - 3


@isas
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1 - 2**-31])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (2, 7), (5, 33), (9, 576), (101, 1000)])
def test_bits_are_the_references(isa: str, p: float, shape: tuple[int, int]) -> None:
    """Fails with a logical shift, an unsigned comparison, or without the last features."""
    rows, features = shape
    args = (*CALL, *counters(rows), features, p)
    wanted = reference_dropout.dropout_keep(*args)
    with native.forced(isa):
        found = native_dropout.dropout_keep(*args)
    assert found.dtype == torch.bool
    assert torch.equal(found, wanted)
    assert found.view(torch.uint8).le(1).all()


@isas
def test_words_of_rows_are_the_references(isa: str) -> None:
    """Fails when the two counters are exchanged, or the multiplier is even."""
    ids, positions = counters(1001)
    wanted = reference_dropout.row_halves(CALL, ids, positions)
    with native.forced(isa):
        found = native_dropout.row_halves(CALL, ids, positions)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when rows are shared out with a gap or an overlap."""
    args = (*CALL, *counters(201), 576, 0.3)
    wanted = reference_dropout.dropout_keep(*args)
    for threads in (1, 3):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        assert torch.equal(native_dropout.dropout_keep(*args), wanted)


def test_other_counters_are_left_to_torch() -> None:
    """Fails when int32 counters are read as int64."""
    ids, positions = counters(4)
    refused = [(ids.int(), positions), (ids, positions[:2]), (ids[::2], positions[::2])]
    assert all(native_dropout.row_halves(CALL, *pair) is NotImplemented for pair in refused)
