"""What is particular to the compiled products: sizes at the edges, foreign memory, NaN, threads.

That they compute the formulas is tested with the others in test_project.py. Tolerance: bf16 rounds
once, 2^-8, and the elements of a sum of few products are about as large as the sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from decal.kernels import native, native_project, ops
from decal.kernels.reference_project import stored_weight
from decal.kernels.stored import Keep, Low, Stored, keep_words, stacked
from decal.quant import Recipe, quant_format

pytestmark = pytest.mark.skipif(not native.available(), reason="the library is not built")


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced(request.param):
        yield request.param


def inside(rows: int, columns: int) -> Tensor:
    """A random matrix amid NaN: before, between and behind its rows."""
    around = torch.full((rows + 2, columns + 7), torch.nan, dtype=torch.bfloat16)
    around[1 : rows + 1, 3 : columns + 3] = torch.randn(rows, columns) * 0.3
    return around[1 : rows + 1, 3 : columns + 3]


def dense(x: Tensor) -> Stored:
    return Stored("dense", (x.shape[0], x.shape[1]), x)


def packed(name: str, rows: int, columns: int) -> Stored:
    fmt = quant_format(name)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.1
    return fmt.stored(fmt.quantize(weight, Recipe(format=name)))


def keeping(rows: int, features: int) -> Keep:
    ids = torch.arange(rows)
    return keep_words(1, 0, 2, 3, ids, ids * 7, features, 0.3)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2**-7, atol=2e-2)


EDGES = [(1, 1, 1), (2, 17, 3), (13, 16, 64), (5, 65, 31), (33, 3, 130), (0, 5, 6), (4, 0, 6)]


@pytest.mark.parametrize(("T", "N", "K"), [*EDGES, (4, 6, 0)])
@pytest.mark.parametrize("rank", [0, 1, 3, 16, 33])
def test_reads_its_operands_and_nothing_else(isa: str, T: int, N: int, K: int, rank: int) -> None:
    """Fails when the columns that fill up the last vector come from memory, or a product over no
    columns leaves what was in the memory."""
    x, weight, z, B, add = (
        inside(T, K),
        inside(N, K),
        inside(T, rank),
        inside(N, rank),
        inside(T, N),
    )
    bias = inside(1, N)[0]
    y = native_project.project(x, dense(weight), bias, [Low(z, B)], add)
    close(y, (x.double() @ weight.double().T + bias + z.double() @ B.double().T + add))
    A, keep = inside(rank, K), keeping(T, K)
    mask = keep.mask(0, T)
    grad = inside(T, N)
    dx = native_project.project_back(
        [(grad, dense(weight)), (add, dense(weight))], [Low(z, A)], keep
    )
    close(dx, mask * (z.double() @ A.double()) + (grad.double() + add.double()) @ weight.double())
    close(native_project.into_rank(x, A, keep), (mask * x.double()) @ A.double().T)
    turned = inside(K, N).t()
    y = native_project.project(x, dense(turned), bias, [Low(z, B)], add)
    close(y, (x.double() @ turned.double().T + bias + z.double() @ B.double().T + add))
    dx = native_project.project_back(
        [(grad, dense(weight)), (add, dense(turned))], [Low(z, A)], keep
    )
    found = mask * (z.double() @ A.double()) + grad.double() @ weight.double()
    close(dx, found + add.double() @ turned.double())
    close(native_project.over_rows(z, x, keep), z.double().T @ (mask * x.double()))
    close(native_project.over_rows(grad, z), grad.double().T @ z.double())


@pytest.mark.parametrize("rank", [*range(1, 129, 18), 1000])
def test_any_rank(isa: str, rank: int) -> None:
    """Fails when a rank that is no multiple of a vector is cut, or when the pieces of a product
    share the room for their widened rows."""
    x, A, dz = inside(9, 70), inside(rank, 70) * 0.3, inside(9, rank) * 0.3
    close(native_project.into_rank(x, A), x.double() @ A.double().T)
    close(native_project.over_rows(dz, x), dz.double().T @ x.double())
    B, wide = inside(70, rank) * 0.3, torch.zeros(9, rank + 5, dtype=torch.bfloat16)
    native_project.into_rank(x, B.t(), None, wide[:, 3:-2])
    close(wide[:, 3:-2], x.double() @ B.double())
    assert not wide[:, :3].any()
    assert not wide[:, -2:].any()
    weight = packed("nf4", 8, 70)
    grad = torch.zeros(9, 8, dtype=torch.bfloat16)
    close(native_project.project_back([(grad, weight)], [Low(dz, A)]), dz.double() @ A.double())


@pytest.mark.parametrize("depth", [2047, 2049, 4100])
def test_a_deep_contraction_goes_in_passes(isa: str, depth: int) -> None:
    """Fails when a pass forgets the sums of the one before, or the mask is applied in each."""
    x, weight, z, B = inside(3, depth) * 0.1, inside(5, depth), inside(3, 7), inside(5, 7)
    y = native_project.project(x, dense(weight), None, [Low(z, B)])
    close(y, x.double() @ weight.double().T + z.double() @ B.double().T)
    grad, other, A, keep = inside(3, depth) * 0.1, inside(depth, 9), inside(7, 9), keeping(3, 9)
    dx = native_project.project_back([(grad, dense(other))], [Low(z, A)], keep)
    close(dx, keep.mask(0, 3) * (z.double() @ A.double()) + grad.double() @ other.double())
    p, q, keep = inside(depth, 3) * 0.1, inside(depth, 9), keeping(depth, 9)
    close(native_project.over_rows(p, q, keep), p.double().T @ (keep.mask(0, depth) * q.double()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_show(isa: str, value: float) -> None:
    """Training must see them. Fails when a kernel leaves out products with a weight of zero, or
    when rows that share a block of registers share their NaN."""
    weight = packed("nf4", 40, 70)
    x, grad = inside(14, 70), inside(14, 40)
    x[6, 69], grad[6, 39] = value, value
    rows = torch.arange(14) == 6
    for found in (
        native_project.project(x, weight),
        native_project.project_back([(grad, weight)]),
        native_project.into_rank(x, inside(5, 70)),
        native_project.over_rows(x, grad).T @ torch.zeros(70, 1),
    ):
        bad = ~found.isfinite()
        assert bool(bad[rows].all()) if found.shape[0] == 14 else bool(bad.all())
        assert found.shape[0] != 14 or not bool(bad[~rows].any())


def test_threads_do_not_show(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share the outputs, never one sum. Fails when they split a contraction."""
    weight, x, grad = packed("nf4", 150, 2100), inside(61, 2100), inside(61, 150)

    def products() -> list[Tensor]:
        keep = keeping(61, 2100)
        z = native_project.into_rank(x, inside_once, keep)
        return [
            z,
            native_project.project(x, weight),
            native_project.project_back([(grad, weight)], [Low(z, inside_once)], keep),
            native_project.over_rows(z, x, keep),
        ]

    inside_once = inside(8, 2100)
    found = []
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(native, "threads", lambda n=threads: n)
        found.append(products())
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_other_rows_do_not_show(isa: str) -> None:
    """Fails when a row's sums run in another order in another place of the batch."""
    weight, x, A = packed("nf4", 150, 2100), inside(41, 2100), inside(24, 2100)
    for product in (
        lambda x: native_project.project(x, weight),
        lambda x: native_project.project_back([(x[:, :150], weight)]),
        lambda x: native_project.into_rank(x, A),
    ):
        assert torch.equal(product(x)[7:30], product(x[7:30]))


def test_what_does_not_fit_is_left_to_torch(isa: str) -> None:
    """Fails when a kernel would read beyond the memory of an operand that is too small."""
    weight, x, z, B = packed("nf4", 40, 70), inside(9, 70), inside(9, 5), inside(40, 5)
    A, keep = inside(5, 70), keeping(9, 70)
    project, back = native_project.project, native_project.project_back
    assert project(x, weight, None, [Low(z, B)], inside(9, 40)) is not NotImplemented
    refused = [
        project(x[:, :64], weight),
        project(x, weight, B[:39, 0].contiguous()),
        project(x, weight, None, [Low(z[:8], B, 2)]),
        project(x, weight, None, [Low(z, B[:, :4])]),
        project(x, weight, None, (), inside(8, 40)),
        project(x, weight._replace(data=weight.data[:-1])),
        project(x, weight._replace(scales=weight.scales[:-1])),  # type: ignore[index]
        project(x, weight._replace(data=weight.data.to("meta"))),
        project(x.float(), weight),
        back([(x, weight)]),
        back([(inside(9, 40), weight), (inside(8, 40), weight)]),
        back([(inside(9, 40), weight)], [Low(z, A[:, :69])], keep),
        back([(inside(9, 40), weight)], [Low(z, A)], keeping(8, 70)),
        native_project.into_rank(x, A[:, :69]),
        native_project.into_rank(x, A, keeping(9, 69)),
        native_project.over_rows(z[:8], x),
        native_project.over_rows(z, x, keep._replace(factor=keep.factor.long())),
    ]
    assert all(found is NotImplemented for found in refused)
    with pytest.raises(RuntimeError):
        ops.project(x[:, :64], weight)


@pytest.mark.parametrize("beside", [1, 5, 8])
def test_sums_begin_anew_where_they_do_alone(isa: str, beside: int) -> None:
    """Of terms that nearly cancel, so that bf16 shows the last digits of float. Fails when a deep
    contraction is cut elsewhere, in the middle of a pair, for the sake of an adapter of others."""
    half = inside(1300, 72)
    weight = torch.cat([half, (-half.double() + 1e-3 * torch.randn(1300, 72)).bfloat16()])
    grad = inside(16, 1300).repeat(1, 2)
    whole = Stored("dense", (2600, 72), weight)
    own, other = Low(inside(8, 8), inside(8, 72), 0), Low(inside(8, beside), inside(beside, 72), 8)
    found = native_project.project_back([(grad, whole)], [own, other])
    alone = native_project.project_back([(grad[:8], whole)], [own])
    assert torch.equal(found[:8], alone)


@pytest.mark.parametrize("deep", [70, 2100])
@pytest.mark.parametrize("T", [9, 64])
def test_rows_of_several_adapters_are_those_of_each_alone(isa: str, deep: int, T: int) -> None:
    """To the bit, with masks of their own. Fails when a part serves its neighbour's rows, z begins
    with the product's first row, a row without an adapter keeps what was in the memory, or the mask
    of one part reaches another's sums."""
    cuts = [(0, 3, 5), (3, 4, 0), (4, 7, 33), (7, T, 1)]  # the second has none
    x, weight, grad = inside(T, deep), packed("nf4", 40, deep), inside(T, 40)
    parts = [Low(inside(b - a, r), inside(40, r), a) for a, b, r in cuts]
    back = [Low(p.z, inside(p.z.shape[1], deep), p.start) for p in parts]
    ids = torch.arange(T)
    words = [
        (keep_words(i, 0, 2, 3, ids[a:b], ids[a:b] * 7, deep, i / 5), b - a)
        for i, (a, b, _) in enumerate(cuts)
    ]
    keep = stacked(words, deep, torch.device("cpu"))
    y = native_project.project(x, weight, None, [parts[0], *parts[2:]], grad)
    dx = native_project.project_back([(grad, weight)], [back[0], *back[2:]], keep)
    for i, (a, b, r) in enumerate(cuts):
        rows, many = slice(a, b), 9  # a product of few rows is multiplied in another way
        low = [Low(torch.cat([parts[i].z] * many), parts[i].factor)] if r else []
        xs, grads = torch.cat([x[rows]] * many), torch.cat([grad[rows]] * many)
        alone = native_project.project(xs, weight, None, low, grads)
        assert torch.equal(y[rows], alone[: b - a]), i
        low = [back[i]._replace(start=0)] if r else []
        alone = native_project.project_back([(grad[rows], weight)], low, keep.rows(a, b))
        assert torch.equal(dx[rows], alone), i
    wanted = keep.mask(0, T)[7:] * (parts[3].z.double() @ back[3].factor.double())
    close(dx[7:].double() - grad[7:].double() @ stored_weight(weight, torch.float64), wanted)
