"""What the tests of failures build: adapters of a known size, and how far a result is off.

The bench of failures builds its situations with these too, so that both speak of the same thing.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from decal import demo
from decal.config import LoraConfig, QuantConfig
from decal.model.adapter import Adapter
from decal.model.inject import adapted_layers, attach
from decal.model.state import full_state, lora_of
from decal.verbs.load import adapter_of, load_base

IDS = torch.arange(3, 67)[None]
LIGHT = 0.0125
"""Size of a light fine-tune's delta, relative to the weight's: both as root of summed squares."""


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model.eval()(ids).logits.float()
    return result


def off(found: Tensor, wanted: Tensor, bare: Tensor) -> float:
    """How far a result is from the one that is wanted, in units of the adapter's own effect.

    0 is right; 1 is as far off as no adapter at all.
    """
    return float((found - wanted).norm() / (wanted - bare).norm())


@torch.no_grad()
def draw(model: Any, name: str = "default", *, ratio: float | None = None, seed: int = 0) -> None:
    """Random values for everything that an adapter trains.

    With `ratio`, each layer's delta is this large relative to its weight.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        lora = lora_of(layer, name)
        for parameter in lora.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        if ratio is not None:
            parts = lora.low_rank()
            delta = parts.scale * parts.B @ parts.A
            lora.B *= ratio * layer.base.weight().float().norm() / delta.norm()
    for parameter in full_state(model, name).values():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def tuned(
    out: Path,
    base: str | Path | None = None,
    *,
    ratio: float | None = None,
    quant: str = "none",
    dtype: str = "float32",
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Writes an adapter as a training on this base leaves it, its facts recorded.

    Returns:
        Logits of base and adapter as in training, and of the base alone.
    """
    base = demo.base_path() if base is None else base
    model, _ = load_base(base, quant=QuantConfig(format=quant), dtype=dtype, device="cpu")
    bare = logits(model)
    attach(model, LoraConfig(**{"r": 8, "lora_alpha": 20, "lora_dropout": 0, **settings}))
    draw(model, ratio=ratio)
    adapter_of(model).save_pretrained(out)
    return logits(model), bare


def read(folder: Path) -> Adapter:
    return Adapter.from_pretrained(folder)


def with_fused_mlps(model: Any) -> Any:
    """The model with MLPs that read their projections' weights and call none, as fused kernels do.

    It computes what it did before.
    """
    for module in model.modules():
        if hasattr(module, "gate_proj"):
            module.forward = MethodType(_fused, module)
    return model


def _fused(mlp: Any, x: Tensor) -> Tensor:
    gate, up, down = (
        (layer.weight, layer.bias) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    hidden = mlp.act_fn(functional.linear(x, *gate)) * functional.linear(x, *up)
    return functional.linear(hidden, *down)
