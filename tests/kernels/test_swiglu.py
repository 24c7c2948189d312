"""SwiGLU: the reference against autograd in float64, the compiled kernels against the reference.

Both round once from float32, whose own error may move a value to its neighbour: 2^-7 in bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from decal.kernels import native, native_elementwise, ops, reference_swiglu

SHAPES = [(0, 8), (1, 1), (1, 7), (3, 33), (5, 576), (4, 1000)]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 3e-6}

isas = pytest.mark.parametrize("isa", native.available())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """grad, and gate and up as the two halves of one buffer: strided rows."""
    grad = torch.randn(shape).to(dtype)
    gate, up = (3 * torch.randn(shape[0], 2 * shape[1])).to(dtype).chunk(2, dim=1)
    return grad, gate, up


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.is_contiguous()
    rtol = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6, equal_nan=True)


def test_reference_is_the_formula_and_its_gradient() -> None:
    """float64, to 1e-12. Fails when gate and up are exchanged or a term of silu' is dropped."""
    grad, gate, up = (x.requires_grad_() for x in inputs((5, 33), torch.float64))
    wanted = functional.silu(gate) * up
    slopes = torch.autograd.grad(wanted, (gate, up), grad.detach())
    grad, gate, up = (x.detach() for x in (grad, gate, up))
    torch.testing.assert_close(ops.swiglu(gate, up), wanted, rtol=1e-12, atol=1e-14)
    found = ops.swiglu_backward(grad, gate, up)
    for x, y in zip(found, (*slopes, wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def test_bf16_is_the_exact_value_rounded_once() -> None:
    """To half a step, 2^-8 relative at most, and float32's own error. Fails when silu(gate)
    is rounded before the product."""
    _, gate, up = inputs((64, 576), torch.bfloat16)
    exact = functional.silu(gate.double()) * up.double()
    error = (ops.swiglu(gate, up).double() - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error.max() <= 2**-8 + 2**-20


@isas
@shapes
@dtypes
def test_kernels_agree_with_the_reference(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Fails when strides are ignored or the last values of a row are left out."""
    parts = inputs(shape, dtype)
    with native.forced(isa):
        close(native_elementwise.swiglu(*parts[1:]), reference_swiglu.swiglu(*parts[1:]))
        found = native_elementwise.swiglu_backward(*parts)
        for x, y in zip(found, reference_swiglu.swiglu_backward(*parts), strict=True):
            close(x, y)
        column = parts[1].t().contiguous().t()
        close(
            native_elementwise.swiglu(column, parts[2]), reference_swiglu.swiglu(column, parts[2])
        )


@isas
@dtypes
def test_extreme_gates(isa: str, dtype: torch.dtype) -> None:
    """exp under- and overflows without a trace, NaN stays NaN and in its place. Fails when a
    bounded exp swallows NaN."""
    values = [-1e30, -1e4, -100.0, -89.0, -88.0, 0.0, 88.0, 89.0, 100.0, 1e4, 1e30, torch.nan]
    gate = torch.tensor([values * 3], dtype=dtype)
    up, grad = (torch.full_like(gate, value) for value in (1.5, -0.75))
    with native.forced(isa):
        close(native_elementwise.swiglu(gate, up), reference_swiglu.swiglu(gate, up))
        found = native_elementwise.swiglu_backward(grad, gate, up)
    for x, y in zip(found, reference_swiglu.swiglu_backward(grad, gate, up), strict=True):
        close(x, y)
    gate, up = torch.ones_like(gate), torch.ones_like(gate)
    up[0, 5] = torch.nan
    with native.forced(isa):
        assert native_elementwise.swiglu(gate, up).isnan().nonzero().tolist() == [[0, 5]]


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when rows are shared out with a gap or an overlap."""
    parts = inputs((101, 576), torch.bfloat16)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        found.append((ops.swiglu(*parts[1:]), *ops.swiglu_backward(*parts)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_other_arguments_are_left_to_torch() -> None:
    """Fails when a kernel takes float64 bytes or shapes that differ."""
    grad, gate, up = inputs((3, 8), torch.float32)
    refused = [
        (gate.double(), up.double()),
        (gate.bfloat16(), up),
        (gate.clone().requires_grad_(), up),
        (gate, up[:2]),
    ]
    assert all(native_elementwise.swiglu(*pair) is NotImplemented for pair in refused)
    assert native_elementwise.swiglu_backward(grad[:2], gate, up) is NotImplemented
