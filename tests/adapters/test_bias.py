"""B's own bias and trained biases of the base, against the plain formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from decal.adapters import Lora, Slot, base_view
from decal.config import LoraConfig

IN, OUT, R, ROWS = 13, 11, 3, 7


def make(base: nn.Linear, *, lora_bias: bool = True, bias: bool = True) -> Lora:
    slot = Slot(
        module="m",
        group="m",
        adapter="default",
        shape=(OUT, IN),
        device=torch.device("cpu"),
        bias=base.bias if bias else None,
    )
    config = LoraConfig(r=R, lora_alpha=7, init_lora_weights=False, lora_bias=lora_bias)
    lora = Lora.create(config, slot, seed=3).to(base.weight.dtype).eval()
    with torch.no_grad():
        for own in (lora.B_bias, lora.bias):
            if own is not None:
                own.add_(torch.randn(OUT, dtype=own.dtype))
    return lora


def formula(x: Tensor, base: nn.Linear, lora: Lora, factor: float) -> Tensor:
    y = base(x) + factor * (7 / R) * x @ lora.A.t() @ lora.B.t()
    if lora.B_bias is not None:
        y = y + factor * (7 / R) * lora.B_bias
    return y if lora.bias is None else y + factor * (lora.bias - base.bias)


def test_output_and_gradients_are_the_formulas() -> None:
    """float64, rtol 1e-9 (F16: four of five copies in peft forget the scaling of B's bias).

    Mutations: do not scale B's bias; add the trained bias instead of its difference.
    """
    base = nn.Linear(IN, OUT).double().requires_grad_(False)
    for lora_bias, bias in ((True, True), (True, False), (False, True)):
        lora = make(base, lora_bias=lora_bias, bias=bias)
        x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
        y, wanted = lora(x, base(x), base_view(base), -0.7), formula(x, base, lora, -0.7)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-12)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
        of = (x, *lora.parameters())
        got = torch.autograd.grad((y * weights).sum(), of)
        want = torch.autograd.grad((wanted * weights).sum(), of)
        for mine, plain in zip(got, want, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)


def test_a_trained_bias_starts_as_the_bases_and_is_a_copy() -> None:
    """Mutation: hold the base's own parameter."""
    base = nn.Linear(IN, OUT).bfloat16()
    slot = Slot(
        module="m",
        group="m",
        adapter="a",
        shape=(OUT, IN),
        device=torch.device("cpu"),
        bias=base.bias,
    )
    lora = Lora.create(LoraConfig(r=R, bias="lora_only"), slot, seed=0)
    assert lora.bias is not None
    assert lora.bias.dtype == torch.float32
    assert torch.equal(lora.bias, base.bias.float())
    with torch.no_grad():
        lora.bias.add_(1)
    assert not torch.equal(lora.bias, base.bias.float())
    assert lora.half().bias is lora.bias
    assert lora.bias.dtype == torch.float32


def test_merged_bias_is_what_forward_adds() -> None:
    """float64, rtol 1e-9. Mutation: merge the difference alone."""
    base = nn.Linear(IN, OUT).double().requires_grad_(False)
    lora = make(base)
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    want = lora(x, base(x), base_view(base)).detach()
    merged = lora.merged_bias(base.bias)
    assert merged is not None
    got = x @ lora.merged(base.weight).t() + merged
    torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-12)
    assert make(base, lora_bias=False, bias=False).merged_bias(None) is None


def test_bf16_layers_give_float32_gradients_of_biases() -> None:
    """300 rows; error below 2^-7 of the size. Mutation: sum the rows in bfloat16."""
    base = nn.Linear(IN, OUT).bfloat16().requires_grad_(False)
    lora = make(base).float()
    x = torch.randn(300, IN).bfloat16()
    grad = torch.randn(300, OUT).bfloat16()
    y = lora(x, base(x), base_view(base))
    assert y.dtype == torch.bfloat16
    assert lora.bias is not None
    assert lora.B_bias is not None
    d_bias, d_own = torch.autograd.grad(y, (lora.bias, lora.B_bias), grad)
    exact = grad.double().sum(0)
    assert (d_bias - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (d_own - exact * 7 / R).abs().max() < 1e-4 * exact.abs().max()
