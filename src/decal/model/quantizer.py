"""decal as a transformers quantizer: `from_pretrained` loads, renames and fuses, we only pack.

transformers hands every finished tensor (renamed, fused, cast to the compute dtype) to
`_PackWeight.convert`. It packs the weight, puts a QuantLinear where the nn.Linear stood, and drops
the 16-bit tensor before the next one is read. Peak memory is the quantized model plus one
conversion group; loading is sequential for on-the-fly quantizers, so reader threads cannot run
ahead.

The skeleton keeps its plain linear layers until their weight arrives, so that transformers sees
the key names it expects (`<m>.weight`), whatever parts the format stores.

What stays 16-bit: the output head, tied embeddings, and everything that is not a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from decal.errors import QuantError
from decal.model.heads import in_head
from decal.model.heap import give_back_freed
from decal.quant import quant_format
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear

METHOD = "decal"
_TRIM_EVERY = 32 << 20


@register_quantization_config(METHOD)
class DecalQuantizationConfig(QuantizationConfigMixin):
    """The recipe as transformers passes it around.

    Args:
        format: registry name of the format.
        block_size: weights that share one scale.
        double: whether the scales are quantized too.
    """

    def __init__(self, format: str = "nf4", block_size: int = 64, double: bool = True, **_: Any):
        self.quant_method = METHOD
        self.format = format
        self.block_size = block_size
        self.double = double

    @property
    def recipe(self) -> Recipe:
        return Recipe(format=self.format, block_size=self.block_size, double=self.double)


def quantizable_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers that decal quantizes in `model`, in model order.

    The output head, tied weights and modules that the architecture keeps in float32 are left out,
    as transformers' own quantizers do. Works on meta skeletons.
    """
    skip = {k for k in get_keys_to_not_convert(model) if k}
    skip |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    names = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and not isinstance(module, QuantLinear):
            continue
        kept = any(name == s or name.endswith("." + s) or f".{s}." in f".{name}." for s in skip)
        if not kept and not in_head(model, name):
            names.append(name)
    return names


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
            name = key.rpartition(".")[0]
            wanted = model.get_submodule(name).weight.shape
            if weight.shape != wanted:
                self.quantizer.mismatched.append((key, weight.shape, wanted))
                continue
            try:
                codes = quant_format(recipe.format).quantize(weight, recipe)
            except QuantError as error:  # transformers would keep only the name of its class
                self.quantizer.refused.append((key, error))
                continue
            packed = QuantLinear(codes, model.get_submodule(name).bias, weight.dtype)
            for loaded in (packed, *packed.parameters()):  # or transformers would fill them anew
                loaded._is_hf_initialized = True  # type: ignore[attr-defined]
            packed.train(model.training)
            model.set_submodule(name, packed)
            if missing_keys is not None:
                missing_keys.discard(key)
            self.quantizer.passed += weight.nbytes
            if self.quantizer.passed >= _TRIM_EVERY:
                self.quantizer.passed = 0
                give_back_freed()
        return {}


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
        self._names: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self._names = frozenset(quantizable_modules(model))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        module, _dot, parameter = param_name.rpartition(".")
        return parameter == "weight" and module in self._names

    def get_quantize_ops(self) -> ConversionOps:
        return _PackWeight(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
