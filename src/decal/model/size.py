"""How much a model's weights weigh, as stored. Works on meta skeletons and quantized models."""

from __future__ import annotations

from torch import nn

from decal.model.survey import parameter_counts


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters as they are stored; buffers and codebooks apart."""
    return sum(p.nbytes for p in model.parameters())


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits per logical weight of the whole model, adapters included if attached."""
    _, total = parameter_counts(model)
    return 8 * weight_bytes(model) / total if total else 0.0
