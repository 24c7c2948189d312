"""Rotation: the reference against transformers in float64, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from decal.kernels import native, native_elementwise, ops, reference_rope

SHAPES = [
    (0, 2, 8, 8),
    (1, 1, 2, 2),
    (3, 3, 64, 64),
    (5, 2, 70, 66),
    (4, 5, 80, 20),
    (2, 1, 128, 96),
]
"""T, heads, D and the width of the angles."""
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-6}

isas = pytest.mark.parametrize("isa", native.available())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
types = pytest.mark.parametrize(
    ("dtype", "angles"),
    [(x, y) for x in TOLERANCE for y in TOLERANCE],
    ids=str,
)
directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def angles_of(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random, and not the same in both halves."""
    angle = 3 * torch.randn(rows, width, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def strided(rows: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """Some heads of a buffer that holds two more."""
    return torch.randn(rows, heads + 2, size).to(dtype)[:, 1 : heads + 1]


def close(found: Tensor, wanted: Tensor) -> None:
    rtol = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol, equal_nan=True)


def test_reference_is_transformers_rotation() -> None:
    """float64, to 1e-13. Fails when the halves are interleaved, a sign is wrong, or cos of the
    first half serves the second."""
    q, k = (torch.randn(7, heads, 10, dtype=torch.float64) for heads in (4, 2))
    cos, sin = angles_of(7, 10, torch.float64)
    theirs = apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    for x, wanted in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(ops.rotate(x, cos, sin), wanted[0], rtol=0, atol=1e-13)


def test_inverse_is_the_gradient() -> None:
    """float64; also the inverse where both halves have one angle, and the features beyond the
    angles stay. Fails when inverse only negates sin: no transpose where halves differ."""
    x = torch.randn(5, 3, 14, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    cos, sin = angles_of(5, 6, torch.float64)
    (wanted,) = torch.autograd.grad(ops.rotate(x, cos, sin), x, grad)
    torch.testing.assert_close(ops.rotate(grad, cos, sin, True), wanted, rtol=0, atol=1e-13)
    cos, sin = (part[:, :3].repeat(1, 2) for part in (cos, sin))
    turned = ops.rotate(x, cos, sin)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(ops.rotate(turned, cos, sin, True), x, rtol=0, atol=1e-13)


@isas
@shapes
@types
@directions
def test_kernels_agree_with_the_reference(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, angles: torch.dtype, inverse: bool
) -> None:
    """Fails when strides are ignored, or features beyond the angles are not copied."""
    rows, heads, size, width = shape
    x = strided(rows, heads, size, dtype)
    cos, sin = angles_of(rows, width, angles)
    with native.forced(isa):
        found = native_elementwise.rotate(x, cos, sin, inverse)
    close(found, reference_rope.rotate(x, cos, sin, inverse))
    assert found.is_contiguous()


@pytest.mark.parametrize("isa", ["none", *native.available()])
@directions
def test_writes_into_other_memory_or_its_own(isa: str, inverse: bool) -> None:
    """Fails when a row's first half is overwritten before the second is computed, or the heads
    beside the view are touched."""
    x = strided(9, 3, 70, torch.bfloat16)
    assert x._base is not None
    before = x._base.clone()
    cos, sin = angles_of(9, 66, torch.bfloat16)
    wanted = reference_rope.rotate(x, cos, sin, inverse)
    other = strided(9, 3, 70, torch.bfloat16)
    with native.forced(isa):
        assert ops.rotate(x, cos, sin, inverse, other) is other
        close(other, wanted)
        assert torch.equal(x._base, before)
        version = x._version
        assert ops.rotate(x, cos, sin, inverse, x) is x
    close(x, wanted)
    assert x._version > version
    assert torch.equal(x._base[:, 0], before[:, 0])
    assert torch.equal(x._base[:, 4], before[:, 4])


@isas
def test_nan_stays_in_its_pair(isa: str) -> None:
    """Fails when heads or rows are mixed."""
    x = torch.randn(3, 2, 64)
    x[1, 1, 7] = torch.nan
    with native.forced(isa):
        found = native_elementwise.rotate(x, *angles_of(3, 64, torch.float32))
    assert found.isnan().nonzero().tolist() == [[1, 1, 7], [1, 1, 39]]


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when rows are shared out with a gap or an overlap."""
    x = strided(301, 3, 64, torch.bfloat16)
    cos, sin = angles_of(301, 64, torch.bfloat16)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        found.append(ops.rotate(x, cos, sin))
    assert torch.equal(*found)


def test_other_arguments_are_left_to_torch() -> None:
    """Fails when a kernel takes float64 bytes, or writes to heads that do not lie side by side."""
    x = torch.randn(3, 2, 8)
    cos, sin = angles_of(3, 8, torch.float32)
    apart = torch.empty(3, 8, 2).transpose(1, 2)
    refused = [
        (x.double(), cos, sin),
        (x, cos.double(), sin.double()),
        (x, cos[:2], sin[:2]),
        (x.clone().requires_grad_(), cos, sin),
        (x, cos, sin, False, apart),
    ]
    assert all(native_elementwise.rotate(*args) is NotImplemented for args in refused)
    close(ops.rotate(x, cos, sin, False, apart), reference_rope.rotate(x, cos, sin))
