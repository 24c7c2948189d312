"""Cross-entropy of rows: the reference against autograd in float64, the kernels against both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from decal.kernels import native, native_elementwise, ops, precision, reference_loss

WIDTHS = [1, 7, 33, 576, 1000, 5003]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}

isas = pytest.mark.parametrize("isa", native.available())
widths = pytest.mark.parametrize("width", WIDTHS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with rows apart in memory, and targets with the first, the last and ignored ones."""
    logits = (4 * torch.randn(rows, width + 3)).to(dtype)[:, :width]
    targets = torch.randint(width, (rows,))
    targets[:4] = torch.tensor([0, width - 1, reference_loss.IGNORED, width // 2])[:rows]
    return logits, targets


def compare(isa: str, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the kernel, after they were found to be the reference's."""
    mine, theirs = logits.clone(), logits.clone()
    with native.forced(isa):
        alone = native_elementwise.softmax_loss(mine, targets, False)
        torch.testing.assert_close(mine, logits, rtol=0, atol=0, equal_nan=True)
        losses = native_elementwise.softmax_loss(mine, targets, True)
    wanted = reference_loss.softmax_loss(theirs, targets, True)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(alone, losses, rtol=0, atol=0, equal_nan=True)
    rtol = TOLERANCE[logits.dtype]
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=3e-7, equal_nan=True)
    return losses, mine


def test_reference_is_cross_entropy_and_its_gradient() -> None:
    """float64, to 1e-12. Fails when the target's 1 is not taken off, ignored rows count, or rows
    beyond the first chunk are left."""
    logits, targets = inputs(9, 33, torch.float64)
    leaf = logits.clone().requires_grad_()
    wanted = functional.cross_entropy(leaf, targets, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    before = logits.clone()
    torch.testing.assert_close(ops.softmax_loss(logits, targets, False), wanted)
    assert torch.equal(logits, before)
    losses = ops.softmax_loss(logits, targets, True)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits, slope, rtol=1e-12, atol=1e-14)


def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a chunk writes to the rows of another."""
    logits, targets = inputs(9, 33, torch.float64)
    whole = logits.clone()
    wanted = reference_loss.softmax_loss(whole, targets, True)
    monkeypatch.setattr(precision, "_CPU_CHUNK", 70)
    assert torch.equal(reference_loss.softmax_loss(logits, targets, True), wanted)
    assert torch.equal(logits, whole)


@isas
@widths
@dtypes
def test_kernels_agree_with_the_reference(isa: str, width: int, dtype: torch.dtype) -> None:
    """Fails when strides are ignored, the last logits of a row are left out, or the gradient is not
    rounded from float32."""
    for rows in (0, 1, 6):
        compare(isa, *inputs(rows, width, dtype))


@isas
@dtypes
def test_rows_without_a_loss(isa: str, dtype: torch.dtype) -> None:
    """Loss 0 and gradient 0, whatever the logits are. Fails when ignored rows keep their logits."""
    logits, targets = inputs(6, 50, dtype)
    logits[2] = torch.nan
    losses, gradient = compare(isa, logits, targets)
    assert losses[2] == 0
    assert bool(gradient[2].eq(0).all())


@isas
@dtypes
def test_extreme_logits(isa: str, dtype: torch.dtype) -> None:
    """Far apart, -inf (probability 0, exactly), rows of one value. Fails without the maximum taken
    off, and where exp stops at its smallest normal number."""
    logits, targets = inputs(6, 50, dtype)
    logits[0, 7], logits[1, 7] = 30000.0, -30000.0
    logits[3, 9:] = -torch.inf
    targets[3] = 4
    logits[4] = 3.0
    logits[5] += 1e6
    losses, gradient = compare(isa, logits, targets)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert bool(gradient[3, 9:].eq(0).all())
    targets[3] = 20
    losses, _ = compare(isa, logits, targets)
    assert losses[3] == torch.inf


@isas
@dtypes
def test_broken_rows_stay_broken_and_alone(isa: str, dtype: torch.dtype) -> None:
    """NaN, +inf and nothing but -inf give a loss of NaN, as in torch. Fails when a maximum or exp
    swallows NaN."""
    for at in (0, 13, 49):
        logits, targets = inputs(6, 50, dtype)
        logits[0, at], logits[1, at], logits[4] = torch.nan, torch.inf, -torch.inf
        losses, gradient = compare(isa, logits, targets)
        assert losses.isnan().nonzero().view(-1).tolist() == [0, 1, 4]
        assert gradient[[0, 1, 4]].isnan().any(1).all()
        assert gradient[[2, 3, 5]].isfinite().all()


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when rows are shared out with a gap or an overlap."""
    logits, targets = inputs(101, 1000, torch.bfloat16)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        mine = logits.clone()
        found.append((ops.softmax_loss(mine, targets, True), mine))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_autograd_sees_the_write() -> None:
    """Fails when a kernel overwrites what a graph has kept and nobody notices."""
    logits, targets = inputs(3, 50, torch.float32)
    before = logits._version
    ops.softmax_loss(logits, targets, True)
    assert logits._version > before


def test_targets_out_of_range_raise() -> None:
    """Fails when a kernel reads beside the row."""
    logits, _ = inputs(2, 50, torch.float32)
    for wrong in (50, -1, -101):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            ops.softmax_loss(logits, torch.tensor([0, wrong]), True)


def test_other_arguments_are_left_to_torch() -> None:
    """Fails when a kernel takes float64 bytes, columns, or too few targets."""
    logits, targets = inputs(3, 50, torch.float32)
    refused = [
        (logits.double(), targets),
        (logits.t().contiguous().t(), targets),
        (logits, targets[:2]),
        (logits, targets.int()),
        (logits.clone().requires_grad_(), targets),
    ]
    for args in refused:
        assert native_elementwise.softmax_loss(*args, False) is NotImplemented
