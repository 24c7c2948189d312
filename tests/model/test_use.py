"""Weighted sets and mixed rows on a real model, in float64: what each part adds, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decal.adapters import DropoutKey, Routing, current_routing, routed
from decal.config import LoraConfig
from decal.errors import AdapterError
from decal.model.inject import active_routing, attach, detach, disabled, mixed, use
from tests.model.test_inject import snapshot
from tests.zoo import VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
A = LoraConfig(
    r=3,
    lora_alpha=5,
    lora_dropout=0.0,
    target_modules=("q_proj", "embed_tokens"),
    bias="lora_only",
    init_lora_weights=False,
)
B = LoraConfig(
    r=2,
    lora_alpha=7,
    lora_dropout=0.0,
    use_rslora=True,
    target_modules=("q_proj", "down_proj", "lm_head"),
    rank_pattern={"down_proj": 4},
    init_lora_weights=False,
)
WHOLE = LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("lm_head",))


def model(*, whole: bool = False) -> Any:
    found = build("llama", torch.float64)
    attach(found, A, "a", seed=1)
    attach(found, B, "b", seed=2)
    if whole:
        attach(found, WHOLE, "w", seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".adapters." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found.double()


def logits(found: Any, rows: Any = slice(None)) -> Tensor:
    result: Tensor = found(IDS[rows], attention_mask=MASK[rows]).logits
    return result


def gradients(found: Any, y: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    (y * weights * MASK[: len(y), :, None]).sum().backward()
    grads = {n: p.grad.clone() for n, p in found.named_parameters() if p.grad is not None}
    found.zero_grad()
    return grads


def test_a_weighted_set_adds_shares_of_each_delta() -> None:
    """One layer's output on one input is base + .7 da + .3 db, rtol 1e-9: different ranks,
    targets, scalings, and a bias. Mutations: weigh the bias fully; average the factors (F17)."""
    found = model()
    for layer, x in (
        (found.model.layers[0].self_attn.q_proj, torch.randn(3, 54, dtype=torch.float64)),
        (found.model.layers[1].mlp.down_proj, torch.randn(3, 75, dtype=torch.float64)),
        (found.model.embed_tokens, IDS[0]),
        (found.lm_head, torch.randn(3, 54, dtype=torch.float64)),
    ):
        parts = {}
        for name in "ab":
            use(found, name)
            parts[name] = layer(x)
        with disabled(found):
            base = layer(x)
        use(found, {"a": 0.7, "b": 0.3})
        wanted = base + 0.7 * (parts["a"] - base) + 0.3 * (parts["b"] - base)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-11)


def test_mixed_rows_are_as_with_their_own_adapter_alone() -> None:
    """A padded batch of a tied model, one row without adapter, rtol 1e-9, forward and gradients.

    Mutations: count tokens as rows; train only what was in use before the block.
    """
    found = model()
    names = ["b", None, "a", "b"]
    with mixed(found, names):
        y = logits(found)
        got = gradients(found, y)
    alone: list[Tensor] = []
    for i, name in enumerate(names):
        with disabled(found) if name is None else use(found, name):
            alone.append(logits(found, slice(i, i + 1)))
    wanted = torch.cat(alone)
    real = MASK.bool()
    torch.testing.assert_close(y[real], wanted[real], rtol=1e-9, atol=1e-9)
    use(found, {"a": 1.0, "b": 1.0})  # both require grad; the graphs above are of each alone
    want = gradients(found, wanted)
    assert {n.split(".adapters.")[1][0] for n in got} == {"a", "b"}
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-8, atol=1e-9)


def test_mixed_rows_generate() -> None:
    """With a cache, token by token, greedily. Mutation: refuse one token per row."""
    found = model()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    rows = {"a": 2, "b": 3}
    with mixed(found, ["a", None, "a", "b"]):
        together = found.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    for name, i in rows.items():
        with use(found, name):
            alone = found.generate(IDS[i : i + 1], **options)
        assert torch.equal(together[i : i + 1], alone)


def test_mixed_gives_back_what_was_in_use() -> None:
    """Routing, trainable parameters, dropout key. Mutation: leave the routing set."""
    found = model()
    use(found, "a")
    before = active_routing(found)
    key = DropoutKey(0, 0, torch.zeros(28, dtype=torch.long), torch.arange(28))
    with routed(Routing((("a", 1.0),), key)), mixed(found, ["b"] * 4):
        routing = current_routing()
        assert routing is not None
        assert routing.segments == (("b", 4),)
        assert routing.dropout is key
    assert active_routing(found) == before
    trainable = {
        n.split(".adapters.")[1][0] for n, p in found.named_parameters() if p.requires_grad
    }
    assert trainable == {"a"}


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    """Mutation: let the last adapter's head win."""
    found = model(whole=True)
    with pytest.raises(AdapterError, match="lm_head is trained whole by `w`"):
        use(found, {"a": 1.0, "w": 0.5})
    with (
        pytest.raises(AdapterError, match="lm_head is trained whole by `w`"),
        mixed(found, ["a", "w", "w", None]),
    ):
        pass
    use(found, {"w": 1.0, "a": 0.5})
    with mixed(found, ["w"] * 4):
        y = logits(found)
    use(found, "w")
    torch.testing.assert_close(logits(found), y, rtol=1e-12, atol=1e-12)
    with pytest.raises(AdapterError, match="no adapter `x`"), mixed(found, ["x"]):
        pass
    with pytest.raises(AdapterError, match="no rows named"), mixed(found, []):
        pass


def test_embeddings_of_positions_have_no_rows() -> None:
    """GPT-2 looks positions up once for all rows. Mutation: split them among the rows."""
    found = build("gpt2")
    attach(found, LoraConfig(target_modules=("wpe",)), "p")
    attach(found, LoraConfig(target_modules=("wte",)), "t")
    with (
        pytest.raises(AdapterError, match=r"the embedding transformer\.wpe"),
        mixed(found, ["p", "t"]),
    ):
        pass
    with mixed(found, ["p", "p"]), torch.no_grad():
        found(IDS[:2, :2])


def test_two_adapters_that_train_one_parameter_are_used_one_at_a_time() -> None:
    """Mutations: add the difference from the other adapter's bias; let the inner module win."""
    found = build("llama")
    attach(found, LoraConfig(target_modules=("q_proj",), bias="lora_only"), "own")
    attach(found, LoraConfig(target_modules=("v_proj",), bias="all"), "all")
    attach(found, LoraConfig(target_modules=("k_proj",), modules_to_save=("0.mlp",)), "block")
    with pytest.raises(AdapterError, match=r"`all` and `own` both train model\..*q_proj\.bias"):
        use(found, {"own": 1.0, "all": 1.0})
    with pytest.raises(AdapterError, match=r"`all` and `block` both train model\..*mlp"):
        use(found, {"block": 1.0, "all": 1.0})
    use(found, {"own": 1.0, "block": 1.0})
    logits(found)


def test_wholes_inside_wholes_come_off_again() -> None:
    """Mutation: pass over the children of a module that is put back."""
    found = build("roberta")
    before = snapshot(found)
    query = {"target_modules": ("query",)}
    attach(found, LoraConfig(**query, modules_to_save=("classifier",)), "head")
    attach(found, LoraConfig(**query, modules_to_save=("classifier.dense",)), "part")
    attach(found, LoraConfig(target_modules=("classifier.out_proj",)), "low")
    for name in ("head", "part", "low"):
        use(found, name)
        found(IDS).logits.sum().backward()
        own = [p for n, p in found.named_parameters() if f".adapters.{name}." in n]
        assert own
        assert all(p.grad is not None for p in own)
    detach(found)
    after = snapshot(found)
    torch.testing.assert_close(after.pop("bytes"), before.pop("bytes"), rtol=0, atol=0)
    assert after == before
