"""The products in float32 by parts, against the reference's formulas in float64.

The tolerance is one rounding to bf16 of what is returned, as nothing in between is rounded.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from decal.kernels import fused_project, native, precision, reference_project
from decal.kernels.stored import Low, Stored
from tests.kernels.test_project import FORMATS, exact, kept, normal, stored, words

ROWS, OUT, IN, RANK = 150, 330, 70, 5
ROUNDED = 2**-8


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> object:
    """Without products of bf16, and in small parts: several of rows and of the weight."""
    monkeypatch.setattr(fused_project, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(fused_project, "_PART", 64 * IN)
    monkeypatch.setattr(fused_project, "_ROWS", 40 * IN)
    with native.forced("none"):
        yield


def half(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return normal(*shape, scale=scale, seed=seed).bfloat16()


def near(found: Tensor, wanted: Tensor, room: float = ROUNDED) -> bool:
    return bool((found.double() - wanted).norm() <= room * wanted.norm())


def rounded(weight: Stored) -> Tensor:
    return exact(weight).float().bfloat16().double()


@pytest.mark.parametrize("form", FORMATS)
def test_project(form: str) -> None:
    """Fails when a part of a packed weight takes another part's scales, or a segment's update
    begins with the chunk's first row instead of its own."""
    weight, x = stored(form, torch.bfloat16, (OUT, IN)), half(ROWS, IN)
    bias, add = half(OUT), half(ROWS, OUT, seed=1)
    low = [
        Low(half(30, RANK), half(OUT, RANK, seed=2), 20),
        Low(half(61, 2 * RANK), half(OUT, 2 * RANK, seed=3), 77),
    ]
    wanted = x.double() @ rounded(weight).t() + bias.double() + add.double()
    for part in low:
        wanted[part.rows] += part.z.double() @ part.factor.double().t()
    found = fused_project.project(x, weight, bias, low, add)
    assert found.dtype == torch.bfloat16
    assert near(found, wanted)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_project_back(form: str, dropped: bool) -> None:
    """Fails when the mask covers the base's part as well, or the second layer is left out."""
    weights = [stored(form, torch.bfloat16, shape) for shape in ((OUT, IN), (64, IN))]
    grads = [half(ROWS, OUT), half(ROWS, 64)]
    low = [Low(half(90, RANK), half(RANK, IN), 25)]
    keep = words(ROWS, IN) if dropped else None
    update = torch.zeros(ROWS, IN, dtype=torch.float64)
    update[low[0].rows] = low[0].z.double() @ low[0].factor.double()
    wanted = update * kept(keep, update)
    wanted += sum(g.double() @ rounded(w) for g, w in zip(grads, weights, strict=True))
    found = fused_project.project_back(list(zip(grads, weights, strict=True)), low, keep)
    assert near(found, wanted)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_into_rank_and_over_rows(
    dropped: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a chunk of rows takes the first chunk's mask."""
    if not shared:
        monkeypatch.setattr(fused_project, "_SHARED", 0)
    x, A, p = half(ROWS, IN), half(RANK, IN), half(ROWS, RANK)
    keep = words(ROWS, IN) if dropped else None
    masked = x.double() * kept(keep, x)
    out = torch.zeros(ROWS, 3 * RANK, dtype=torch.bfloat16)[:, RANK : 2 * RANK]
    assert fused_project.into_rank(x, A, keep, out) is out
    assert near(out, masked @ A.double().t())
    total = fused_project.over_rows(p, x, keep)
    assert total.dtype == torch.float32
    assert near(total, p.double().t() @ masked, 1e-6)


def test_every_mask_is_its_own() -> None:
    """Bit for bit. Fails when a mask is kept for the next one, or outlives what it is made of."""
    x = half(ROWS, IN)
    A = torch.eye(IN, dtype=torch.bfloat16)
    first, second = words(ROWS, IN), words(ROWS, IN, p=0.5)
    second = second._replace(offset=second.offset.flip(0).contiguous())
    for keep in (first, second, first):
        assert torch.equal(fused_project.into_rank(x, A, keep), keep.dropped(x, 0))
    del first, second, keep
    gc.collect()
    assert fused_project._MASK._held is None


def test_what_is_dropped_may_be_infinite() -> None:
    """Fails when values are multiplied by the mask: infinity times 0 is not 0."""
    keep = words(ROWS, IN)
    x = torch.ones(ROWS, IN, dtype=torch.bfloat16).masked_fill_(~keep.mask(0, ROWS), torch.inf)
    assert fused_project.into_rank(x, torch.eye(IN, dtype=torch.bfloat16), keep).isfinite().all()


def test_weights_are_those_of_every_backend() -> None:
    """Bit for bit. Fails when parts are not rounded to bf16 before they are widened."""
    weight = stored("nf4", torch.bfloat16, (OUT, IN))
    found = fused_project.project(torch.eye(IN, dtype=torch.bfloat16), weight)
    assert torch.equal(found.t(), reference_project.stored_weight(weight, torch.bfloat16))


def test_only_where_bf16_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the processor is not asked, or another dtype is taken."""
    x, A = half(4, IN), half(RANK, IN)
    assert fused_project.into_rank(x.float(), A.float()) is NotImplemented
    monkeypatch.setattr(fused_project, "multiplies_bf16", lambda: True)
    assert fused_project.into_rank(x, A) is NotImplemented


@pytest.mark.parametrize(
    ("machine", "said", "wanted"),
    [
        ("x86_64", (), False),
        ("x86_64", ("_is_avx512_bf16_supported",), True),
        ("x86_64", ("_is_amx_tile_supported",), True),
        ("aarch64", ("_is_mkldnn_bf16_supported",), True),
        ("aarch64", ("_is_avx512_bf16_supported",), False),
    ],
)
def test_who_multiplies_bf16(
    machine: str, said: tuple[str, ...], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when oneDNN's word is taken on x86-64: it emulates bf16 with AVX-512."""
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(precision, "_says", lambda module, name: name in said)
    assert precision._asked() is wanted
