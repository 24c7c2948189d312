"""The summed cross entropy: against torch in fp64, in low precision, per sample, and its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from decal.data.batch import IGNORE
from decal.data.pack import flat_batch, padded_batch
from decal.data.sample import Sample
from decal.errors import DataError
from decal.kernels import ops
from decal.kernels.stored import Stored
from decal.objectives import sft

N, H, V = 7, 5, 13


@pytest.fixture(params=[1, 3 * V, 2**20], ids=["token by token", "3 tokens", "one chunk"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sft.CHUNK_ELEMENTS, "cpu", request.param)


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H] that require grad, a head [H, V] and targets [N]."""
    hidden = torch.randn(N, H, dtype=torch.float64).to(dtype).requires_grad_()
    head = (4 * torch.randn(H, V, dtype=torch.float64)).to(dtype)
    return hidden, head, torch.tensor([0, 12, 3, 3, 7, 1, 11])


def reference(
    hidden: Tensor, head: Tensor, targets: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """torch's sum and the gradient of the hidden states, both in fp64."""
    exact = hidden.detach().double().requires_grad_()
    total = cross_entropy(exact @ head.double(), targets, reduction="sum", ignore_index=IGNORE)
    (total * factor).backward()
    assert exact.grad is not None
    return total.detach(), exact.grad


@pytest.mark.usefixtures("_chunk")
def test_equals_cross_entropy_in_float64() -> None:
    """Value and gradient at 1e-9, upstream factor not one. Mutations: leave out the upstream
    factor; skip the last chunk; do not subtract one at the target; average instead of sum."""
    hidden, head, targets = operands(torch.float64)
    expected, gradient = reference(hidden, head, targets, 0.3)
    total = sft.losses(hidden @ head, targets).sum()
    (total * 0.3).backward()
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_chunk")
def test_ignored_targets_count_nothing() -> None:
    """Mutation: leave the weight of ignored rows at one (their gradient is softmax minus row 0)."""
    hidden, head, targets = operands(torch.float64)
    targets[2] = targets[6] = IGNORE
    expected, gradient = reference(hidden, head, targets, 1.0)
    total = sft.losses(hidden @ head, targets).sum()
    total.backward()
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-9, atol=1e-12)


def half_step(dtype: torch.dtype) -> float:
    """Half the smallest step of numbers near zero (subnormals)."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    """The logits are rounded, nothing after them: summed in fp32, so the loss is exact to 1e-5 for
    the rounded logits, and their gradient to one rounding in their dtype plus fp32's epsilon (1 - p
    at the target cancels). Mutations: log-softmax in the logits' dtype; sum in it; round twice."""
    logits = (6 * torch.randn(N, V)).to(dtype).requires_grad_()
    targets = torch.tensor([0, 12, 3, 3, 7, 1, 11])
    exact = logits.detach().double().requires_grad_()
    expected = cross_entropy(exact, targets, reduction="sum")
    (expected * 0.3).backward()
    total = sft.losses(logits, targets).sum()
    (total * 0.3).backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    half_epsilon = torch.finfo(dtype).eps / 2
    assert exact.grad is not None
    tolerance = half_epsilon * 1.01, 0.3 * torch.finfo(torch.float32).eps + half_step(dtype)
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, rtol=tolerance[0], atol=tolerance[1]
    )


def test_large_logits_keep_small_losses() -> None:
    """Mutations: exponentiate before subtracting the maximum; keep only the log-sum-exp."""
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, 3e4, 3e4]]).requires_grad_()
    total = sft.losses(logits, torch.tensor([0, 2])).sum()
    total.backward()
    assert total.item() == pytest.approx(np.log(2.0), rel=1e-5)
    assert logits.grad is not None
    expected = torch.tensor([[0.0, 0, 0], [0, 0.5, -0.5]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_leaf_logits_are_left_alone() -> None:
    """Mutation: overwrite always."""
    logits = torch.randn(N, V, requires_grad=True)
    before = logits.detach().clone()
    sft.losses(logits, torch.zeros(N, dtype=torch.int64)).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_gradient_is_written_over_the_logits() -> None:
    """No second [N, V] tensor. Mutation: allocate the gradient."""
    hidden, head, targets = operands(torch.float32)
    logits = hidden @ head
    seen: list[int] = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    sft.losses(logits, targets).sum().backward()
    assert seen == [logits.data_ptr()]


def test_another_user_of_the_logits_gets_an_error_not_a_wrong_gradient() -> None:
    """`tanh` keeps its output for its backward. Mutation: write through `.data`."""
    hidden, head, targets = operands(torch.float32)
    with pytest.raises(RuntimeError, match="inplace operation"):
        sft.losses(torch.tanh(hidden @ head), targets).sum().backward()


def stored(head: Tensor) -> Stored:
    """W [V, H] of a head [H, V]."""
    return Stored("dense", (head.shape[1], head.shape[0]), head.t())


@pytest.mark.parametrize("tokens", [1, 3, 4, N])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_projected_is_cross_entropy_in_float64(
    tokens: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens to a chunk: one token, a whole chunk, one token more, a last chunk of one.
    Mutations: leave out the upstream factor, the bias or the last chunk; give targets of the first
    chunk to all; average."""
    monkeypatch.setattr(sft, "CHUNK_BYTES", 3 * (V + sft.APART) * 8)
    monkeypatch.setattr(sft, "CHUNK_TOKENS", 1)
    hidden, head, targets = operands(torch.float64)
    hidden, targets = hidden.detach()[:tokens].requires_grad_(), targets[:tokens].clone()
    targets[tokens // 2] = targets[0] if tokens == 1 else IGNORE
    bias = torch.randn(V, dtype=torch.float64) if biased else None
    exact = hidden.detach().clone().requires_grad_()
    logits = exact @ head + (0 if bias is None else bias)
    expected = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    (expected * 0.3).backward()

    total = sft.projected_losses(hidden, stored(head), bias, targets).sum()
    (total * 0.3).backward()
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(hidden.grad, exact.grad, rtol=1e-9, atol=1e-12)


def test_gradients_of_projected_losses_add_up() -> None:
    """Two losses of one pass and two backwards of one loss. Mutation: scale what forward kept in
    place, so that the second backward is scaled twice."""
    hidden, head, targets = operands(torch.float64)
    _, gradient = reference(hidden, head, targets, 1.0)
    total = sft.projected_losses(hidden, stored(head), None, targets).sum()
    (0.5 * total).backward(retain_graph=True)
    (2.0 * total).backward()
    torch.testing.assert_close(hidden.grad, 2.5 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_projected_low_precision(dtype: torch.dtype) -> None:
    """The loss is the fp32 sum for the rounded logits; the gradient lies within three roundings
    (of logits' gradient, of the product, of the scaled product) of the exact one, by its norm.
    Mutations: sum in the dtype of the logits; project in fp32; round the onehot away."""
    hidden, head, targets = operands(dtype)
    logits = ops.project(hidden.detach(), stored(head)).double()
    expected = cross_entropy(logits, targets, reduction="sum")
    exact = torch.softmax(logits, 1) - torch.nn.functional.one_hot(targets, V)
    gradient = 0.3 * exact @ head.double().t()
    total = sft.projected_losses(hidden, stored(head), None, targets).sum()
    (total * 0.3).backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    error = (hidden.grad.double() - gradient).norm() / gradient.norm()
    assert float(error) < 3 * torch.finfo(dtype).eps / 2


class Watched:
    """The ops as they are, and how often each was called on how many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rows: dict[str, list[int]] = {"project": [], "project_back": []}
        project, project_back = ops.project, ops.project_back

        def forth(x: Tensor, *args: Any, **options: Any) -> Tensor:
            self.rows["project"].append(len(x))
            return project(x, *args, **options)

        def back(parts: list[tuple[Tensor, Stored]]) -> Tensor:
            self.rows["project_back"].append(len(parts[0][0]))
            return project_back(parts)

        monkeypatch.setattr(ops, "project", forth)
        monkeypatch.setattr(ops, "project_back", back)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, and where nothing before the head is trained. Mutation: ask `requires_grad`
    alone, or nothing."""
    hidden, head, targets = operands(torch.float64)
    expected, _ = reference(hidden, head, targets, 1.0)
    watched = Watched(monkeypatch)
    with torch.no_grad():
        first = sft.projected_losses(hidden, stored(head), None, targets).sum()
    second = sft.projected_losses(hidden.detach(), stored(head), None, targets).sum()
    assert not first.requires_grad
    assert not second.requires_grad
    assert watched.rows == {"project": [N, N], "project_back": []}
    for total in (first, second):
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)


def test_logits_exist_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: project all tokens at once; count words and not bytes."""
    monkeypatch.setattr(sft, "CHUNK_BYTES", 3 * (V + sft.APART) * 2 + 1)
    monkeypatch.setattr(sft, "CHUNK_TOKENS", 1)
    hidden, head, targets = operands(torch.bfloat16)
    watched = Watched(monkeypatch)
    sft.projected_losses(hidden, stored(head), None, targets).sum().backward()
    assert watched.rows == {"project": [3, 3, 1], "project_back": [3, 3, 1]}


def test_no_copy_of_all_logits_lives_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 logits of three chunks, no fp32 tensor made in forward or backward is larger than a
    chunk. Mutation: `logits.float()` before the loop."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                sizes.append(out.untyped_storage().nbytes() // 4)
            return out

    rows, words = 48, 2**10
    monkeypatch.setitem(sft.CHUNK_ELEMENTS, "cpu", 16 * words)
    hidden = torch.randn(rows, 1, dtype=torch.bfloat16, requires_grad=True)
    logits = hidden * torch.randn(words, dtype=torch.bfloat16)
    with Watch():
        sft.losses(logits, torch.arange(rows)).sum().backward()
    assert sizes
    assert max(sizes) <= sft.CHUNK_ELEMENTS["cpu"] < rows * words


def samples() -> list[Sample]:
    masks = ([0, 0, 1, 1], [0, 1], [0, 1, 0, 0, 1, 1])
    return [
        Sample(
            row=10 + i,
            input_ids=np.arange(len(mask), dtype=np.int32) + i,
            trained=np.array(mask, dtype=np.bool_),
        )
        for i, mask in enumerate(masks)
    ]


def test_trained_positions() -> None:
    """Mutations: give the trained tokens' own positions; per-row columns for padded batches."""
    assert sft.trained_positions(flat_batch(samples())).tolist() == [1, 2, 4, 6, 9, 10]
    assert sft.trained_positions(padded_batch(samples())).tolist() == [1, 2, 6, 12, 15, 16]


def test_targets() -> None:
    """Mutations: give the trained tokens' predecessors; drop the ends of samples."""
    for batch in (flat_batch(samples()), padded_batch(samples())):
        assert sft.targets(batch).tolist() == [2, 3, 2, 3, 6, 7]


def test_nothing_trained_is_an_error() -> None:
    """Mutation: return zero."""
    row = Sample(row=3, input_ids=np.arange(4, dtype=np.int32), trained=np.zeros(4, dtype=np.bool_))
    with pytest.raises(DataError, match="no token is trained in a batch of rows 3"):
        sft.trained_positions(flat_batch([row]))
    with pytest.raises(DataError, match="no token is trained"):
        sft.losses(torch.empty(0, V), torch.empty(0, dtype=torch.int64)).sum()
    head, nothing = stored(torch.empty(H, V)), torch.empty(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no token is trained"):
        sft.projected_losses(torch.empty(0, H), head, None, nothing).sum()
