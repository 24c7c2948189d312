"""Segments: rows of one batch with different adapters, each row as with its own alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decal.adapters import AdaptedLayer, DropoutKey, Lora, Routing, RoutingState, Slot, routed
from decal.config import LoraConfig
from decal.errors import AdapterError

IN, OUT = 7, 5


def layer(base: nn.Module | None = None, dropout: float = 0.0) -> AdaptedLayer:
    torch.manual_seed(1)
    base = (base or nn.Linear(IN, OUT)).double().requires_grad_(False)
    found = AdaptedLayer(base, RoutingState())
    for i, name in enumerate("ab"):
        slot = Slot(
            module="m",
            group="m",
            adapter=name,
            shape=found.base.shape,
            device=torch.device("cpu"),
            kind=found.base.kind,
            bias=found.base.bias,
        )
        config = LoraConfig(r=2 + i, lora_alpha=3, lora_dropout=dropout, init_lora_weights=False)
        lora = Lora.create(config, slot, seed=i).double().eval()
        if lora.bias is not None:
            lora.bias.data.add_(i + 1)
        found.adapters[name] = lora
    return found


def alone(
    found: AdaptedLayer, x: Tensor, name: str | None, key: DropoutKey | None = None
) -> Tensor:
    with routed(Routing(() if name is None else ((name, 1.0),), key)):
        return found(x)


@pytest.mark.parametrize("embedding", [False, True])
def test_padded_rows_are_their_own_adapters(embedding: bool) -> None:
    """float64, rtol 1e-9: output and gradients. Mutations: count tokens as samples; give the last
    segment's adapter to all rows."""
    found = layer(nn.Embedding(11, OUT) if embedding else None)
    x = torch.randn(5, 3, IN, dtype=torch.float64)
    if embedding:
        x = torch.randint(0, 11, (5, 3))
    with routed(Routing(segments=(("a", 1), (None, 1), ("b", 2), ("a", 1)))):
        y = found(x)
    names = ("a", None, "b", "b", "a")
    wanted = torch.cat([alone(found, row[None], n) for row, n in zip(x, names, strict=True)])
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-12)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    of = list(found.adapters.parameters())
    got = torch.autograd.grad((y * weights).sum(), of)
    want = torch.autograd.grad((wanted * weights).sum(), of)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_flat_tokens_are_their_own_adapters_with_dropout() -> None:
    """float64, rtol 1e-9: each segment drops what it drops alone, checkpointed too. Mutation:
    give every segment the first rows of the key."""
    found = layer(dropout=0.4)
    x = torch.randn(1, 9, IN, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[3] * 4 + [8] * 5])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])

    def key(part: slice) -> DropoutKey:
        return DropoutKey(seed=1, epoch=2, sample_ids=ids[:, part], positions=positions[:, part])

    routing = Routing(dropout=key(slice(None)), segments=(("b", 4), ("a", 5)))

    def run(x: Tensor) -> Tensor:
        with routed(routing):
            return found(x)

    first, second = slice(0, 4), slice(4, 9)
    wanted = torch.cat(
        [alone(found, x[:, first], "b", key(first)), alone(found, x[:, second], "a", key(second))],
        dim=1,
    )
    torch.testing.assert_close(run(x), wanted, rtol=1e-9, atol=1e-12)
    (want,) = torch.autograd.grad(wanted.cos().sum(), x)
    checkpoint(run, x, use_reentrant=False).cos().sum().backward()
    torch.testing.assert_close(x.grad, want, rtol=1e-9, atol=1e-12)


def test_the_head_sees_the_kept_rows_of_the_key() -> None:
    """Mutation: take the first rows of the key instead of the kept ones."""
    found = layer(dropout=0.4)
    ids, positions = torch.zeros(6, dtype=torch.long), torch.arange(6)
    kept = torch.tensor([1, 4, 5])
    x = torch.randn(6, IN, dtype=torch.float64)
    whole = alone(found, x, "a", DropoutKey(1, 0, ids, positions))
    some = alone(found, x[kept], "a", DropoutKey(1, 0, ids, positions, kept))
    torch.testing.assert_close(some, whole[kept], rtol=1e-12, atol=0)
    with pytest.raises(AdapterError, match="the layer got 2, the batch has 6 tokens"):
        alone(found, x[:2], "a", DropoutKey(1, 0, ids, positions, kept))


@pytest.mark.parametrize("shape", [(1, 4, IN), (3, IN), (4, IN)])
def test_inputs_that_are_not_the_batchs_rows_are_refused(shape: tuple[int, ...]) -> None:
    """Two samples; one row for all, an odd count, and, allowed, pooled rows.

    Mutation: ask only whether the rows divide.
    """
    found, x = layer(), torch.randn(shape, dtype=torch.float64)
    with routed(Routing(segments=(("a", 1), ("b", 1)))):
        if shape == (4, IN):
            assert found(x).shape == (4, OUT)
            return
        with pytest.raises(AdapterError, match="not those of the 2 rows"):
            found(x)


def test_a_layer_that_none_of_them_adapts_stays_the_bases() -> None:
    found, x = layer(), torch.randn(2, IN, dtype=torch.float64)
    with routed(Routing(segments=(("c", 1), (None, 1)))):
        assert torch.equal(found(x), found.base_layer(x))
    with routed(Routing(segments=(("a", 1), ("c", 0), (None, 1)))):
        torch.testing.assert_close(found(x)[1], found.base_layer(x)[1])
