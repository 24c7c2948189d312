"""Products with a stored weight and a low-rank update, against their formulas in float64.

Tolerances, relative to the norm: float64 1e-12, with quantized weights, whose values are rounded to
float32, 1e-6; bf16 a few roundings of 2^-8 each of what is added.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decal.kernels import native, ops
from decal.kernels.stored import Keep, Low, Stored, keep_words
from decal.quant import Recipe, quant_format

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROWS, OUT, IN, RANK = 37, 45, 70, 5

ISAS = ("none", *native.available())
FORMATS = ("dense", "transposed", "nf4", "nf4-plain", "fp4", "int8")


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> object:
    with native.forced(request.param):
        yield request.param


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def stored(form: str, dtype: torch.dtype, shape: tuple[int, int] = (OUT, IN)) -> Stored:
    weight = normal(*shape, scale=0.1)
    if form == "dense":
        return Stored("dense", shape, weight.to(dtype))
    if form == "transposed":
        return Stored("dense", shape, weight.to(dtype).t().contiguous().t())
    name, _, plain = form.partition("-")
    fmt = quant_format(name)
    return fmt.stored(fmt.quantize(weight.float(), Recipe(format=name, double=not plain)))


def exact(weight: Stored) -> Tensor:
    """The weight in float64, by the words of `Stored`."""
    if weight.format == "dense":
        return weight.data.double()
    assert weight.scales is not None
    if weight.format == "rows8":
        return weight.data.double() * weight.scales.double()[:, None] / 127
    scales = weight.scales
    if weight.nested is not None:
        nested = weight.nested.repeat_interleave(256)[: scales.numel()]
        scales = weight.table[scales.long()] * nested + weight.offset  # type: ignore[index]
    codes = torch.stack([weight.data >> 4, weight.data & 15], 1).flatten().long()
    n = weight.shape[0] * weight.shape[1]
    values = weight.code[codes[:n]]  # type: ignore[index]
    return (values.double() * scales.repeat_interleave(weight.block_size)[:n]).view(weight.shape)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype, *, rounded: bool = False) -> bool:
    assert found.shape == wanted.shape
    room = max(TOLERANCE[dtype], 1e-6 if rounded else 0.0)
    return bool((found.double() - wanted).norm() <= room * wanted.norm())


def words(rows: int = ROWS, features: int = IN, p: float = 0.3) -> Keep:
    ids, positions = torch.arange(rows) // 9, torch.arange(rows) % 9
    return keep_words(1, 2, 3, 4, ids, positions, features, p)


def kept(keep: Keep | None, like: Tensor) -> Tensor:
    if keep is None:
        return torch.ones_like(like, dtype=torch.float64)
    assert like.shape == (keep.offset.numel(), keep.column.numel())
    return keep.mask(0, like.shape[0]).double()


@pytest.mark.parametrize("features", [1, 70, 1025])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
def test_the_words_make_the_bits_of_dropout(features: int, p: float) -> None:
    """Bit for bit. Fails when offset and multiplier change places, or the shift is logical."""
    ids, positions = torch.arange(ROWS) // 9, torch.arange(ROWS) % 9
    whole = ops.dropout_keep(1, 2, 3, 4, ids, positions, features, p)
    keep = words(features=features, p=p)
    assert torch.equal(keep.mask(0, ROWS), whole)
    assert torch.equal(keep.mask(5, 9), whole[5:9])


@dtypes
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [*range(1, 9), ROWS])
def test_project(form: str, rows: int, dtype: torch.dtype) -> None:
    """All terms at once. Fails when the bias, the update or the residual is left out, or the
    second of two nibbles is read first."""
    weight = stored(form, dtype)
    x, bias, B = (normal(*s).to(dtype) for s in ((rows, IN), (OUT,), (OUT, RANK)))
    z = normal(rows, 3 * RANK).to(dtype)[:, RANK : 2 * RANK]  # one layer's part of a group's
    add = normal(rows, OUT, seed=1).to(dtype)
    wanted, rounded = x.double() @ exact(weight).t(), weight.format != "dense"
    assert near(ops.project(x, weight), wanted, dtype, rounded=rounded)
    wanted = wanted + bias.double() + z.double() @ B.double().t() + add.double()
    before = add.clone()
    assert near(ops.project(x, weight, bias, [Low(z, B)], add), wanted, dtype, rounded=rounded)
    assert torch.equal(add, before)
    wide = normal(rows, OUT + 5).to(dtype)
    ops.project(x, weight, bias, [Low(z, B)], add, out=wide[:, 2:-3])
    assert near(wide[:, 2:-3], wanted, dtype, rounded=rounded)
    assert torch.equal(wide[:, [0, 1, -1]], normal(rows, OUT + 5).to(dtype)[:, [0, 1, -1]])
    out = wide[:, 2:-3]
    assert ops.project(x, weight, out=out) is out
    assert torch.equal(out, ops.project(x, weight))


@dtypes
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dropped", [False, True])
def test_project_back(form: str, dropped: bool, dtype: torch.dtype) -> None:
    """Two layers of one input. Fails when the mask is applied to the base's part too, or when only
    the first layer counts."""
    first, second = stored(form, dtype), stored("dense", dtype, (33, IN))
    g, h, dz, A = (
        normal(*s).to(dtype) for s in ((ROWS, OUT), (ROWS, 33), (ROWS, RANK), (RANK, IN))
    )
    keep = words() if dropped else None
    wanted, rounded = g.double() @ exact(first), first.format != "dense"
    assert near(ops.project_back([(g, first)]), wanted, dtype, rounded=rounded)
    wanted = wanted + h.double() @ exact(second)
    wanted = wanted + kept(keep, wanted) * (dz.double() @ A.double())
    found = ops.project_back([(g, first), (h, second)], [Low(dz, A)], keep)
    assert near(found, wanted, dtype, rounded=rounded)


@dtypes
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("rows", "features"), [(1, IN), (ROWS, IN), (700, 513)])
def test_into_rank(rows: int, features: int, dropped: bool, dtype: torch.dtype) -> None:
    """Fails when a chunk of rows takes another chunk's mask."""
    x, A = normal(rows, features).to(dtype), normal(RANK, features).to(dtype)
    keep = words(rows, features) if dropped else None
    wanted = (kept(keep, x) * x.double()) @ A.double().t()
    assert near(ops.into_rank(x, A, keep), wanted, dtype)
    wide = normal(rows, RANK + 5).to(dtype)
    edges = wide[:, [0, 1, 2, -2, -1]]
    ops.into_rank(x, A.t().contiguous().t(), keep, wide[:, 3:-2])
    assert near(wide[:, 3:-2], wanted, dtype)
    assert torch.equal(wide[:, [0, 1, 2, -2, -1]], edges)


@dtypes
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("rows", "features"), [(1, IN), (ROWS, IN), (2500, 513)])
def test_over_rows(rows: int, features: int, dropped: bool, dtype: torch.dtype) -> None:
    """Summed in float32 also from bf16: within 1e-5. Fails when the sum is kept in bf16, or a
    chunk of rows is counted twice."""
    p = normal(rows, 3 * RANK).to(dtype)[:, RANK : 2 * RANK]
    q = normal(rows, features, seed=1).to(dtype)
    keep = words(rows, features) if dropped else None
    found = ops.over_rows(p, q, keep)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    wanted = p.double().t() @ (kept(keep, q) * q.double())
    assert near(found, wanted, found.dtype)
    assert near(ops.over_rows(p, q, keep, scale=-0.75), -0.75 * wanted, found.dtype)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: ops.project(x, w),
        lambda x, w: ops.project_back([(x @ torch.zeros(IN, OUT), w)]),
        lambda x, w: ops.into_rank(x, torch.ones(RANK, IN)),
        lambda x, w: ops.over_rows(x, x),
    ],
)
def test_no_rows(product: Callable[[Tensor, Stored], Tensor]) -> None:
    """Fails when an empty batch raises or leaves what was in the memory."""
    found = product(torch.zeros(0, IN), stored("dense", torch.float32))
    assert not bool(found.any())


@pytest.mark.parametrize("rank", [1, 3, 7, 16, 17])
def test_what_lies_behind_a_row_is_not_looked_at(rank: int) -> None:
    """Other adapters' columns, or memory that nobody has written. Fails in torch on a processor
    with AMX where rows of odd length are not copied."""
    amid = torch.full((ROWS, rank + 6), torch.nan, dtype=torch.bfloat16)[:, 2 : rank + 2]
    amid.copy_(normal(ROWS, rank))
    weight, x = stored("dense", torch.bfloat16), normal(ROWS, IN).bfloat16()
    A, B = normal(rank, IN).bfloat16(), normal(OUT, rank).bfloat16()
    grad = torch.full((ROWS, OUT + 3), torch.nan, dtype=torch.bfloat16)[:, :OUT]
    grad.copy_(normal(ROWS, OUT))
    assert ops.project(x, weight, None, [Low(amid, B)]).isfinite().all()
    assert ops.project_back([(grad, weight)], [Low(amid, A)]).isfinite().all()
