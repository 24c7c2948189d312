"""Modules that adapters hold whole: the base is untouched, the routing picks one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decal.adapters import (
    AdaptedLayer,
    Place,
    ReplacedModule,
    Replacement,
    Routing,
    RoutingState,
    routed,
)
from decal.errors import AdapterError


class Head(nn.Module):
    """Two layers, as RoBERTa's classifier has."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(7, 5), nn.Linear(5, 3)
        self.inner_size = 5

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.out(torch.tanh(self.dense(x))) * scale


def places(head: Head) -> dict[str, Place]:
    layers = {"dense": head.dense, "out": head.out}
    return {f"{n}.{leaf}": Place(m, leaf) for n, m in layers.items() for leaf in ("weight", "bias")}


def make(*names: str, dtype: torch.dtype = torch.float64) -> ReplacedModule:
    torch.manual_seed(0)
    head = Head().to(dtype).requires_grad_(False)
    module = ReplacedModule(head, RoutingState(), "score")
    for name in names:
        module.adapters[name] = Replacement(places(head))
        with torch.no_grad():
            for parameter in module.adapters[name].parameters():
                parameter.add_(torch.randn_like(parameter))
    return module


def using(name: str) -> Routing:
    return Routing(((name, 1.0),))


def plain(module: ReplacedModule, name: str) -> Head:
    """The head as it would be with the adapter's values."""
    head = copy.deepcopy(module.base_layer)
    values = dict(module.adapters[name].named_parameters())
    for key, parameter in head.named_parameters():
        parameter.data.copy_(values[key])
    return head.requires_grad_()


def test_the_routed_adapters_values_compute_and_train() -> None:
    """float64, to the bit. Mutations: leave one layer the base's; detach the cast."""
    module, x = make("a", "b"), torch.randn(4, 7, dtype=torch.float64)
    base = module.base_layer(x)
    assert torch.equal(module(x), base)
    for name in ("a", "b"):
        module.state.routing = using(name)
        wanted = plain(module, name)
        assert torch.equal(module(x, scale=2.0), wanted(x, scale=2.0))
        module(x).sum().backward()
        wanted(x).sum().backward()
        grads = {n: p.grad for n, p in wanted.named_parameters()}
        for key, parameter in module.adapters[name].named_parameters():
            assert torch.equal(parameter.grad, grads[key])
    with routed(Routing()):
        assert torch.equal(module(x), base)
    assert all(p.grad is None for p in module.base_layer.parameters())


def test_the_base_gets_its_parameters_back_after_an_error() -> None:
    """Mutation: put them back without `finally`."""
    module = make("a")
    before = {n: id(p) for n, p in module.base_layer.named_parameters()}
    module.state.routing = using("a")
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 6, dtype=torch.float64))
    assert {n: id(p) for n, p in module.base_layer.named_parameters()} == before


def test_masters_are_float32_and_compute_is_the_bases() -> None:
    """Mutations: keep bf16 copies; let `.half()` cast the masters."""
    module = make("a", dtype=torch.bfloat16)
    module.to(torch.bfloat16)
    module.state.routing = using("a")
    y = module(torch.randn(4, 7).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter in module.adapters["a"].parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_a_tied_weight_changes_only_here() -> None:
    """Mutation: write into the shared tensor."""
    embedding, head = nn.Embedding(9, 7), nn.Linear(7, 9, bias=False)
    head.weight = embedding.weight
    module = ReplacedModule(head, RoutingState(), "lm_head")
    module.adapters["a"] = Replacement({"weight": Place(head, "weight")})
    with torch.no_grad():
        module.adapters["a"].weight.add_(1)
    ids = torch.tensor([3, 4])
    before = embedding(ids)
    module.state.routing = using("a")
    x = torch.randn(2, 7)
    torch.testing.assert_close(module(x), x @ (embedding.weight + 1).t())
    assert torch.equal(embedding(ids), before)


def test_what_is_shared_inside_is_copied_once() -> None:
    """Mutation: one master per name."""
    head = Head()
    head.out.bias = nn.Parameter(torch.ones(5))
    head.dense.bias = head.out.bias
    replacement = Replacement(places(head))
    assert len(list(replacement.parameters())) == 3
    assert replacement.dense.bias is replacement.out.bias


def test_a_wrapper_inside_moves_no_place() -> None:
    """Another adapter on a layer of the head. Mutation: find parameters by name."""
    module, x = make("a"), torch.randn(4, 7, dtype=torch.float64)
    wanted = plain(module, "a")(x)
    module.base_layer.dense = AdaptedLayer(module.base_layer.dense, module.state)
    module.state.routing = using("a")
    assert torch.equal(module(x), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_same_values(reentrant: bool) -> None:
    module = make("a")
    module.state.routing = using("a")
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    of = (x, *module.adapters["a"].parameters())
    want = torch.autograd.grad(module(x).sum(), of)
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    for got, plain_grad in zip((p.grad for p in of), want, strict=True):
        torch.testing.assert_close(got, plain_grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "routing",
    [
        Routing((("a", 0.7),)),
        Routing((("a", 1.0), ("b", 1.0))),
        Routing(segments=(("a", 1), (None, 1))),
        Routing(segments=(("a", 1), ("c", 1))),
    ],
)
def test_shares_and_rows_are_refused_by_name(routing: Routing) -> None:
    """Mutation: take the first adapter that holds the module."""
    module = make("a", "b")
    with routed(routing), pytest.raises(AdapterError, match="score is trained whole by `a`"):
        module(torch.randn(2, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "routing",
    [
        Routing((("a", 1.0), ("c", 0.5))),
        Routing(segments=(("a", 1), ("a", 1))),
    ],
)
def test_one_adapter_on_all_rows_is_taken(routing: Routing) -> None:
    module, x = make("a", "b"), torch.randn(2, 7, dtype=torch.float64)
    with routed(routing):
        assert torch.equal(module(x), plain(module, "a")(x))


def test_copies_are_independent_and_attributes_are_the_bases() -> None:
    """Mutation: keep the places of the first module in a copy."""
    module, x = make("a"), torch.randn(4, 7, dtype=torch.float64)
    other = copy.deepcopy(module)
    other.state.routing = using("a")
    assert torch.equal(other(x), plain(module, "a")(x))
    assert torch.equal(module(x), module.base_layer(x))
    assert module.inner_size == 5
    assert module.dense is module.base_layer.dense
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
    assert "dense.weight: [5, 7]" in repr(module)
