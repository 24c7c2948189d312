"""Proof by trial that the fused steps compute what a decoder layer computes.

Six random tokens in two samples run through the layer's own forward and through the steps, with
dropout and random factors in the place of the adapter's, whose B starts at zero. Compared are what
the layer adds to its input, what backward adds to the incoming gradient, and the gradients of all
factors: relative to their norms, so that a forgotten bias shows however large the residual is.

Two ways to round are no difference. Where large biases make attention scores of hundreds, bf16
itself is off by more than any fixed bound, the layer's own forward too. Then copies of both run in
float64, where they must agree, and in bf16 the steps must not be further off from that than the
layer is, over all results: single ones, like the gradient of saturated scores, are noise.

Knows one layer at a time and no model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decal.adapters import DropoutKey, Lora, Routing, current_routing, routed
from decal.adapters.init import uniform_by_fan_in
from decal.model.blocks.llama import Block, run

_LENGTHS = (2, 4)
ROOM = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative differences that are rounding, by the dtype that a layer computes in.

No float64: transformers' norms are float32 there too. The steps would be the more exact ones, and
packed and padded batches, which are never fused, would differ by what float32 rounds.
"""
_WORSE = 2.0
"""By how much the steps may be further off in bf16 than the layer is."""

Results = dict[str, Tensor]


def prove(layer: Any, block: Block, name: str) -> str:
    """Why the fused steps must not stand in for the layer, or nothing.

    Args:
        layer: a decoder layer, inside `flat_attention`.
        block: the same layer, taken apart.
        name: the adapter to try it with.
    """
    weight = block.norms[0].weight
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in ROOM:
        return f"it computes in {weight.dtype}"
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))  # whatever the default device
        stack.enter_context(_training(layer))
        try:
            return _compared(layer, block, name)
        except Exception as error:  # whatever a layer raises that is called as no model would
            return f"the trial failed: {type(error).__name__}: {error}"


def _compared(layer: Any, block: Block, name: str) -> str:
    """As `prove`, for a layer that trains."""
    dtype = block.norms[0].weight.dtype
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])
    key = DropoutKey(0, 0, torch.arange(sum(_LENGTHS)), positions)
    routing = Routing(((name, 1.0),), key)
    shape = (1, sum(_LENGTHS), block.norms[0].weight.numel())
    # Small, so that adding the residual rounds little of what is added to it.
    given = [torch.randn(shape, generator=generator).mul_(1 / 16).to(dtype) for _ in "xg"]
    kwargs = _kwargs(block, dtype, generator)
    with routed(routing), _random_factors(block, name, generator) as factors:
        plan = block.plan(routing, given[0][0], kwargs)
        if plan is None:
            return "its projections or adapters are not plain"
        wanted = _results(lambda x: type(layer).forward(layer, x, **kwargs), given, factors)
        found = _results(lambda x: run(plan, x), given, factors)
        worst, apart = _apart(found, wanted)
        if apart <= ROOM[dtype]:
            return ""
        if dtype == torch.bfloat16:
            exact, again = _in_float64(layer, block, name, given, kwargs)
            worst, apart = _apart(again, exact)
            if apart <= ROOM[torch.float32]:
                off, own = _total(found, exact), _total(wanted, exact)
                if off <= _WORSE * own:
                    return ""
                return f"fused steps are off by {off / own:.1f} times as much as the layer"
        return f"fused steps differ in {worst} by {apart:.1e}"


def _kwargs(block: Block, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """What transformers hands to a decoder layer, with angles of a kind that no model has."""
    total = sum(_LENGTHS)
    angles = torch.randn(1, total, block.attention.head_dim // 2, generator=generator)
    angles = torch.cat([angles, angles], -1)
    ends = torch.tensor((0, *_LENGTHS)).cumsum(0).to(torch.int32)
    return {
        "attention_mask": None,
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(_LENGTHS),
        "max_length_k": max(_LENGTHS),
    }


def _results(
    way: Callable[[Tensor], Tensor], given: list[Tensor], factors: dict[str, Tensor]
) -> Results:
    """What a layer adds to its input, and backward to its gradient; the factors' gradients."""
    x, grad = given
    x = x.detach().requires_grad_()
    y = way(x)
    dx, *own = torch.autograd.grad(y, [x, *factors.values()], grad, allow_unused=True)
    found = {"the output": (y - x).detach(), "the input's gradient": dx - grad}
    pairs = zip(factors, own, strict=True)
    return found | {f"{key}'s gradient": g for key, g in pairs if g is not None}


def _apart(found: Results, wanted: Results) -> tuple[str, float]:
    """The part that differs most, and by how much relative to its norm."""
    if found.keys() != wanted.keys():
        return "what has a gradient", float("inf")
    return max(
        ((part, _distance(found[part], wanted[part])) for part in wanted), key=lambda pair: pair[1]
    )


def _distance(found: Tensor, wanted: Tensor) -> float:
    error = float((found.double() - wanted.double()).norm())
    size = float(wanted.double().norm())
    far = error / size if size else error
    return far if far == far else float("inf")  # NaN is no agreement


def _total(found: Results, wanted: Results) -> float:
    """The relative differences of all parts in one number."""
    return sum(_distance(found[part], wanted[part]) ** 2 for part in wanted) ** 0.5


def _in_float64(
    layer: Any, block: Block, name: str, given: list[Tensor], kwargs: dict[str, Any]
) -> tuple[Results, Results]:
    """The layer's own forward and the steps in float64, on copies."""
    wide, wide_block = copy.deepcopy((layer, block))
    wide.double()
    cos, sin = kwargs["position_embeddings"]
    kwargs = {**kwargs, "position_embeddings": (cos.double(), sin.double())}
    given = [t.double() for t in given]
    factors = _factors(wide_block, name)
    routing = current_routing()
    assert routing is not None
    plan = wide_block.plan(routing, given[0][0], kwargs)
    return (
        _results(lambda x: type(wide).forward(wide, x, **kwargs), given, factors),
        {} if plan is None else _results(lambda x: run(plan, x), given, factors),
    )


def _factors(block: Block, name: str) -> dict[str, Tensor]:
    """The factors of an adapter, by what they are called in messages."""
    found: dict[str, Tensor] = {}
    for key, layer in block.layers.items():
        if name in layer.adapters:
            lora: Lora = layer.adapters[name]  # type: ignore[assignment]
            found |= {f"{key} lora_A": lora.A, f"{key} lora_B": lora.B}
    return found


@contextmanager
def _random_factors(
    block: Block, name: str, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Inside the block the adapter's factors are random ones that make a visible difference."""
    before: list[tuple[Lora, dict[str, nn.Parameter | None]]] = []
    for layer in block.layers.values():
        if name not in layer.adapters:
            continue
        lora: Lora = layer.adapters[name]  # type: ignore[assignment]
        r, columns = lora.A.shape
        A = uniform_by_fan_in((r, columns), generator).to(lora.A.dtype)
        B = torch.randn(lora.B.shape, generator=generator).to(lora.B.dtype)
        B *= 0.5 / (r**0.5 * max(abs(lora.scale), 1e-6))
        before.append((lora, dict(lora._parameters)))
        lora._parameters |= {"A": nn.Parameter(A), "B": nn.Parameter(B)}
    try:
        yield _factors(block, name)
    finally:
        for lora, parameters in before:
            lora._parameters |= parameters


@contextmanager
def _training(layer: Any) -> Iterator[None]:
    """Inside the block the layer trains, without checkpointing."""
    before = {module: module.training for module in layer.modules()}
    own = layer.__dict__.get("gradient_checkpointing")
    layer.train()
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
        del layer.gradient_checkpointing
        if own is not None:
            layer.gradient_checkpointing = own
