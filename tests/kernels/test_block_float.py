"""Products in integers that share an exponent (native/block_float.h), against float64.

Tolerance: y is rounded to bf16 once. What integers lose comes on top: so a row's error may be a
quarter more than rounding alone makes it. Where features differ in size by a lot and weights make
up for it, it may be several times that, short of what has rests multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from decal.kernels import native, native_project
from decal.kernels.stored import Keep, Low, Stored, keep_words
from decal.quant import Recipe, quant_format

pytestmark = pytest.mark.skipif("avx2" not in native.available(), reason="kernels of AVX2 only")

OVER_ROUNDING = 1.25


@pytest.fixture(autouse=True)
def isa() -> Iterator[None]:
    with native.forced("avx2"):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def dense(x: Tensor) -> Stored:
    return Stored("dense", (x.shape[0], x.shape[1]), x)


def within(found: Tensor, exact: Tensor, over: float = OVER_ROUNDING) -> None:
    """Row by row: nearly as near as the exact result rounded to bf16."""
    assert found.shape == exact.shape
    error = (found.double() - exact).norm(dim=1)
    rounding = (exact.bfloat16().double() - exact).norm(dim=1)
    floor = exact.norm(dim=1) * 2.0**-10  # a row may happen to need no rounding
    assert bool((error <= over * rounding.maximum(floor)).all()), (error / rounding).max()


def both_ways(x: Tensor, weight: Tensor, over: float = OVER_ROUNDING) -> None:
    """x W^T read along the rows of W, and read across those of its transpose."""
    exact = x.double() @ weight.double().T
    within(native_project.project(x, dense(weight)), exact, over)
    across = dense(weight.t().contiguous())
    within(native_project.project_back([(x, across)]), exact, over)


@pytest.mark.parametrize("T", [9, 13])
@pytest.mark.parametrize("N", [64, 65, 83])
@pytest.mark.parametrize("K", [128, 129, 191, 255, 256, 600, 2048, 2049, 4200])
def test_all_sizes(T: int, N: int, K: int) -> None:
    """Fails when the last block's rest is left out or read twice, when a pass forgets the one
    before, or when blocks are cut between passes."""
    both_ways(normal(T, K), normal(N, K, seed=1) * 0.02)


def test_more_rows_than_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the second thousand of rows reads the integers of the first."""
    monkeypatch.setattr(native, "threads", lambda: 1)
    x = normal(1100, 2100)
    x[1030, 3] *= 1000
    both_ways(x, normal(70, 2100, seed=1) * 0.02)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("K", [192, 640])
def test_packed_weights(name: str, K: int) -> None:
    """Fails when rows of a packed weight are unpacked at another place than dense ones."""
    form = quant_format(name)
    weight = form.quantize(normal(150, K) * 0.02, Recipe(format=name))
    x, grad, held = normal(11, K, seed=1), normal(11, 150, seed=2), form.stored(weight)
    values = form.dequantize(weight, torch.bfloat16).double()
    within(native_project.project(x, held), x.double() @ values.T)
    within(native_project.project_back([(grad, held)]), grad.double() @ values)


def test_the_largest_sum_fits() -> None:
    """Fails when either side has one bit more: 64 products overflow 32 bits."""
    for sign in (1.0, -1.0):
        x = torch.full((9, 128), 1.9921875, dtype=torch.bfloat16)
        weight = torch.full((64, 128), sign * 1.9921875, dtype=torch.bfloat16)
        found = native_project.project(x, dense(weight))
        assert torch.equal(found, (x.double() @ weight.double().T).bfloat16())


def test_whole_numbers_are_exact() -> None:
    """Fails when integers are cut instead of rounded, or a unit is off by a rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-64, 65, (12, 700), generator=generator).bfloat16()
    weight = torch.randint(-16, 17, (70, 700), generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    assert torch.equal(native_project.project(x, dense(weight)), exact.bfloat16())


OUTLIERS = [30.0, 100.0, 1000.0, 1e5]


@pytest.mark.parametrize("times", OUTLIERS)
@pytest.mark.parametrize(("K", "how_many"), [(600, 1), (2600, 9)])
def test_outliers_take_nothing_from_the_others(times: float, K: int, how_many: int) -> None:
    """Fails without the rounds of the rests: the others of their block lose their digits; or when a
    later pass looks for its rests among the first's."""
    x, weight = normal(12, K), normal(64, K, seed=1) * 0.02
    places = torch.randperm(K, generator=torch.Generator().manual_seed(2))[:how_many]
    x[:, places] *= times
    both_ways(x, weight)
    # Where the weights make up for it, the small ones must have digits too: 23 bits, not all.
    weight[:, places] /= min(times, 1000.0)
    both_ways(x, weight, over=3.0)


@pytest.mark.parametrize(
    ("every", "times", "over"),
    [(2, 4, 1.5), (2, 16, 2.5), (2, 64, 1.5), (8, 4, 2.0), (8, 16, 3.5), (128, 1000, 3.5)],
)
def test_features_of_different_sizes(every: int, times: float, over: float) -> None:
    """As a norm's gain makes them, with weights that make up for it. Fails when only the block of
    the row, or only that of the column, can ask for rests."""
    x, weight = normal(24, 600), normal(64, 600, seed=1) * 0.02
    for sign in (1, -1):
        a, b = x.clone(), weight.clone()
        a[:, ::every] *= float(times) ** sign
        b[:, ::every] /= float(times) ** sign
        both_ways(a, b, over=over)


def test_gradients_of_a_loss() -> None:
    """One entry near -1 in a row of probabilities. Fails as outliers do."""
    grad = torch.softmax(normal(10, 3000).float() * 3, 1)
    grad[torch.arange(10), torch.arange(10) * 299] -= 1
    both_ways(grad.bfloat16(), normal(64, 3000, seed=1) * 0.02)


@pytest.mark.parametrize("power", [-120, -60, 60, 120])
def test_any_magnitude(power: int) -> None:
    """Fails when exponents run out of their range inside."""
    x, weight = normal(9, 300), normal(64, 300, seed=1)
    scaled = native_project.project((x.double() * 2.0**power).bfloat16(), dense(weight))
    plain = native_project.project(x, dense(weight))
    if power > -110:  # smaller blocks are zero: their largest is below 2^-113
        assert torch.equal(scaled.double(), plain.double() * 2.0**power)
    else:
        assert not scaled.any()


def test_zeros() -> None:
    """Fails when a block of zeros divides by its largest."""
    x, weight = torch.zeros(9, 300).bfloat16(), normal(64, 300)
    assert not native_project.project(x, dense(weight)).any()
    x, weight[:, 128:256] = normal(9, 300), 0.0
    both_ways(x, weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    """Fails when NaN of a row reaches rows in the same registers, or disappears in an integer."""
    x, weight = normal(14, 300), normal(70, 300, seed=1)
    x[6, 290] = value
    found = native_project.project(x, dense(weight))
    assert not found[6].isfinite().any()
    found[6] = 0
    assert found.isfinite().all()
    x[6, 290], weight[33, 7] = 1000.0, value
    across = dense(weight.t().contiguous())
    for found in (
        native_project.project(x, dense(weight)),
        native_project.project_back([(x, across)]),
    ):
        assert not found[:, 33].isfinite().any()
        found[:, 33] = 0
        assert found.isfinite().all()


def test_neither_threads_nor_other_rows_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with rests in some rows. Fails when a rest of one row is used for its neighbours,
    or when a column's blocks depend on the strip that it is in."""
    x, weight = normal(50, 700), normal(200, 700, seed=1) * 0.02
    x[7, 5] *= 1000
    x[31, 600:] *= 1000
    x[32, 601] *= 1e4
    across = dense(weight.t().contiguous())
    monkeypatch.setattr(native, "threads", lambda: 1)
    whole = native_project.project(x, dense(weight))
    back = native_project.project_back([(x, across)])
    for threads in (2, 3):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        assert torch.equal(native_project.project(x, dense(weight)), whole)
        assert torch.equal(native_project.project_back([(x, across)]), back)
    for begin, end in ((0, 10), (3, 40), (30, 50)):
        some = x[begin:end].contiguous()
        assert torch.equal(native_project.project(some, dense(weight)), whole[begin:end])
        assert torch.equal(native_project.project_back([(some, across)]), back[begin:end])


def test_a_low_rank_part_that_is_wide_enough_for_blocks() -> None:
    """Of some rows only, behind a mask. Fails when its rows are counted from the product's first,
    or the mask comes before its sums."""
    T, K, r = 70, 160, 150
    weight, grad, A = normal(300, K, seed=1) * 0.02, normal(T, 300), normal(r, K, seed=2) * 0.1
    z, ids = normal(T - 20, r, seed=3), torch.arange(T)
    z[5, 7] *= 1000
    keep = keep_words(1, 0, 2, 3, ids, ids * 7, K, 0.3)
    found = native_project.project_back([(grad, dense(weight))], [Low(z, A, start=20)], keep)
    exact = grad.double() @ weight.double()
    exact[20:] += keep.mask(20, T) * (z.double() @ A.double())
    within(found, exact)


def test_low_rank_parts_and_masks_beside_it() -> None:
    """Several weights, adapters of several rows and ranks, a mask over the low-rank part. Fails
    when the mask reaches what integers added, a segment reads another's units, or a pass begins
    inside of a block."""
    T, K = 30, 160
    one, two = normal(300, K, seed=1) * 0.02, normal(2300, K, seed=2) * 0.02
    grads = normal(T, 300, seed=3), normal(T, 2300, seed=4)
    grads[0][11, 4] *= 3000
    z, A = normal(T, 7, seed=5), normal(7, K, seed=6)
    ids = torch.arange(T)
    keep: Keep = keep_words(1, 0, 2, 3, ids, ids * 7, K, 0.3)
    parts = list(zip(grads, (dense(one), dense(two)), strict=True))
    found = native_project.project_back(parts, [Low(z, A)], keep)
    exact = sum(g.double() @ w.double() for g, w in zip(grads, (one, two), strict=True))
    within(found, exact + keep.mask(0, T) * (z.double() @ A.double()))
    x, B, add, bias = normal(T, 700), normal(300, 7, seed=7), normal(T, 300, seed=8), normal(300)
    weight = normal(300, 700, seed=9) * 0.02
    exact = x.double() @ weight.double().T + bias.double() + add.double()
    low = [Low(z[:12], B, start=0), Low(z[12:], B * 2, start=12)]
    exact[:12] += z[:12].double() @ B.double().T
    exact[12:] += z[12:].double() @ (B * 2).double().T
    within(native_project.project(x, dense(weight), bias, low, add), exact)
