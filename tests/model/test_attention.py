"""Flattened batches give every sample the logits it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from decal.data.batch import Batch
from decal.data.pack import flat_batch, padded_batch
from decal.data.sample import Sample
from decal.errors import BaseModelError
from decal.model import attention

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0),
    ),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    cls, config = MODELS[request.param]
    torch.manual_seed(5)
    return cls(config).double().eval()


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for row, length in enumerate((7, 3, 11), start=1):
        ids = torch.randint(0, 61, (length,), generator=generator).int().numpy()
        trained = torch.arange(length).numpy() % 3 != 0
        made.append(Sample(row=row, input_ids=ids, trained=trained))
    return made


def kept(batch: Batch) -> Tensor:
    return (batch.targets.flatten() != -100).nonzero().squeeze(1)


@torch.no_grad()
def test_flat_is_padded_is_alone_in_float64(model: Any) -> None:
    """The invariant behind packing: 1e-9 relative.

    Mutation: give attention one sequence, cu_seq_lens = [0, T].
    """
    flat, padded = flat_batch(samples()), padded_batch(samples())
    with attention.flat_attention(model):
        together = attention.forward(model, flat, kept(flat))
    side_by_side = attention.forward(model, padded, kept(padded))
    alone = torch.cat(
        [attention.forward(model, b, kept(b)) for b in (padded_batch([s]) for s in samples())]
    )
    scale = float(alone.abs().max())
    assert float((together - alone).abs().max()) < 1e-9 * scale
    assert float((side_by_side - alone).abs().max()) < 1e-9 * scale


@torch.no_grad()
def test_kept_logits_are_rows_of_all_logits(model: Any) -> None:
    batch = padded_batch(samples())
    everything = attention.forward(model, batch)
    few = attention.forward(model, batch, kept(batch))
    torch.testing.assert_close(few, everything.flatten(0, 1)[kept(batch)], rtol=1e-9, atol=1e-12)


def test_gradients_of_flat_and_padded_agree(model: Any) -> None:
    """Mutation: restart positions wrongly in the flat layout."""
    gradients = []
    for batch in (flat_batch(samples()), padded_batch(samples())):
        model.zero_grad()
        with attention.flat_attention(model):
            attention.forward(model, batch, kept(batch)).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_probe_finds_no_leak(model: Any) -> None:
    assert attention.leak(model) < 1e-9
    assert attention.flattens(model)


def test_probe_finds_a_leak(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that looks across the border is found out, and padded batches are used."""

    def leaky(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, **kwargs: Any) -> Tensor:
        return real(q, k, v, cu[[0, -1]], **kwargs)

    real = attention.attention_flat
    monkeypatch.setattr(attention, "attention_flat", leaky)
    assert attention.leak(model) > 1e-3
    assert not attention.flattens(model)


def test_outside_a_flat_batch_the_model_is_what_it_was(model: Any) -> None:
    """generate and padded forwards under the registered function are transformers' own."""
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    before = model(ids, attention_mask=mask).logits
    name = model.config._attn_implementation
    with attention.flat_attention(model):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert model.config._attn_implementation == name


def test_the_probe_sees_a_mask_that_flat_attention_does_not_know() -> None:
    """Llama 4 attends within chunks, and says so in its mask only.

    Mutation: run the samples alone through our attention too.
    """
    config = Llama4TextConfig(
        **{**SIZES, "hidden_size": 48},
        head_dim=8,
        intermediate_size_mlp=52,
        attention_chunk_size=4,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    assert not attention.flattens(Llama4ForCausalLM(config).eval())


def refusing(*_: Any, **kwargs: Any) -> Any:
    """A model that knows no flattened samples, as linear attention without its kernels."""
    if "cu_seq_lens_q" in kwargs:
        raise ValueError("samples cannot be kept apart")
    return real_forward(*_, **kwargs)


real_forward = LlamaForCausalLM.forward


def test_an_architecture_that_raises_on_flat_batches_is_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mutation: let the probe raise; a model that only padded batches suit could not be trained."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert attention.flattens(model)
    monkeypatch.setattr(LlamaForCausalLM, "forward", refusing)
    assert not attention.flattens(model)


def test_a_model_that_computes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("unsupported operand type(s) for @")

    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    with pytest.raises(BaseModelError, match="LlamaForCausalLM cannot compute logits"):
        attention.flattens(model)
