"""LoRA against the plain formula, written with autograd's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decal.adapters import DropoutKey, Lora, Routing, Slot, base_view, routed
from decal.adapters.lora import Drawn, Dropout
from decal.config import LoraConfig
from decal.errors import AdapterError

IN, OUT, R, ROWS = 37, 29, 5, 22
CONFIG = LoraConfig(r=R, lora_alpha=7, lora_dropout=0.3, init_lora_weights=False)


def make(
    config: LoraConfig = CONFIG, module: str = "layers.0.q", group: str = "layers.0.qkv"
) -> Lora:
    slot = Slot(
        module=module,
        group=group,
        adapter="default",
        shape=(OUT, IN),
        device=torch.device("cpu"),
    )
    return Lora.create(config, slot, seed=3).eval()


def key(rows: int = ROWS, epoch: int = 0) -> DropoutKey:
    ids = torch.arange(rows)
    return DropoutKey(seed=1, epoch=epoch, sample_ids=ids // 6, positions=ids % 6)


def mask_of(lora: Lora, k: DropoutKey) -> Tensor:
    rows = k.positions.numel()
    dropout = Dropout(k, lora.adapter_salt, lora.input_salt, lora.dropout)
    return dropout.words(rows, IN, k.positions.device).mask(0, rows)


def drawn(p: float, rows: int) -> Tensor:
    return Drawn.now(p).words(rows, IN, torch.device("cpu")).mask(0, rows)


def formula(x: Tensor, base: nn.Linear, lora: Lora, keep: Tensor | None, factor: float) -> Tensor:
    dropped = x
    if keep is not None:
        dropped = x * keep.view(x.shape) / (1 - lora.dropout)
    A, B = lora.A.to(x.dtype), lora.B.to(x.dtype)
    return base(x) + factor * (7 / R) * dropped @ A.T @ B.T


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    return torch.autograd.grad((y * weights).sum(), of)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("factor", [1.0, -0.7])
def test_output_and_gradients_are_the_formulas(bias: bool, dropped: bool, factor: float) -> None:
    """float64, rtol 1e-9. Mutations: drop the scaling; no 1/(1-p) in backward; no factor."""
    lora, base = make().double(), nn.Linear(IN, OUT, bias=bias).double()
    x = torch.randn(2, ROWS // 2, IN, dtype=torch.float64, requires_grad=True)
    k = key() if dropped else None
    with routed(Routing((("default", 1.0),), k)):
        y = lora(x, base(x), base_view(base), factor)
    expected = formula(x, base, lora, mask_of(lora, k) if k else None, factor)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    for got, want in zip(
        gradients(y, x, lora.A, lora.B), gradients(expected, x, lora.A, lora.B), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_base_output_passes_through() -> None:
    """Mutation: return None for y_base's gradient; a trainable base would get no gradient."""
    lora, base = make().double(), nn.Linear(IN, OUT).double()
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    got = gradients(lora(x, base(x), base_view(base)), base.weight)[0]
    torch.testing.assert_close(got, gradients(base(x), base.weight)[0], rtol=1e-12, atol=0)


def test_bf16_compute_gives_float32_gradients_with_a_float32_sum() -> None:
    """Against float64 from the same rounded inputs; 300 rows of bf16 rounded once would be off by
    2^-9 each. Mutation: sum dB in bf16 (dB's error grows tenfold)."""
    lora, base = make(), nn.Linear(IN, OUT).bfloat16()
    x = torch.randn(300, IN).bfloat16().requires_grad_()
    y = lora(x, base(x), base_view(base))
    assert y.dtype == torch.bfloat16
    grad = torch.randn(300, OUT).bfloat16()
    dx, dA, dB = torch.autograd.grad(y, (x, lora.A, lora.B), grad)
    assert (dx.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    A, B = lora.A.detach().bfloat16().double(), lora.B.detach().bfloat16().double()
    z = (x.detach() @ lora.A.detach().bfloat16().T).double()
    torch.testing.assert_close(dB.double(), (7 / R) * grad.double().T @ z, rtol=1e-5, atol=1e-4)
    wanted = (7 / R) * (grad.double() @ B).T @ x.detach().double()
    assert (dA - wanted).norm() / wanted.norm() < 2**-8
    exact = (7 / R) * grad.double() @ B @ A + grad.double() @ base.weight.detach().double()
    assert (dx - exact).norm() / exact.norm() < 2**-7


def test_only_the_input_and_r_columns_are_saved() -> None:
    """Mutation: save the dropped input or the mask as well."""
    lora, base = make(), nn.Linear(IN, OUT).requires_grad_(False)
    x = torch.randn(ROWS, IN, requires_grad=True)
    saved: list[Tensor] = []
    with (
        routed(Routing((("default", 1.0),), key())),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        lora(x, torch.zeros(ROWS, OUT), base_view(base))
    shapes = [tuple(t.shape) for t in saved]
    assert sorted(shapes) == sorted([(ROWS, IN), (ROWS, R), (R, IN), (OUT, R)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(reentrant: bool) -> None:
    """Mutation: draw the mask from torch's generator without the key."""
    lora, base = make().double(), nn.Linear(IN, OUT).double().requires_grad_(False)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    routing = Routing((("default", 1.0),), key())

    def block(x: Tensor) -> Tensor:
        with routed(routing):
            return lora(x, base(x), base_view(base)).tanh()

    plain = gradients(block(x), x, lora.A, lora.B)
    y = checkpoint(block, x, use_reentrant=reentrant)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    (y * weights).sum().backward()
    for got, want in zip((x.grad, lora.A.grad, lora.B.grad), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_dropout_depends_on_epoch_adapter_and_input_but_not_on_packing() -> None:
    """Mutation: number the rows instead of using sample ids and positions."""
    lora, base = make().double(), nn.Linear(IN, OUT).double()
    x = torch.randn(ROWS, IN, dtype=torch.float64)

    def run(k: DropoutKey, x: Tensor = x, lora: Lora = lora) -> Tensor:
        with routed(Routing((("default", 1.0),), k)):
            return lora(x, base(x), base_view(base)).detach()

    order = torch.randperm(ROWS)
    k = key()
    shuffled = DropoutKey(
        seed=1, epoch=0, sample_ids=k.sample_ids[order], positions=k.positions[order]
    )
    torch.testing.assert_close(run(shuffled, x[order]), run(k)[order], rtol=1e-12, atol=0)
    assert not torch.equal(run(key(epoch=1)), run(k))
    assert torch.equal(mask_of(make(module="layers.0.k"), k), mask_of(lora, k))
    assert not torch.equal(mask_of(make(group="layers.1.qkv"), k), mask_of(lora, k))
    share = mask_of(lora, key(4000)).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / (4000 * IN)) ** 0.5


def test_without_a_key_torch_drops_in_training_and_nothing_in_eval() -> None:
    """float64, rtol 1e-9; a plain torch loop has no key. Mutation: drop only with a key."""
    lora, base = make().double(), nn.Linear(IN, OUT).double()
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    plain = formula(x, base, lora, None, 1.0)
    torch.testing.assert_close(lora(x, base(x), base_view(base)), plain, rtol=1e-9, atol=1e-12)
    lora.train()
    torch.manual_seed(5)
    y = lora(x, base(x), base_view(base))
    torch.manual_seed(5)
    keep = drawn(lora.dropout, ROWS)
    wanted = formula(x, base, lora, keep, 1.0)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-12)
    for got, want in zip(
        gradients(y, x, lora.A, lora.B), gradients(wanted, x, lora.A, lora.B), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert not torch.equal(lora(x, base(x), base_view(base)), y)
    share = drawn(0.3, 4000).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / (4000 * IN)) ** 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_what_torch_drew(reentrant: bool) -> None:
    """Mutation: draw a new number in the second forward without torch's generator."""
    lora, base = make().double().train(), nn.Linear(IN, OUT).double().requires_grad_(False)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return lora(x, base(x), base_view(base)).tanh()

    torch.manual_seed(5)
    plain = gradients(block(x), x, lora.A, lora.B)
    torch.manual_seed(5)
    y = checkpoint(block, x, use_reentrant=reentrant)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    (y * weights).sum().backward()
    for got, want in zip((x.grad, lora.A.grad, lora.B.grad), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_rows_that_are_not_the_batchs_tokens_are_refused() -> None:
    lora, base = make(), nn.Linear(IN, OUT)
    x = torch.randn(3, IN)
    with (
        routed(Routing((("default", 1.0),), key())),
        pytest.raises(AdapterError, match=r"layers\.0\.q .* the layer got 3, the batch has 22"),
    ):
        lora(x, base(x), base_view(base))


def test_autocast_trains_like_bf16() -> None:
    """The base casts x under autocast; the update follows, forward and backward, with float32
    gradients. Mutation: compute in x's dtype instead of y_base's."""
    lora, base = make(), nn.Linear(IN, OUT)
    x = torch.randn(300, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(x, base(x), base_view(base))
        dx, dA, dB = gradients(y.float(), x, lora.A, lora.B)
    assert y.dtype == torch.bfloat16
    assert (dx.dtype, dA.dtype, dB.dtype) == (torch.float32,) * 3
    wanted = gradients(formula(x, base, lora, None, 1.0), x, lora.A, lora.B)
    for got, want in zip((dx, dA, dB), wanted, strict=True):
        assert (got - want).norm() / want.norm() < 2**-6
    plain = base.bfloat16(), x.detach().bfloat16()
    y = lora(plain[1], plain[0](plain[1]), base_view(plain[0]))
    assert torch.equal(gradients(y.float(), lora.B)[0], dB)


def test_a_base_that_stays_float32_under_autocast_gets_a_float32_update() -> None:
    """rtol 1e-5. Mutation: leave autocast on inside the function."""
    lora, base = make(), nn.Linear(IN, OUT)
    x = torch.randn(ROWS, IN, requires_grad=True)
    y_base = base(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(x, y_base, base_view(base))
        got = gradients(y, x, lora.A, lora.B)
    wanted = formula(x, base, lora, None, 1.0) - base(x) + base(x).detach()
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, gradients(wanted, x, lora.A, lora.B), rtol=1e-4, atol=1e-4)


def test_merged_is_what_forward_adds() -> None:
    """float64, rtol 1e-9, and float32 out of bf16. Mutation: A^T B^T the wrong way round."""
    lora, base = make().double(), nn.Linear(IN, OUT, bias=False).double()
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    merged = lora.merged(base.weight.detach())
    torch.testing.assert_close(
        x @ merged.T, lora(x, base(x), base_view(base)).detach(), rtol=1e-9, atol=1e-12
    )
    lora, weight = make(), torch.randn(OUT, IN).bfloat16()
    merged = lora.merged(weight)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, weight.float() + (lora.B @ lora.A).detach() * (7 / R))


def test_low_rank_parts_make_the_delta() -> None:
    """Mutation: report lora_alpha as the scale."""
    lora = make()
    A, B, scale, dropout, _ = lora.low_rank()
    zero = torch.zeros(OUT, IN)
    torch.testing.assert_close(lora.merged(zero), scale * B @ A)
    assert (scale, dropout) == (7 / R, 0.3)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_masters_stay_float32(cast: str) -> None:
    """Mutation: do not override `_apply`."""
    lora = make()
    before = lora.A.detach().clone()
    getattr(lora, cast)()
    assert lora.A.dtype == lora.B.dtype == torch.float32
    assert torch.equal(lora.A, before)
    assert lora.to("meta").A.device.type == "meta"


def test_double_widens_and_float_brings_back() -> None:
    lora = make()
    assert lora.double().A.dtype == torch.float64
    assert lora.float().A.dtype == torch.float32


def test_rslora_scales_by_the_root() -> None:
    config = LoraConfig(r=R, lora_alpha=7, use_rslora=True)
    assert make(config).scale == pytest.approx(7 / R**0.5)


def test_meta_forward_and_backward_have_shapes() -> None:
    slot = Slot(module="m", group="m", adapter="a", shape=(OUT, IN), device=torch.device("meta"))
    lora = Lora.create(CONFIG, slot, seed=0)
    base: Any = nn.Linear(IN, OUT, device="meta", dtype=torch.bfloat16)
    x = torch.empty(2, 3, IN, device="meta", dtype=torch.bfloat16)
    y = lora(x, base(x), base_view(base))
    assert y.shape == (2, 3, OUT)
    y.sum().backward()
    assert lora.A.grad is not None
    assert lora.A.grad.shape == (R, IN)


def test_a_view_as_base_output_is_left_alone() -> None:
    """Mutation: add in place whatever y_base is."""
    lora, base = make(), nn.Linear(IN, OUT)
    x = torch.randn(2, 3, IN)
    whole = torch.randn(2, 3, 2 * OUT)
    before = whole.clone()
    lora(x, whole[..., :OUT], base_view(base))
    assert torch.equal(whole, before)


def test_repr_names_the_shapes() -> None:
    assert repr(make()) == "Lora(lora_A: [5, 37], lora_B: [29, 5], scaling=1.4, dropout=0.3)"
