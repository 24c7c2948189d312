"""F14: an evaluation repacks the quantized weights in place, and training goes on without a
gradient through the base.

Here the packed bytes are the same before and after anything, and the gradient with them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decal import demo
from decal.adapters import lines
from decal.config import LoraConfig
from decal.kernels import ops, reference_project
from decal.kernels.stored import Stored
from decal.model.hf import quantizer_identity
from decal.model.inject import attach
from decal.quant.linear import QuantLinear
from decal.verbs.load import load_base
from tests.failures.situations import IDS, draw

QUANTS = ("nf4", "fp4", "int8")


def model_of(quant: Any) -> Any:
    model, _ = load_base(demo.base_path(), quant=quant, dtype="float32", device="cpu")
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0))
    draw(model)
    return model


def gradient(model: Any) -> Tensor:
    """Of the first layer's factors: it comes through everything above them."""
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    first = [p for n, p in model.named_parameters() if p.requires_grad and "layers.0." in n]
    return torch.cat([p.grad.flatten() for p in first])


def evaluated(model: Any) -> None:
    """What runs between two steps of a training."""
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
        model.generate(IDS[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        model(input_ids=IDS[:, :1])


@pytest.mark.parametrize("quant", QUANTS)
def test_packed_bytes_outlive_evaluation_and_training(quant: str) -> None:
    """The checksum over all packed bytes, and the gradient to the bit.

    Fails when a forward writes to the parts, or evaluation leaves something behind that the next
    training forward takes instead.
    """
    model = model_of(quant)
    before, wanted = quantizer_identity(model), gradient(model)
    assert float(wanted.norm()) > 0
    evaluated(model)
    assert quantizer_identity(model) == before
    assert torch.equal(gradient(model), wanted)
    assert quantizer_identity(model) == before


@pytest.mark.parametrize("quant", QUANTS)
def test_the_gradient_is_that_of_the_dequantized_base(quant: str) -> None:
    """After an evaluation, against plain linear layers. Float32, 1e-4 relative.

    Fails when the gradient does not pass through the base's weights.
    """
    model = model_of(quant)
    evaluated(model)
    found = gradient(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, layer.to_linear(torch.float32))
    assert float((found - gradient(model)).norm() / found.norm()) < 1e-4


def test_a_repack_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: evaluation swaps the codes into another order, as kernels like them. The checksum
    differs, and so does the gradient, which nothing else would show."""
    model = model_of("nf4")
    before, wanted = quantizer_identity(model), gradient(model)

    def repacking(x: Tensor, weight: Stored, *rest: Any) -> Tensor:
        y = reference_project.project(x, weight, *rest)
        weight.data.copy_(weight.data.flip(0))
        return y

    model.eval()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(ops.BACKENDS, "project", {"repacking": repacking})
        model(input_ids=IDS)
    assert quantizer_identity(model) != before
    assert float((gradient(model) - wanted).norm() / wanted.norm()) > 0.3


def test_a_product_without_gradient_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the training forward takes the product for inference. The loss is the same, and a
    gradient still comes through the factors above; most of it is gone."""
    model = model_of("nf4")
    wanted, loss = gradient(model), model(input_ids=IDS, labels=IDS).loss.detach()

    def cut(parts: Any, low: Any = None, keep: Any = None) -> Tensor:
        dx = reference_project.project_back(parts, low, keep)
        return dx - reference_project.project_back(parts)

    monkeypatch.setitem(ops.BACKENDS, "project_back", {"cut": cut})
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss.detach(), loss)
    assert float((gradient(model) - wanted).norm() / wanted.norm()) > 0.3


def test_a_part_written_to_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused; without the guard backward goes through another weight, in silence."""

    def wrong(layer: QuantLinear) -> Tensor:
        x = torch.ones(2, layer.in_features, requires_grad=True)
        y = layer(x)
        with torch.no_grad():
            layer.weight_packed.copy_(layer.weight_packed.flip(0))
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    layer = model_of("nf4").model.layers[0].mlp.up_proj
    right = layer.weight().sum(0).expand(2, -1)
    with pytest.raises(RuntimeError, match="written to between forward and backward"):
        wrong(layer)
    layer.weight_packed.data.copy_(layer.weight_packed.flip(0))
    monkeypatch.setattr(lines, "check_frozen", lambda ctx: None)
    assert not torch.allclose(wrong(layer), right, atol=1e-3)
