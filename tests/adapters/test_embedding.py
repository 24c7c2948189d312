"""LoRA on embeddings against the formula, written with autograd's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from decal.adapters import Lora, Slot, base_view
from decal.config import LoraConfig

VOCAB, DIM, R = 23, 13, 3
CONFIG = LoraConfig(r=R, lora_alpha=7, lora_dropout=0.3, init_lora_weights=False)
IDS = torch.tensor([[4, 0, 22, 4, 2], [2, 2, 7, 0, 11]])
EMBEDDINGS = {
    "plain": (lambda: nn.Embedding(VOCAB, DIM), 1.0),
    "padding": (lambda: nn.Embedding(VOCAB, DIM, padding_idx=2), 1.0),
    "tensor gain": (lambda: Gemma3TextScaledWordEmbedding(VOCAB, DIM, 2, 3.5), 3.5),
    "number gain": (lambda: BartScaledWordEmbedding(VOCAB, DIM, 2, 2.5), 2.5),
}


def make(config: LoraConfig = CONFIG) -> Lora:
    slot = Slot(
        module="embed",
        group="embed",
        adapter="default",
        shape=(DIM, VOCAB),
        device=torch.device("cpu"),
        kind="embedding",
    )
    return Lora.create(config, slot, seed=3)


def formula(base: Any, lora: Lora, gain: float, factor: float) -> Tensor:
    rows = embedding(IDS, lora.A.t(), padding_idx=base.padding_idx)
    return base(IDS) + factor * (7 / R) * gain * rows @ lora.B.t()


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_output_and_gradients_are_the_formulas(kind: str) -> None:
    """float64, rtol 1e-9, in training mode: nothing is dropped of ids. Mutations: drop the gain;
    drop the scaling; let the padding token's column move."""
    build, gain = EMBEDDINGS[kind]
    base, lora = build().double().requires_grad_(False), make().double().train()
    y = lora(IDS, base(IDS), base_view(base), -0.7)
    expected = formula(base, lora, gain, -0.7)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin()
    got = torch.autograd.grad((y * weights).sum(), (lora.A, lora.B))
    want = torch.autograd.grad((expected * weights).sum(), (lora.A, lora.B))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert bool(got[0][:, 2].any()) == (base.padding_idx is None)


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_merged_is_what_forward_adds(kind: str) -> None:
    """float64, rtol 1e-9. Mutation: put the gain into the merged weight as well."""
    build, _ = EMBEDDINGS[kind]
    base, lora = build().double().requires_grad_(False), make().double()
    want = lora(IDS, base(IDS), base_view(base)).detach()
    view = base_view(base)
    assert view is not None
    base.weight.copy_(lora.merged(view.weight()).t())
    torch.testing.assert_close(base(IDS), want, rtol=1e-9, atol=1e-12)


def test_bf16_bases_give_float32_gradients() -> None:
    """Error below 2^-6 of the largest. Mutation: add the columns up in bfloat16."""
    base, lora = nn.Embedding(VOCAB, DIM).bfloat16().requires_grad_(False), make()
    ids = torch.randint(0, VOCAB, (400,))
    y = lora(ids, base(ids), base_view(base))
    grad = torch.randn(400, DIM).bfloat16()
    dA, dB = torch.autograd.grad(y, (lora.A, lora.B), grad)
    assert (y.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = (lora.A.detach().double().requires_grad_(), lora.B.detach().double().requires_grad_())
    wide = (7 / R) * embedding(ids, exact[0].t()) @ exact[1].t()
    for got, want in zip((dA, dB), torch.autograd.grad(wide, exact, grad.double()), strict=True):
        assert (got - want).abs().max() < 2**-6 * want.abs().max()


def test_starting_values_are_pefts() -> None:
    """A zero and B standard normal, for true and gaussian alike, within 5 standard errors.

    Mutation: start embeddings as linear layers.
    """
    for how in (True, "gaussian"):
        lora = make(LoraConfig(r=200, init_lora_weights=how))
        assert not lora.A.any()
        assert abs(lora.B.std().item() - 1) < 5 * (0.5 / lora.B.numel()) ** 0.5
    acting = make(LoraConfig(r=200, init_lora_weights=False))
    assert abs(acting.A.std().item() - 1) < 5 * (0.5 / acting.A.numel()) ** 0.5


def test_embeddings_that_do_more_than_look_up_are_no_layers() -> None:
    """Mutation: know them by their class."""

    class Normed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return normalize(super().forward(ids))

    assert base_view(OPTLearnedPositionalEmbedding(9, 5)) is None
    assert base_view(Normed(9, 5)) is None
    assert base_view(nn.Embedding(9, 5, max_norm=1.0)) is None
    assert base_view(nn.Embedding(9, 5, scale_grad_by_freq=True)) is None


def test_an_output_that_a_hook_made_a_leaf_is_left_alone() -> None:
    """transformers' enable_input_require_grads. Mutation: add into the leaf's memory."""
    base, lora = nn.Embedding(VOCAB, DIM).requires_grad_(False), make()
    y = base(IDS).requires_grad_()
    before = y.detach().clone()
    lora(IDS, y, base_view(base)).sum().backward()
    assert torch.equal(y, before)
    assert torch.equal(y.grad, torch.ones_like(before))
