"""Which learning rate each parameter has, as a factor of the run's: names in, numbers out.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): with one rate for both, A and B of a wide layer cannot
both learn at the speed they should; B's should be larger, by a ratio of about 16. It acts on every
B and on B's own bias, as in PEFT; biases of the base and modules trained whole have the run's rate.

`lr_pattern` gives factors to modules in the form of PEFT's patterns: the first one that fits the
end of a module's name counts. Where a pattern and the ratio both apply, they multiply.

Knows parameter names as a model with adapters has them, and no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from decal.config import by_pattern, fits
from decal.errors import ConfigError, nearest

__all__ = ["learning_rates", "module_of"]

_WRAPPING = re.compile(r"\.adapters\.[^.]+(?=\.)|\.base_layer(?=\.)")
"""What wrappers put into a name: `q_proj.adapters.default.A`, `q_proj.base_layer.bias`."""
_OF_B = re.compile(r".*\.adapters\.[^.]+\.(B|B_bias)")


def learning_rates(
    names: Iterable[str], *, ratio: float, patterns: Mapping[str, float]
) -> dict[str, float]:
    """Parameter name -> factor on the learning rate; parameters whose factor is 1 are left out.

    Args:
        names: all parameters that are trained.
        ratio: B's rate over A's, `train.loraplus_lr_ratio`.
        patterns: regular expression for the end of a module's name -> factor, `train.lr_pattern`.

    Raises:
        ConfigError: a pattern fits no module that is trained, or there is a ratio and no B.
    """
    modules = {name: module_of(name) for name in names}
    _check_patterns(patterns, sorted(set(modules.values())))
    of_B = {name for name in modules if _OF_B.fullmatch(name)}
    if ratio != 1.0 and not of_B:
        raise ConfigError(
            f"`train.loraplus_lr_ratio` is {ratio:g}, but no LoRA is trained: there is no B",
            hint="leave `train.loraplus_lr_ratio` out",
        )
    rates = {}
    for name, module in modules.items():
        own = by_pattern(patterns, module, 1.0)
        rate = own * (ratio if name in of_B else 1.0)
        if rate != 1.0:
            rates[name] = rate
    return rates


def module_of(parameter: str) -> str:
    """The module of the base that a parameter belongs to, by the base's own name."""
    return _WRAPPING.sub("", parameter).rpartition(".")[0]


def _check_patterns(patterns: Mapping[str, float], modules: list[str]) -> None:
    idle = [p for p in patterns if not any(fits(p, module) for module in modules)]
    if not idle:
        return
    first = idle[0]
    parts = first.count(".") + 1
    ends = sorted({".".join(module.split(".")[-parts:]) for module in modules})
    close = nearest(first, ends)
    raise ConfigError(
        f"{len(idle)} of {len(patterns)} patterns in `train.lr_pattern` fit no trained module",
        details=[f"{first}" + (f": the nearest is {close}" if close else "")],
        hint=None if close else f"trained modules end in {', '.join(ends[:8])}",
    )
