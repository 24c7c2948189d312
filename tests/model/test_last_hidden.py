"""The hidden states that reach a plain head, and which heads are plain."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from decal.adapters import DropoutKey, Routing, routed
from decal.config import LoraConfig
from decal.data.batch import Batch
from decal.data.pack import flat_batch, padded_batch
from decal.data.sample import Sample
from decal.model import attention, last_hidden
from decal.model.inject import attach
from decal.model.switches import without_dropout
from decal.objectives import sft
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear
from decal.verbs.loss import batch_losses, head_of
from tests import zoo
from tests.zoo import CAUSAL, ZOO

CAPPED = {"gemma2"}
SCALED: dict[str, tuple[type, Any]] = {
    "granite": (tf.GraniteForCausalLM, tf.GraniteConfig),
    "cohere": (tf.CohereForCausalLM, tf.CohereConfig),
}
"""Architectures that multiply their logits after the head, by the settings below."""
SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "pad_token_id": 0,
}


def frozen(name: str, dtype: torch.dtype = torch.float64) -> Any:
    if name in SCALED:
        cls, config = SCALED[name]
        scale = {"granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.0625}}[name]
        torch.manual_seed(4)
        model = cls(config(**SIZES, **scale)).to(dtype).eval()
    else:
        model = zoo.build(name, dtype)
    return model.requires_grad_(False)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for row, length in enumerate((7, 3, 11), start=1):
        ids = torch.randint(3, 61, (length,), generator=generator).int().numpy()
        made.append(Sample(row=row, input_ids=ids, trained=torch.arange(length).numpy() % 3 != 0))
    return made


def loss_of(model: Any, batch: Batch, head: last_hidden.PlainHead | None) -> Tensor:
    ids, positions = batch.sample_ids.flatten(), batch.positions.flatten()
    rows = attention.head_rows(batch, sft.trained_positions(batch))
    key = DropoutKey(3, 0, ids, positions, rows)
    with routed(Routing((("default", 1.0),), key)):
        return batch_losses(model, batch, sft, head).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*CAUSAL, *SCALED])
def test_which_heads_are_plain(name: str, dtype: torch.dtype) -> None:
    """Fails when the planted numbers are compared to within a tolerance that scaling passes."""
    found = last_hidden.plain_head(frozen(name, dtype))
    assert (found is None) == (name in CAPPED | SCALED.keys())


def test_a_cap_shows_where_logits_are_small() -> None:
    """A cap of 1,000 leaves this model's own logits as they are to rounding, but not those planted.

    Fails when the planted numbers are not large, or the model's own logits are compared.
    """
    model = frozen("gemma2", torch.bfloat16)
    ids = torch.arange(3, 40)[None]
    model.config.final_logit_softcapping = None
    bare = model(input_ids=ids).logits
    assert last_hidden.plain_head(model) is not None
    model.config.final_logit_softcapping = 1e3
    torch.testing.assert_close(model(input_ids=ids).logits, bare)
    assert last_hidden.plain_head(model) is None


@pytest.mark.parametrize("name", [*CAUSAL, *SCALED])
def test_the_loss_and_its_gradients_are_those_of_whole_logits(name: str) -> None:
    """Adapters with dropout, flat and padded batches, 1e-9 in float64.

    Fails when rows of padded batches are taken by column only, the last norm is left out, the
    upstream factor is dropped, or a cap is passed over.
    """
    model = frozen(name)
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0.2, init_lora_weights=False))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    head = head_of(model, sft)
    assert model.training
    flattens = name in SCALED or ZOO[name].flattens
    layouts = [padded_batch, flat_batch] if flattens else [padded_batch]
    attending = attention.flat_attention(model) if flattens else nullcontext()
    with without_dropout(model), attending:
        for batch in (layout(samples()) for layout in layouts):
            gradients, losses = [], []
            for one in (None, head):
                loss = loss_of(model, batch, one)
                (loss * 0.3).backward()
                losses.append(loss.detach())
                gradients.append([p.grad.clone() for p in trained])
                model.zero_grad()
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
            for ours, whole in zip(gradients[1], gradients[0], strict=True):
                atol = 1e-9 * float(whole.abs().max())
                torch.testing.assert_close(ours, whole, rtol=1e-9, atol=atol)


@torch.no_grad()
def test_the_head_is_itself_again() -> None:
    """Also after a pass that failed. Fails when the stand-in stays."""
    model = frozen("llama")
    head = last_hidden.plain_head(model)
    assert head is not None
    batch = padded_batch(samples())
    keep = sft.trained_positions(batch)
    before = attention.forward(model, batch, keep)
    hidden = last_hidden.forward(model, head, batch, keep)
    assert hidden.shape == (len(keep), model.config.hidden_size)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, before, rtol=1e-9, atol=1e-9)
    with pytest.raises(IndexError):
        last_hidden.forward(model, head, batch, keep + batch.input_ids.numel())
    assert torch.equal(attention.forward(model, batch, keep), before)


def with_adapter(model: Any) -> None:
    attach(model, LoraConfig(r=3, target_modules=("q_proj", "lm_head")))


def trained_whole(model: Any) -> None:
    attach(model, LoraConfig(r=3, target_modules=("q_proj",), modules_to_save=("lm_head",)))


def unfrozen(model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def own_forward(model: Any) -> None:
    model.lm_head.forward = lambda x: 2 * x[..., :1] * x.new_ones(61)


def other_class(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.lm_head.__class__ = Doubled


def read_weight(model: Any) -> None:
    """Logits that another layer made: the head is there and is not asked."""
    model.lm_head, model.head = nn.Linear(60, 61), model.lm_head
    model.lm_head.requires_grad_(False)
    model.register_forward_hook(lambda m, _, out: out.update(logits=m.head(out.logits[..., :60])))


def int8(model: Any) -> None:
    model.lm_head = QuantLinear.from_linear(model.lm_head, Recipe(format="int8"))


@pytest.mark.parametrize(
    "change",
    [
        with_adapter,
        trained_whole,
        unfrozen,
        hooked,
        own_forward,
        other_class,
        read_weight,
        int8,
    ],
)
def test_heads_that_are_not_plain(change: Any) -> None:
    """Fails when any of the questions in `_projects` is not asked, or the trial left out."""
    model = frozen("qwen2", torch.float32)
    assert last_hidden.plain_head(model) is not None
    change(model)
    assert last_hidden.plain_head(model) is None


@torch.no_grad()
def test_a_packed_head() -> None:
    """As the layer computes it. Fails when the head's weight is read as if it were dense."""
    model = frozen("qwen2")
    model.lm_head = QuantLinear.from_linear(model.lm_head, Recipe(format="nf4"))
    head = last_hidden.plain_head(model)
    batch = padded_batch(samples())
    whole = batch_losses(model, batch, sft, None)
    torch.testing.assert_close(batch_losses(model, batch, sft, head), whole, rtol=1e-9, atol=0)


def test_the_trial_leaves_no_traces() -> None:
    """Fails when torch's random state moves, or training mode is lost."""
    model = frozen("llama").train()
    attach(model, LoraConfig(r=3, lora_dropout=0.5))
    before = torch.get_rng_state()
    assert last_hidden.plain_head(model) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
