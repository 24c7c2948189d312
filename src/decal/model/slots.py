"""What an adapter of some settings consists of on one model: every parameter it will hold.

    names     modules with low-rank factors
    biases    those of them whose bias is trained (bias: all | lora_only)
    whole     module -> its parameters that are held whole: all of a module in modules_to_save,
              the bias of any other module with bias: all

Nothing is changed here. Knows no tensors' values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from decal.adapters import Place
from decal.config import LoraConfig
from decal.errors import TargetError
from decal.model.survey import base_modules, is_packed, module_infos, notes_on_rest
from decal.model.targets import ModuleInfo, TargetRow, TargetTable, select, table


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The places of one adapter's parameters."""

    infos: Mapping[str, ModuleInfo]
    names: tuple[str, ...]
    biases: frozenset[str]
    whole: Mapping[str, Mapping[str, Place]]
    """Module -> name of a parameter inside it -> where that stands."""
    table: TargetTable

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name in the base model -> shape, of all that is held whole."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{n}.bias": ((self.infos[n].shape or (0, 0))[0],) for n in sorted(self.biases)
        }
        for module, places in self.whole.items():
            for inner, place in places.items():
                shapes[f"{module}.{inner}" if module else inner] = tuple(place.parameter.shape)
        return shapes


def slots_for(model: nn.Module, config: LoraConfig, *, new: bool) -> Slots:
    """Finds the places; `new` is False for the settings of a trained adapter.

    Raises:
        TargetError: a setting that matches nothing or cannot act on what it matches.
    """
    infos = module_infos(model)
    names, saved = select(infos, config, new=new)
    originals = dict(base_modules(model))
    _refuse_unreplaceable(originals, saved)
    _refuse_biased_embeddings(infos, names, config)
    whole = {module: _parameters_of(originals[module]) for module in saved}
    rows = _saved_rows(infos, whole)
    biases: set[str] = set()
    notes = notes_on_rest(model)
    if config.bias != "none":
        biases = {n for n in names if originals[n]._parameters.get("bias") is not None}
    if config.bias == "all":
        others = _other_biases(originals, names, saved)
        whole |= {module: {"bias": place} for module, place in others.items()}
        rows += _bias_row(others, [Place(originals[n], "bias") for n in biases])
    if config.bias != "none" and not biases and (config.bias == "lora_only" or not rows):
        which = "target modules" if config.bias == "lora_only" else "modules"
        notes.append(f"bias: {config.bias} trains nothing: the {which} have no biases")
    found = table(infos, names, config, whole=rows, biases=biases, notes=notes)
    return Slots(
        infos=infos, names=tuple(names), biases=frozenset(biases), whole=whole, table=found
    )


def _parameters_of(module: nn.Module) -> dict[str, Place]:
    return {
        f"{name}.{leaf}" if name else leaf: Place(inner, leaf)
        for name, inner in base_modules(module)
        for leaf, parameter in inner._parameters.items()
        if parameter is not None
    }


def _other_biases(
    originals: Mapping[str, nn.Module], names: list[str], saved: list[str]
) -> dict[str, Place]:
    """Every module's own bias outside the targets and what is trained whole anyway."""
    targets = set(names)
    inside = tuple(f"{module}." for module in saved)
    found = {}
    for name, module in originals.items():
        bias = module._parameters.get("bias")
        if bias is None or name in targets or name in saved or name.startswith(inside):
            continue
        if not bias.is_floating_point() or _never_called(module):
            raise TargetError(
                f"bias: all cannot train the bias of {name}, a {type(module).__name__}",
                hint="use bias: lora_only or none",
            )
        found[name] = Place(module, "bias")
    return found


def _never_called(module: nn.Module) -> bool:
    """Containers, and the projection whose weight nn.MultiheadAttention reads for itself."""
    silent = nn.modules.linear.NonDynamicallyQuantizableLinear
    return type(module).forward is nn.Module.forward or type(module) is silent


def _refuse_unreplaceable(originals: Mapping[str, nn.Module], saved: list[str]) -> None:
    problems = []
    for name in saved:
        module = originals[name]
        inner = [m for _, m in base_modules(module)]
        what = f"{name}, a {type(module).__name__},"
        if _never_called(module):
            problems.append(f"{what} is never called itself")
        elif any(map(is_packed, inner)) or any(
            not place.parameter.is_floating_point() for place in _parameters_of(module).values()
        ):
            problems.append(f"{what} is quantized")
        elif not _parameters_of(module):
            problems.append(f"{what} has no parameters")
        elif any(getattr(m, "running_mean", None) is not None for m in inner):
            problems.append(f"{what} keeps running statistics, which belong to the base")
    if problems:
        quantized = any(p.endswith("is quantized") for p in problems)
        raise TargetError(
            f"{len(problems)} of {len(saved)} modules_to_save cannot be trained whole",
            details=problems,
            hint="keep it 16-bit (quant.skip_modules), or adapt it (target_modules)"
            if quantized
            else None,
        )


def _refuse_biased_embeddings(
    infos: Mapping[str, ModuleInfo], names: list[str], config: LoraConfig
) -> None:
    embeddings = [name for name in names if infos[name].kind == "embedding"]
    if config.lora_bias and embeddings:
        raise TargetError(
            f"lora_bias cannot be trained on embeddings: {embeddings[0]}",
            hint="set lora_bias: false, or leave embeddings out of target_modules",
        )


def _saved_rows(
    infos: Mapping[str, ModuleInfo], whole: Mapping[str, Mapping[str, Place]]
) -> list[TargetRow]:
    kinds: dict[str, list[str]] = {}
    for module in whole:
        kinds.setdefault(module.rpartition(".")[2], []).append(module)
    rows = []
    for leaf, modules in kinds.items():
        shapes = [infos[m].shape for m in modules]
        rows.append(
            TargetRow(
                pattern=f"{leaf} (whole)",
                count=len(modules),
                shapes=tuple(dict.fromkeys(shape for shape in shapes if shape is not None)),
                parameters=sum(_numel(list(whole[m].values())) for m in modules),
            )
        )
    return rows


def _bias_row(others: Mapping[str, Place], counted: list[Place]) -> list[TargetRow]:
    if not others:
        return []
    extra = _numel([*counted, *others.values()]) - _numel(counted)
    return [TargetRow(pattern="other biases", count=len(others), shapes=(), parameters=extra)]


def _numel(places: list[Place]) -> int:
    """Numbers in the parameters; what is tied counts once."""
    return sum({id(p.parameter): p.parameter.numel() for p in places}.values())
