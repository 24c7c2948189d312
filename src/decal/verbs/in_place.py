"""`merge_in_place`: an adapter folded into the loaded model, which is a plain one afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decal.errors import AdapterError
from decal.model import hf
from decal.model.inject import detach
from decal.model.quantizer import unpacked
from decal.model.state import adapted_layers, adapter_state, full_state, lora_of
from decal.model.survey import base_modules
from decal.quant.linear import QuantLinear
from decal.verbs.same_base import forget_base
from decal.weights.delta import FileDelta, add_delta, cast


def merge_in_place(model: Any, name: str = "default") -> None:
    """Adds one attached adapter to the loaded model's weights and takes all adapters off.

    Sums in float32 and rounds once, as `merge` does on files. A quantized layer becomes an ordinary
    one in its compute dtype: the sum of its dequantized weight and the delta. A head or embedding
    that shared its weight with the other no longer does: the change is its own. What is trained on
    the model from here on does not belong to the base it was loaded from, and does not say so.

    Raises:
        AdapterError: the model has no such adapter, or one whose bias has no place in the model.
        VerificationError: a sum does not fit the layer's dtype.
    """
    weights = _weights(model, name)
    parameters = _parameters(model, {**full_state(model, name), **_biases(model, name)})
    detach(model)  # nothing has changed until here, and all sums fit
    for module, weight in weights.items():
        _put_weight(model, module, weight)
    for key, value in parameters.items():
        _put_parameter(model, key, value)
    hf.forget_quantizer(model)
    forget_base(model)


def _weights(model: Any, name: str) -> dict[str, Tensor]:
    """Module -> W' as [out, in], in the dtype of the layer."""
    layers = adapted_layers(model)
    merged = {}
    for module, parts in adapter_state(model, name).items():
        weight = layers[module].base.weight().detach()
        delta = FileDelta(parts, module=module)
        result = add_delta(module, weight.cpu(), delta, weight.dtype)
        merged[module] = result.to(weight.device)
    return merged


def _biases(model: Any, name: str) -> dict[str, Tensor]:
    """Parameter name -> the bias of a target module with what the adapter adds, in float32."""
    merged: dict[str, Tensor] = {}
    homeless = []
    for module, layer in adapted_layers(model).items():
        if name not in layer.adapters or layer.base.kind == "embedding":
            continue
        bias = lora_of(layer, name).merged_bias(layer.base.bias)
        if bias is None:
            continue
        if layer.base.bias is not None:
            merged[f"{module}.bias"] = bias.detach()
        elif bool(bias.any()):
            homeless.append(module)
    if homeless:
        raise AdapterError(
            f"{len(homeless)} layers have no bias that the adapter's (lora_bias) could be added to",
            details=[f"{homeless[0]}: the architecture has a layer without bias here"],
            hint="keep the adapter apart from its base",
        )
    return merged


def _parameters(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values rounded to the dtypes of the base's parameters of these names."""
    modules = dict(base_modules(model))
    rounded = {}
    for key, value in values.items():
        module, _, leaf = key.rpartition(".")
        rounded[key] = cast(key, value.detach(), getattr(modules[module], leaf).dtype)
    return rounded


def _put_weight(model: Any, module: str, weight: Tensor) -> None:
    layer = model.get_submodule(module)
    if isinstance(layer, QuantLinear):
        layer = unpacked(layer, weight.dtype).train(layer.training)
        model.set_submodule(module, layer)
    transposed = isinstance(layer, Conv1D | nn.Embedding)
    hf.untie(model, module)
    stored = weight.T.contiguous() if transposed else weight
    layer.weight = nn.Parameter(stored, requires_grad=layer.weight.requires_grad)


def _put_parameter(model: Any, key: str, value: Tensor) -> None:
    """A shared weight is no longer shared; a shared bias is, as its names carry the same change."""
    module, _, leaf = key.rpartition(".")
    owner = model.get_submodule(module)
    before = getattr(owner, leaf)
    new = nn.Parameter(value.clone(), requires_grad=before.requires_grad)
    if leaf != "bias":
        hf.untie(model, module)
        setattr(owner, leaf, new)
        return
    for holder in model.modules():
        for other, parameter in list(holder._parameters.items()):
            if parameter is before:
                setattr(holder, other, new)
