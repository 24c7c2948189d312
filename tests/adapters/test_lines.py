"""A frozen layer and its adapter as one product, against the layer and the update apart.

float64 throughout, 1e-9 relative; with quantized weights too, since both ways dequantize alike.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.adapters import (
    AdaptedLayer,
    DropoutKey,
    Lora,
    Routing,
    RoutingState,
    Slot,
    lines,
    routed,
)
from decal.adapters.layer import group_of
from decal.config import LoraConfig
from decal.quant import Recipe
from decal.quant.linear import QuantLinear

IN, OUT, ROWS = 37, 29, 11
KEY = DropoutKey(seed=1, epoch=0, sample_ids=torch.arange(ROWS) // 4, positions=torch.arange(ROWS))


def base(kind: str, out: int = OUT) -> nn.Module:
    linear = nn.Linear(IN, out, bias=kind != "no bias")
    if kind == "conv1d":
        return Conv1D(out, IN).double().requires_grad_(False)
    if kind in ("nf4", "int8"):
        return QuantLinear.from_linear(linear, Recipe(format=kind)).double()
    return linear.double().requires_grad_(False)


def layer(kind: str, *ranks: int, out: int = OUT, p: float = 0.3, group: str = "g") -> AdaptedLayer:
    found = AdaptedLayer(base(kind, out), RoutingState())
    for name, r in zip("ab", ranks, strict=False):
        settings = LoraConfig(r=r, lora_alpha=7, lora_dropout=p, init_lora_weights=False)
        slot = Slot(
            module=f"m{out}", group=group, adapter=name, shape=(out, IN), device=torch.device("cpu")
        )
        found.adapters[name] = Lora.create(settings, slot, seed=r).double()
    return found.train()


def watched(one: AdaptedLayer) -> AdaptedLayer:
    """The same layer, which must now call its base and its adapter one after the other."""
    one.base_layer.register_forward_hook(lambda *_: None)
    return one


def results(one: AdaptedLayer, name: str = "a") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, ROWS, IN, generator=generator, dtype=torch.float64).requires_grad_()
    y = one(x)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    lora: Any = one.adapters[name]
    return [y.detach(), *torch.autograd.grad(y, (x, lora.A, lora.B), grad)]


@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize("factor", [1.0, -0.7])
@pytest.mark.parametrize("key", [KEY, None], ids=["key", "drawn"])
def test_one_product_is_the_two_apart(kind: str, factor: float, key: DropoutKey | None) -> None:
    """Fails when the scaling, the factor, 1 / (1 - p) or the mask is left out, in either pass."""
    torch.manual_seed(0)
    one = layer(kind, 5)
    with routed(Routing((("a", factor),), key)):
        torch.manual_seed(1)
        found = results(one)
        torch.manual_seed(1)
        wanted = results(watched(one))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["bias", "nf4"])
@pytest.mark.parametrize("rows", [1, 3, ROWS])
def test_without_gradients_it_is_the_same_product(kind: str, rows: int) -> None:
    """In bf16 to its rounding, in float64 to 1e-9. Fails when B is not scaled, the factor of the
    pass is left out, or a segment of some rows acts on all of them."""
    torch.manual_seed(0)
    one, x = layer(kind, 5, p=0.0).eval(), torch.randn(rows, IN, dtype=torch.float64)
    fine = [Routing((("a", 0.5),))]
    if rows > 1:
        fine.append(Routing(segments=(("a", rows - 1), (None, 1))))
    for routing in fine:
        with routed(routing):
            wanted = one(x.requires_grad_()).detach()
            with torch.no_grad():
                torch.testing.assert_close(one(x), wanted, rtol=1e-9, atol=1e-12)
                half = one.bfloat16()(x.bfloat16()).double()
        one.double()
        error = (half - wanted).norm() / wanted.norm()
        assert error < 2e-2, error


def test_it_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly where base and adapter are plain. Fails when the quick way is never taken, or is
    taken past a hook, a trained base or a second adapter."""
    count = 0

    def counted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        return real(*args)

    real = lines.apply
    monkeypatch.setattr(lines, "apply", counted)
    with routed(Routing((("a", 1.0),), KEY)):
        results(layer("bias", 5))
        assert count == 1
        results(watched(layer("bias", 5)))
        trained = layer("bias", 5)
        trained.base_layer.requires_grad_(True)
        results(trained)
        assert count == 1
        results(layer("bias", 5, 3))
        assert count == 2
    with routed(Routing((("a", 1.0), ("b", 0.5)), KEY)):
        results(layer("bias", 5, 3))
    with routed(Routing(segments=(("a", ROWS),))):
        results(layer("bias", 5, p=0.0))
        assert count == 3
    with routed(Routing(segments=(("elsewhere", ROWS),))):
        layer("bias", 5)(torch.zeros(1, ROWS, IN, dtype=torch.float64))
    assert count == 3


def test_a_group_is_its_layers_apart() -> None:
    """Ranks 5, none and 2. Fails when z's columns or dA's rows go to another layer, or a layer
    without an adapter shifts those behind it."""
    layers = [layer("bias", 5), layer("nf4", out=13), layer("no bias", 2, out=7)]
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    grads = [torch.randn(ROWS, one.base.shape[0], dtype=torch.float64) for one in layers]
    with routed(Routing((("a", 1.0),), KEY)):
        group = group_of(layers, Routing((("a", 1.0),), KEY), ROWS, x, exact=True)
        assert group is not None
        with torch.no_grad():
            ys, z, cast = lines.forward(group, x)
            back = lines.Backward(group, grads, z, cast, [True] * 5)
            dx, factors = back.dx(), back.factors(x)
        inputs = [x.clone().requires_grad_() for _ in layers]
        apart = [watched(one)(x_) for one, x_ in zip(layers, inputs, strict=True)]
    masters = group.factors
    wanted = torch.autograd.grad(apart, [*inputs, *masters], grads)
    for ours, theirs in zip([*ys, *factors], [*apart, *wanted[3:]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dx, sum(wanted[:3]), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_layer_whose_output_was_not_used() -> None:
    """Fails when a missing gradient leaves what was in the memory in dz."""
    layers = [layer("bias", 5), layer("bias", 2, out=7)]
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    group = group_of(layers, Routing((("a", 1.0),), KEY), ROWS, x, exact=True)
    assert group is not None
    _, z, cast = lines.forward(group, x)
    grad = torch.randn(ROWS, 7, dtype=torch.float64)
    half = lines.Backward(group, [None, grad], z, cast, [True] * 5)
    none = torch.zeros(ROWS, OUT).double()
    whole = lines.Backward(group, [none, grad], z, cast, [True] * 5)
    torch.testing.assert_close(half.dx(), whole.dx(), rtol=1e-12, atol=1e-15)
    A, B, *second = half.factors(x)
    assert A is not None
    assert not A.any()
    assert B is None
    for ours, theirs in zip(second, whole.factors(x)[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("other", [{"p": 0.1}, {"p": 0.0}, {"group": "h"}])
def test_layers_that_drop_differently_are_no_group(other: dict[str, Any]) -> None:
    """In both orders. Fails when the first layer's mask is taken for all."""
    pair = [layer("bias", 5), layer("bias", 2, out=7, **other)]
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    for layers in (pair, pair[::-1]):
        assert group_of(layers, Routing((("a", 1.0),), KEY), ROWS, x, exact=True) is None


def test_a_base_that_was_exchanged_is_what_runs() -> None:
    """Fails when the product reads the weight of the layer that stood there at first."""
    one, x = layer("bias", 5, p=0.0), torch.randn(ROWS, IN, dtype=torch.float64)
    with routed(Routing((("a", 1.0),))):
        delta = one(x) - one.base_layer(x)
        one.base_layer = base("no bias")
        torch.testing.assert_close(one(x), one.base_layer(x) + delta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["bias", "conv1d", "nf4"])
@pytest.mark.parametrize("second", [0.3, 0.0])
def test_segments_are_their_adapters_alone(kind: str, second: float) -> None:
    """Rows of adapter a, of none, of b and of a again, each with a key of its own. Fails when a
    segment reads another's columns of z, its rows' masks or its factors, or all share one key."""
    first, other = layer(kind, 5, 3), layer("no bias", 2, 4, out=7)
    if kind == "nf4":
        del other.adapters["b"]
    for one in (first, other):
        for lora in [one.adapters["b"]] if "b" in one.adapters else []:
            lora.dropout = second  # type: ignore[assignment]
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    grads = [torch.randn(ROWS, one.base.shape[0], dtype=torch.float64) for one in (first, other)]
    cuts = [("a", 0, 3), (None, 3, 4), ("b", 4, 9), ("a", 9, ROWS)]
    keys = [
        DropoutKey(i, 3 - i, KEY.sample_ids[a:b], KEY.positions[a:b])
        for i, (_, a, b) in enumerate(cuts)
    ]
    routing = Routing(segments=tuple((n, b - a) for n, a, b in cuts), keys=tuple(keys))
    group = group_of([first, other], routing, ROWS, x, exact=True)
    assert group is not None
    with torch.no_grad():
        ys, z, casts = lines.forward(group, x)
        back = lines.Backward(group, grads, z, casts, [True] * (1 + len(group.factors)))
        dx, factors = back.dx(), back.factors(x)
    assert dx is not None
    at = 0
    for (name, a, b), key in zip(cuts, keys, strict=True):
        own = Routing(((name, 1.0),) if name else (), key)
        alone = group_of([first, other], own, b - a, x[a:b], exact=True)
        assert alone is not None
        with torch.no_grad():
            wanted, z, casts = lines.forward(alone, x[a:b])
            parts = [g[a:b] for g in grads]
            back = lines.Backward(alone, parts, z, casts, [True] * (1 + len(alone.factors)))
        found = [*(y[a:b] for y in ys), dx[a:b], *factors[at : at + len(alone.factors)]]
        at += len(alone.factors)
        for ours, theirs in zip(found, [*wanted, back.dx(), *back.factors(x[a:b])], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert at == len(factors)
