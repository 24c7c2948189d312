"""RMSNorm: the reference against autograd in float64, the compiled kernels against the reference.

Where both round to the same dtype, sums in another order may move a value to its neighbour: bf16
agrees to 2^-7 relative, float32 to a few 2^-23 of the row's size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from decal.kernels import native, native_elementwise, ops, reference_norm

SHAPES = [(0, 8), (1, 1), (1, 7), (3, 33), (5, 576), (4, 1000)]
TOLERANCE = {torch.bfloat16: (2**-7, 1e-5), torch.float32: (1e-5, 1e-5)}
EPS = 1e-5

isas = pytest.mark.parametrize("isa", native.available())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """x of several sizes per row, so that eps and rstd matter."""
    size = torch.logspace(-3, 2, shape[0] or 1)[: shape[0], None]
    x, grad, add = torch.randn(3, *shape).unbind()
    weight = 1 + torch.randn(shape[1]) / 2
    found = {"grad": grad, "x": x * size, "weight": weight, "add": add}
    return {name: value.to(dtype) for name, value in found.items()}


def close(found: Tensor, wanted: Tensor) -> None:
    rtol, atol = TOLERANCE[wanted.dtype]
    scale = wanted.float().nan_to_num(posinf=0, neginf=0).abs().max().item() if len(wanted) else 0.0
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol * scale, equal_nan=True)


def test_reference_is_the_formula_and_its_gradient() -> None:
    """float64, to 1e-12. Fails when the mean's part of the gradient is dropped, eps is added
    outside the root, or `add` is left out."""
    parts = inputs((5, 33), torch.float64)
    x = parts["x"].requires_grad_()
    wanted = parts["weight"] * x / (x.square().mean(1, keepdim=True) + EPS).sqrt()
    y, rstd = ops.rms_norm(x, parts["weight"], EPS)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(wanted, x, parts["grad"])
    args = (parts["grad"], x.detach(), parts["weight"], rstd.detach())
    torch.testing.assert_close(ops.rms_norm_backward(*args), slope, rtol=1e-10, atol=1e-12)
    both = ops.rms_norm_backward(*args, parts["add"])
    torch.testing.assert_close(both, slope + parts["add"], rtol=1e-10, atol=1e-12)


def test_rounds_as_transformers_does() -> None:
    """bf16, bit for bit. Fails when the product with the weight is taken before the rounding."""
    parts = inputs((7, 576), torch.bfloat16)
    theirs = LlamaRMSNorm(576, EPS).bfloat16()
    theirs.weight.data = parts["weight"]
    y, _ = reference_norm.rms_norm(parts["x"], parts["weight"], EPS)
    assert torch.equal(y, theirs(parts["x"]).detach())


@isas
@shapes
@dtypes
def test_kernels_agree_with_the_reference(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Fails when the last values of a row are left out, or an accumulator is forgotten."""
    parts = inputs(shape, dtype)
    x, weight = parts["x"], parts["weight"]
    y, rstd = reference_norm.rms_norm(x, weight, EPS)
    with native.forced(isa):
        found_y, found_rstd = native_elementwise.rms_norm(x, weight, EPS)
        close(found_y, y)
        torch.testing.assert_close(found_rstd, rstd, rtol=1e-6, atol=0)
        for add in (None, parts["add"]):
            args = (parts["grad"], x, weight, rstd, add)
            found = native_elementwise.rms_norm_backward(*args)
            close(found, reference_norm.rms_norm_backward(*args))


@isas
@dtypes
def test_a_broken_row_breaks_no_other(isa: str, dtype: torch.dtype) -> None:
    """NaN stays NaN, squares overflow as in torch, zeros stay zeros. Fails when a maximum or a
    comparison swallows NaN."""
    parts = inputs((5, 37), dtype)
    x, weight = parts["x"], parts["weight"]
    x[0, 3], x[1, 36], x[2] = torch.nan, torch.inf, 0.0
    x[3] = 1e30
    with native.forced(isa):
        y, rstd = native_elementwise.rms_norm(x, weight, EPS)
        dx = native_elementwise.rms_norm_backward(parts["grad"], x, weight, rstd)
    wanted, wanted_rstd = reference_norm.rms_norm(x, weight, EPS)
    close(y, wanted)
    torch.testing.assert_close(rstd, wanted_rstd, rtol=1e-6, atol=0, equal_nan=True)
    assert dx[0].isnan().all()
    assert dx[2:].isfinite().all()
    assert y[2].eq(0).all()


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when rows are shared out with a gap or an overlap."""
    parts = inputs((101, 576), torch.bfloat16)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        y, rstd = ops.rms_norm(parts["x"], parts["weight"], EPS)
        found.append((y, ops.rms_norm_backward(parts["grad"], parts["x"], parts["weight"], rstd)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_other_arguments_are_left_to_torch() -> None:
    """float64, mixed dtypes, recorded inputs, shapes that do not fit. Fails when a kernel reads
    memory it was not given."""
    parts = inputs((3, 8), torch.float32)
    x, weight = parts["x"], parts["weight"]
    refused = [
        (x.double(), weight.double()),
        (x.bfloat16(), weight),
        (x.clone().requires_grad_(), weight),
        (x, weight[:4]),
    ]
    assert all(native_elementwise.rms_norm(*pair, EPS) is NotImplemented for pair in refused)
    y, rstd = ops.rms_norm(x.bfloat16(), weight, EPS)
    assert y.dtype == torch.float32
    rest = (x, weight, rstd[:2])
    assert native_elementwise.rms_norm_backward(parts["grad"], *rest) is NotImplemented
