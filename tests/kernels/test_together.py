"""Products that are put off to the end of a block: the same numbers, in every order of ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from decal.kernels import native, native_project, ops
from decal.kernels.stored import Keep, Low, Stored, keep_words

pytestmark = pytest.mark.skipif(not native.available(), reason="the library is not built")

T, K, N, R = 70, 96, 160, 8


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def keeping() -> Keep:
    ids = torch.arange(T)
    return keep_words(1, 0, 2, 3, ids, ids, K, 0.3)


def a_group(rows: int, weight: Stored) -> list[Tensor]:
    """A layer forward and back, every product of which reads what one before it has written."""
    x, A, B = normal(rows, K), normal(R, K, seed=1), normal(weight.shape[0], R, seed=2)
    keep = keeping().rows(0, rows)
    z = torch.full((rows, R), torch.nan, dtype=torch.bfloat16)
    ops.into_rank(x, A, keep, out=z)
    y = ops.project(x, weight, None, [Low(z, B)])
    dz = torch.full_like(z, torch.nan)
    ops.into_rank(y, B.t(), out=dz)
    dA, dB = ops.over_rows(dz, x, keep), ops.over_rows(y, z, scale=0.5)
    dx = ops.project_back([(y, weight)], [Low(dz, A)], keep)
    return [z, y, dz, dA, dB, dx]


def weight(columns: int = N) -> Stored:
    return Stored("dense", (columns, K), normal(columns, K, seed=3))


@pytest.mark.parametrize("rows", [1, 5, T])
def test_the_same_numbers_to_the_bit(isa: str, rows: int) -> None:
    """Also where few rows take another kernel, at once. Fails when a product does not wait for the
    one before it, or is made before it."""
    alone = a_group(rows, weight())
    with ops.together():
        together = a_group(rows, weight())
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_one_call_for_all(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when products inside a block are not put off, or a block in a block makes its own."""
    calls: list[int] = []
    send = native_project.send
    monkeypatch.setattr(
        native_project, "send", lambda found: (calls.append(len(found)), send(found))
    )
    with ops.together(), ops.together():
        a_group(T, weight())
        assert not calls
    assert calls == [6]
    a_group(T, weight())
    assert calls == [6, *[1] * 6]


def test_what_is_not_compiled_finds_what_was_put_off(isa: str) -> None:
    """A float32 weight is torch's, and its product reads z. Fails when torch does not wait."""
    x, A, B = normal(T, K), normal(R, K, seed=1), normal(N, R, seed=2)
    wide = Stored("dense", (N, K), normal(N, K, seed=3).float())
    wanted = ops.project(x, wide, None, [Low(ops.into_rank(x, A), B)])
    with ops.together():
        z = torch.full((T, R), torch.nan, dtype=torch.bfloat16)
        ops.into_rank(x, A, out=z)
        found = ops.project(x, wide, None, [Low(z, B)])
        assert torch.equal(found, wanted)


def test_an_error_inside_leaves_nothing_behind(isa: str) -> None:
    """Fails when products of a block that raised are made later, into memory that is gone."""
    out = torch.zeros(T, R, dtype=torch.bfloat16)

    def stopped() -> None:
        with ops.together():
            ops.into_rank(normal(T, K), normal(R, K, seed=1), out=out)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    ops.into_rank(normal(T, K), normal(R, K, seed=1))
    assert not out.any()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(isa: str, threads: int) -> None:
    """Threads meet between products. Fails when one goes on while another still writes."""
    before = torch.get_num_threads()
    large = Stored("dense", (512, K), normal(512, K, seed=3))
    alone = a_group(T, large)
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            with ops.together():
                together = a_group(T, large)
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(before)
