"""decal as a transformers quantizer: `from_pretrained` loads, renames and fuses, we only pack.

transformers hands every finished tensor (renamed, fused, cast to the compute dtype) to
`_PackWeight.convert`. It packs the weight, puts a QuantLinear where the nn.Linear stood, and drops
the 16-bit tensor before the next one is read. Peak memory is the quantized model plus one
conversion group; loading is sequential for on-the-fly quantizers, so reader threads cannot run
ahead.

Folders that bitsandbytes wrote come the same way, without bitsandbytes: transformers collects the
tensors of one weight by their endings and hands them to `_ReadStored.convert`, which makes a
QuantLinear of exactly these bytes. Which layers are stored quantized is the file's own to say.

The skeleton keeps its plain linear layers until their weight arrives, so that transformers sees
the key names it expects (`<m>.weight`), whatever parts the format stores. GPT-2's Conv1D, whose
plain files hold [in, out], is packed as [out, in].

What stays 16-bit: the output head, tied embeddings, what `quant.skip_modules` names, and everything
that is not a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from decal.adapters import base_view
from decal.errors import QuantError
from decal.model.heads import in_head
from decal.model.heap import give_back_freed
from decal.model.unquantized import check_skips, refuse_fused, skipped
from decal.quant import FORMATS, quant_format
from decal.quant.base import Packed, Recipe
from decal.quant.bnb import STATE, from_bnb
from decal.quant.linear import QuantLinear

METHOD = "decal"

# Some architectures (GPT-2) fill `module.c_proj.weight` with starting values from the module above,
# unless it is marked as loaded. A quantized layer's weight is a method, and loaded always.
QuantLinear.weight._is_hf_initialized = True  # type: ignore[attr-defined]

_TRIM_EVERY = 32 << 20


@register_quantization_config(METHOD)
class DecalQuantizationConfig(QuantizationConfigMixin):
    """The recipe as transformers passes it around.

    Args:
        format: registry name of the format.
        block_size: weights that share one scale.
        double: whether the scales are quantized too.
        skip_modules: modules that stay 16-bit, by the ends of their names.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int = 64,
        double: bool = True,
        skip_modules: Sequence[str] = (),
        **_: Any,
    ):
        self.quant_method = METHOD
        self.format = format
        self.block_size = block_size
        self.double = double
        self.skip_modules = list(skip_modules)

    @property
    def recipe(self) -> Recipe:
        return Recipe(format=self.format, block_size=self.block_size, double=self.double)


def quantizable_modules(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers that decal quantizes in `model`, in model order.

    The output head, tied weights, modules that the architecture keeps in float32 and those that
    `skip` names are left out. Works on meta skeletons.

    Raises:
        QuantError: names in `skip` that fit no linear layer.
    """
    kept = {k for k in get_keys_to_not_convert(model) if k}
    kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    check_skips(skip, linear, model)
    return [
        name
        for name in linear
        if not skipped(name, kept) and not skipped(name, skip) and not in_head(model, name)
    ]


def _is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T + b and nothing else, whatever its class is called."""
    return isinstance(module, nn.Linear | Conv1D | QuantLinear) and base_view(module) is not None


def shell(module: nn.Module, packed: Packed, dtype: torch.dtype) -> QuantLinear:
    """The quantized layer that takes the place of `module`, a linear layer or Conv1D."""
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    layer = QuantLinear(packed, bias, dtype, transposed_source=isinstance(module, Conv1D))
    return layer.train(module.training)


def quantize_skeleton(model: nn.Module, recipe: Recipe, skip: Sequence[str] = ()) -> list[str]:
    """Puts empty quantized layers into a meta skeleton; returns their names.

    Raises:
        QuantError: fused experts, or names in `skip` that fit nothing.
    """
    refuse_fused(model, skip)
    names = quantizable_modules(model, skip)
    for name in names:
        module = model.get_submodule(name)
        stored: torch.Tensor = module.weight  # type: ignore[assignment]
        weight = stored.T if isinstance(module, Conv1D) else stored
        shape = (weight.shape[0], weight.shape[1])
        parts = quant_format(recipe.format).part_shapes(shape, recipe)
        empty = {k: torch.empty(s, dtype=d, device="meta") for k, (s, d) in parts.items()}
        packed = Packed(recipe=recipe, shape=shape, dtype=weight.dtype, parts=empty)
        model.set_submodule(name, shell(module, packed, weight.dtype))
    return names


def unpacked(layer: QuantLinear, dtype: torch.dtype) -> nn.Module:
    """The ordinary layer that a quantized one stands for, with its dequantized weight in `dtype`.

    A Conv1D where there was one: a model saved with [out, in] weights in its place would be read
    transposed, and silently so where they are square.
    """
    linear = layer.to_linear(dtype)
    if not layer.transposed_source:
        return linear
    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
    bias = linear.weight.new_zeros(layer.out_features) if linear.bias is None else linear.bias
    conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv.train(layer.training)


class _PackWeight(ConversionOps):
    """Packs one finished weight and replaces its linear layer."""

    def __init__(self, quantizer: DecalQuantizer):
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        recipe = self.quantizer.quantization_config.recipe
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = model.get_submodule(key.rpartition(".")[0])
            if weight.shape != module.weight.shape:
                self.quantizer.mismatched.append((key, weight.shape, module.weight.shape))
                continue
            logical = weight.T if isinstance(module, Conv1D) else weight
            try:
                packed = quant_format(recipe.format).quantize(logical, recipe)
            except QuantError as error:  # transformers would keep only the name of its class
                self.quantizer.refused.append((key, error))
                continue
            self.quantizer.place(model, key, packed, weight.dtype, missing_keys)
            self.quantizer.passed += weight.nbytes
            if self.quantizer.passed >= _TRIM_EVERY:
                self.quantizer.passed = 0
                give_back_freed()
        return {}


class _ReadStored(ConversionOps):
    """Makes a quantized layer of the tensors that bitsandbytes stored for one weight."""

    def __init__(self, quantizer: DecalQuantizer):
        self.hf_quantizer = quantizer  # the name by which transformers knows not to cast

    def __deepcopy__(self, _memo: dict[int, Any]) -> _ReadStored:
        """transformers copies a conversion per weight; what is found must reach one quantizer."""
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        own = {key: v[0] if isinstance(v, list) else v for key, v in input_dict.items()}
        if own.keys() == {"weight"}:
            return own
        name = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(name)
        try:
            if not _is_linear(module):
                raise QuantError(f"`{name}` is a {type(module).__name__}, not a linear layer")
            packed = from_bnb(name, {f"{name}.{key}": value for key, value in own.items()})
        except QuantError as error:
            self.hf_quantizer.refused.append((full_layer_name, error))
            return {}
        wanted = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
        if packed.shape != tuple(wanted):
            found = torch.Size(packed.shape)
            self.hf_quantizer.mismatched.append((full_layer_name, found, wanted))
            return {}
        self.hf_quantizer.stored.add(packed.recipe)
        self.hf_quantizer.place(model, full_layer_name, packed, module.weight.dtype, missing_keys)
        return {}


def _stored_endings() -> list[str]:
    """How the keys of one stored weight end, the plain `weight` last."""
    inside = ["nested_absmax", "nested_quant_map", "quant_map", "absmax"]
    states = [STATE + name for name, fmt in FORMATS.items() if fmt.blocks]
    return [*(f"weight.{key}" for key in inside + states), "SCB", "weight_format", "weight"]


@register_quantizer(METHOD)
class DecalQuantizer(HfQuantizer):
    """The hook object that `from_pretrained` drives."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.mismatched: list[tuple[str, torch.Size, torch.Size]] = []
        """(key, shape in the file, shape in the model): transformers does not compare these."""
        self.refused: list[tuple[str, QuantError]] = []
        """Weights that the format cannot hold, and why."""
        self.passed = 0
        """Bytes of weights packed since freed memory was last given back."""
        self.stored: set[Recipe] = set()
        """The recipes of the weights that were read as they were stored."""
        self._names: frozenset[str] = frozenset()
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        skip = self.quantization_config.skip_modules
        if self.pre_quantized:
            self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
            return
        refuse_fused(model, skip)
        self._names = frozenset(quantizable_modules(model, skip))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Casts what is stored beside quantized weights: transformers leaves it as it is there."""
        for name, parameter in model.named_parameters() if self._dtypes else ():
            wanted = self._dtypes.get(name, parameter.dtype)
            plain = parameter.is_floating_point() and not self._kept_in_float32(model, name)
            if plain and parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)
        return model

    def _kept_in_float32(self, model: nn.Module, name: str) -> bool:
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        return skipped(name, kept | set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()))

    def place(
        self,
        model: Any,
        key: str,
        packed: Packed,
        dtype: torch.dtype,
        missing_keys: set[str] | None,
    ) -> None:
        """Puts a quantized layer where the plain one of weight `key` stood, and counts it found."""
        name = key.rpartition(".")[0]
        layer = shell(model.get_submodule(name), packed, dtype)
        for loaded in (layer, *layer.parameters()):  # or transformers would fill them anew
            loaded._is_hf_initialized = True  # type: ignore[attr-defined]
        model.set_submodule(name, layer)
        if missing_keys is not None:
            missing_keys.discard(key)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        module, _dot, parameter = param_name.rpartition(".")
        return parameter == "weight" and module in self._names

    def get_quantize_ops(self) -> ConversionOps:
        return _PackWeight(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(_stored_endings(), "weight", operations=[_ReadStored(self)])]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
