"""What of a model quantization does not reach, how much that is, and when it is too much.

Formats hold matrices of linear layers. Embeddings, the output head and norms keep 16 bits, which is
expected and said where it is much. Experts that an architecture fuses into one parameter of three
dimensions are no linear layers: in a mixture of experts nearly all weights are there, and a "4-bit"
model would be a 16-bit one in all but name. That is refused.

Works on meta skeletons and on loaded models. Knows no format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from decal.errors import QuantError, nearest
from decal.model.survey import base_modules, base_name, expert_weights, parameter_counts
from decal.quant.linear import QuantLinear

MUCH = 0.05
"""Share of the parameters from which what stays 16-bit is said, or refused."""


def skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether a module's name, or that of a module around it, ends in one of `skip`."""
    return any(f".{entry}." in f".{name}." for entry in skip)


def check_skips(skip: Sequence[str], quantizable: Sequence[str], model: nn.Module) -> None:
    """Every entry of `quant.skip_modules` must name a layer that could be quantized.

    Raises:
        QuantError: entries that fit no linear layer and no experts, with the nearest name.
    """
    fused = [name for name, _ in _fused(model)]
    names = [*quantizable, *fused]
    lost = [entry for entry in skip if not any(skipped(name, [entry]) for name in names)]
    if lost:
        ends = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        near = nearest(lost[0].rpartition(".")[2], ends)
        raise QuantError(
            f"{len(lost)} of {len(skip)} names in quant.skip_modules fit no linear layer of "
            f"`{base_name(model)}`: `{lost[0]}`",
            hint=f"did you mean `{near}`?" if near else f"its layers are {', '.join(ends[:12])}",
        )


def _fused(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold the weights of several experts."""
    return [(name, module) for name, module in base_modules(model) if expert_weights(module)]


def refuse_fused(model: nn.Module, skip: Sequence[str] = ()) -> None:
    """Raises QuantError where more than `MUCH` of the parameters are fused experts.

    Experts that `skip` names were meant to keep 16 bits.
    """
    fused = [(n, m) for n, m in _fused(model) if not skipped(n, skip)]
    held = sum(p.numel() for _, m in fused for p in expert_weights(m).values())
    total = parameter_counts(model)[1]
    if held <= MUCH * total:
        return
    classes = Counter(type(module).__name__ for _, module in fused)
    what = ", ".join(f"{count} {cls}" for cls, count in classes.items())
    raise QuantError(
        f"`{base_name(model)}` cannot be quantized: {100 * held / total:.0f} % of its parameters "
        f"({held:,} of {total:,}) would stay 16-bit",
        details=[f"{what} hold their experts in one tensor, first `{fused[0][0]}`"],
        hint="use `quant: none`; or name the experts in quant.skip_modules to keep them 16-bit",
    )


def left_unquantized(model: nn.Module) -> list[str]:
    """Lines on what of a quantized model is not quantized, if that is more than `MUCH` of it.

    Empty for a model without quantized layers. Tied weights count once, adapters not at all.
    """
    modules = dict(base_modules(model))
    if not any(isinstance(module, QuantLinear) for module in modules.values()):
        return []
    counted: set[int] = set()
    held: dict[str, int] = {}
    total = 0
    for name, module in modules.items():
        if isinstance(module, QuantLinear):
            total += module.out_features * module.in_features
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted |= {id(p) for p in own}
        size = sum(p.numel() for p in own)
        total += size
        if size:
            held[name] = size
    left = sum(held.values())
    if left <= MUCH * total:
        return []
    largest = sorted(held.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(
        f"{name} {100 * size / total:.0f} %" for name, size in largest if size >= total / 100
    )
    return [f"not quantized: {100 * left / total:.0f} % of the parameters ({parts})"]
