"""The compiled attention against the softmax written out in float64, and against torch's own.

Tolerances: out is rounded once to bf16, by 2^-9 at most. With products of bf16 pairs shares are
rounded on the way, too; a gradient sees out, the gradients of the shares and itself rounded. So
three roundings bound every result, in the norm. Where torch's fused attention runs, ours is
compared to its error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decal.kernels import native, native_attention, ops, reference_attention

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled library")

TOLERANCE = 3 * 2**-9
LENGTHS = [65, 1, 2, 0, 17, 64, 257, 0]
SHAPES = {
    "plain": (LENGTHS, 6, 2, 64, 64, None),
    "short": ([1], 2, 2, 8, 8, None),
    "seven to one": ([65, 0, 33], 7, 1, 40, 40, None),
    "wide": ([130, 7], 3, 3, 128, 80, None),
    "odd": (LENGTHS, 3, 1, 7, 3, None),
    "window": (LENGTHS, 6, 2, 64, 40, 5),
    "wide window": ([333, 1, 70], 3, 1, 80, 64, 100),
    "window of a block": ([200], 2, 1, 16, 16, 64),
    "window as long as a sequence": ([257, 100], 2, 2, 8, 8, 257),
}


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced(request.param):
        yield request.param


class Case:
    """Views of one fused buffer, and what float64 says of them."""

    def __init__(self, lengths: list[int], heads: int, keys: int, dim: int, values: int) -> None:
        self.cu = torch.tensor([0, *lengths]).cumsum(0)
        T = int(self.cu[-1])
        sizes = [heads * dim, keys * dim, keys * values]
        parts = torch.randn(T, sum(sizes) + 1).bfloat16()[:, 1:].split(sizes, 1)
        self.q, self.k = (x.unflatten(1, (-1, dim)) for x in parts[:2])
        self.v = parts[2].unflatten(1, (-1, values))
        self.grad = torch.randn(T, heads, values).bfloat16()
        self.scale = 1.3 / dim**0.5

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def exact(self, window: int | None) -> tuple[Tensor, ...]:
        """out, dq, dk, dv of autograd in float64, through the softmax written out."""
        leaves = [x.double().requires_grad_() for x in self.inputs]
        out = ops.attention_flat(*leaves, self.cu, self.scale, window)
        return out.detach(), *torch.autograd.grad(out, leaves, self.grad.double())

    def ours(self, window: int | None) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        out = native_attention.attention_flat(*leaves, self.cu, self.scale, window)
        return out.detach(), *torch.autograd.grad(out, leaves, self.grad)


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """In the norm, of out, dq, dk and dv. Where attention has one key dq and dk are zero, and what
    is left is judged by the size of dv."""
    sizes = [float(x.norm()) for x in exact]
    sizes[1:3] = (max(x, 0.1 * sizes[3]) for x in sizes[1:3])
    pairs = zip(found, exact, sizes, strict=True)
    return [float((a.double() - b).norm()) / size for a, b, size in pairs]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_the_written_out_softmax(isa: str, shape: tuple) -> None:
    """Fails with sequences that see each other, a diagonal or a window off by one, query heads that
    share the wrong key head, gradients not summed over them, the scale forgotten in one place, or
    columns past the last one that are read or written."""
    *sizes, window = shape
    case = Case(*sizes)
    assert max(errors(case.ours(window), case.exact(window))) < TOLERANCE


@pytest.mark.parametrize(("heads", "keys", "dim"), [(9, 3, 64), (4, 2, 128)])
def test_is_as_exact_as_torch(isa: str, heads: int, keys: int, dim: int) -> None:
    """At most 1.2 times the error of torch's fused attention on the same bf16 values. Fails if the
    running maximum or the sums were bf16."""
    case = Case([256, 256], heads, keys, dim, dim)
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    out = reference_attention.attention_flat(*leaves, case.cu, case.scale)
    theirs = (out.detach(), *torch.autograd.grad(out, leaves, case.grad))
    exact = case.exact(None)
    for a, b in zip(errors(case.ours(None), exact), errors(theirs, exact), strict=True):
        assert a <= 1.2 * b


@pytest.mark.parametrize("window", [None, 20])
def test_halves_are_the_reference(isa: str, window: int | None) -> None:
    """The two plain ops, and the log-sum-exp to float32 rounding. Fails if lse keeps the powers of
    two that the kernel counts in, or is stored by tokens instead of heads."""
    case = Case([70, 0, 3], 6, 2, 40, 24)
    out, lse = native_attention.attention_flat_forward(*case.inputs, case.cu, case.scale, window)
    wide = [x.double() for x in case.inputs]
    args = (case.cu, case.scale, window)
    out_, lse_ = reference_attention.attention_flat_forward(*wide, *args)
    torch.testing.assert_close(lse.double(), lse_, rtol=1e-6, atol=1e-5)
    found = native_attention.attention_flat_backward(case.grad, *case.inputs, out, lse, *args)
    exact = reference_attention.attention_flat_backward(
        case.grad.double(), *wide, out_, lse_, *args
    )
    assert max(errors((out, *found), (out_, *exact))) < TOLERANCE
    assert all(x.is_contiguous() for x in (out, *found))


def test_does_not_depend_on_threads(isa: str) -> None:
    """Bit for bit. Fails if two tasks add to the same gradient."""
    case, before = Case([257, 64, 1, 130, 600], 6, 2, 16, 16), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.ours(None))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_large_scores_and_late_maxima(isa: str) -> None:
    """Scores of a thousand that grow from key to key. Fails without the running maximum (infinite
    sums), or if what was summed before a new maximum is not scaled down."""
    case = Case([200], 2, 1, 16, 16)
    case.q = case.q.abs()
    case.k = (case.k.abs() * torch.linspace(0.1, 60, 200)[:, None, None]).bfloat16()
    exact = case.exact(None)
    found = case.ours(None)
    assert float((found[0].double() - exact[0]).norm() / exact[0].norm()) < TOLERANCE
    assert all(bool(x.isfinite().all()) for x in found)


def test_nan_shows(isa: str) -> None:
    """A row that sees NaN is NaN, the others are not. Fails if exp or the maximum swallow it."""
    case = Case([40, 40], 2, 1, 16, 16)
    case.k[50] = torch.nan
    out = case.ours(None)[0]
    assert bool(out[50:].isnan().all())
    assert bool(out[:50].isfinite().all())


def test_neighbours_are_not_read(isa: str) -> None:
    """All that lies around the rows is NaN. Fails if padding is read from memory."""
    case = Case([33, 5], 2, 1, 10, 6)
    T = case.q.shape[0]
    around = torch.full((T + 2, 2 * 10 + 10 + 6 + 8), torch.nan, dtype=torch.bfloat16)
    inside = around[1:-1, 3:]
    parts = [inside[:, a:b] for a, b in ((0, 20), (20, 30), (30, 36))]
    for part, x in zip(parts, case.inputs, strict=True):
        part.copy_(x.flatten(1))
    exact = case.exact(None)
    case.q, case.k = (x.unflatten(1, (-1, 10)) for x in parts[:2])
    case.v = parts[2].unflatten(1, (-1, 6))
    assert max(errors(case.ours(None), exact)) < TOLERANCE


def test_any_strides() -> None:
    """Heads before tokens, and a gradient that is one number everywhere: copied once, not refused.
    Fails if strides of heads or of the gradient are taken for granted, or backward copies again."""
    case = Case([20, 9], 4, 2, 16, 16)
    case.grad = torch.ones((), dtype=torch.bfloat16).expand(29, 4, 16)
    exact = case.exact(None)
    case.q, case.k, case.v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.inputs)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = case.ours(None)
    assert max(errors(found, exact)) < TOLERANCE
    assert all(x[:1].is_contiguous() for x in kept if x.dim() == 3)


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 2.0},
        {"sinks": torch.zeros(2)},
        {"window": 0},
        {"scale": -1.0},
        {"cu_seq_lens": torch.tensor([0, 3])},
        {"cu_seq_lens": torch.tensor([0, 4, 2, 5])},
        {"q": torch.randn(5, 2, 4)},
        {"q": torch.zeros(5, 2, 3, dtype=torch.bfloat16)},
        {"k": torch.zeros(5, 2, 3, dtype=torch.bfloat16)},
        {"k": torch.zeros(4, 1, 4, dtype=torch.bfloat16)},
        {"v": torch.zeros(5, 2, 4, dtype=torch.bfloat16)},
        {"v": torch.zeros(5, 4, dtype=torch.bfloat16)},
    ],
    ids=lambda change: "-".join(f"{k}{list(getattr(v, 'shape', [v]))}" for k, v in change.items()),
)
def test_leaves_the_rest_to_the_reference(change: dict[str, object]) -> None:
    """Fails if what the kernel does not know, or could not trust, is passed to it."""
    k, v = (torch.randn(5, 1, 4).bfloat16() for _ in range(2))
    given: dict[str, object] = {
        "q": torch.randn(5, 2, 4).bfloat16(),
        "k": k,
        "v": v,
        "cu_seq_lens": torch.tensor([0, 5]),
        "scale": 0.5,
    }
    assert native_attention.attention_flat(**given).shape == (5, 2, 4)  # type: ignore[arg-type]
    assert native_attention.attention_flat(**given | change) is NotImplemented  # type: ignore[arg-type]


def test_no_tokens(isa: str) -> None:
    """Fails if an empty batch reaches the kernel's arithmetic."""
    case = Case([0, 0], 2, 1, 8, 8)
    assert [x.shape for x in case.ours(None)] == [(0, 2, 8), (0, 2, 8), (0, 1, 8), (0, 1, 8)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much is held")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="it keeps what is freed")
def test_a_long_sequence_does_not_hold_its_scratch(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when scratch memory only ever grows."""
    monkeypatch.setattr(native, "threads", lambda: 1)  # scratch is the thread's

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def backward(tokens: int) -> None:
        edges = torch.tensor([0, tokens])
        q, k, v = (torch.randn(tokens, 1, 64).bfloat16() for _ in range(3))
        out, lse = native_attention.attention_flat_forward(q, k, v, edges, 0.1, 8)
        native_attention.attention_flat_backward(out, q, k, v, out, lse, edges, 0.1, 8)

    backward(1 << 16)  # its scratch is more than 50 MB
    before = held()
    backward(64)
    assert before - held() > 30e6
