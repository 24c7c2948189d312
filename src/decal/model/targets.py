"""Target modules: names in, names out.

Pure: knows no torch and no model, only what a caller says about each module (`ModuleInfo`).

The patterns mean what they mean in PEFT: a list entry is a whole name or the end of one after a
dot, a single string is a regular expression for the whole name, `all-linear` is every linear layer
except the output head. `attention` is ours: the linear layers inside attention modules. What is
taken out again, in this order: excluded modules, modules that are trained whole and all inside
them, and layers that layers_to_transform does not number.

Unlike in PEFT every pattern must match something, and must match only what can be adapted: one typo
among several names is an error, not a layer that silently stays frozen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from decal.config import LoraConfig, fits
from decal.errors import TargetError, nearest
from decal.markup import grid, join, tag

ALL_LINEAR = "all-linear"
ATTENTION = "attention"

_SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_GROUP = {name: group[0] for group in _SHARED_INPUT for name in group}


@dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """What resolution needs to know about one module."""

    kind: str
    """linear | embedding | experts | other: the first two can be adapted."""
    shape: tuple[int, int] | None
    """[out, in]; None for what is no layer."""
    cls: str
    """Class name, for messages."""
    is_head: bool = False
    """Whether this is the output head."""
    attention: bool = False
    """Whether it lies inside an attention module."""
    weights: tuple[str, ...] = ()
    """The parameters of experts, each of which holds all of them."""


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One line of the table: what one pattern, or one kind of layer, came to."""

    pattern: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    """Distinct [out, in], in order of appearance."""
    parameters: int
    """Trained parameters of these layers: r * (in + out) each, and their biases."""
    ranks: tuple[int, ...] = ()
    """Distinct ranks; none for what is trained whole."""


@dataclass(frozen=True, kw_only=True)
class TargetTable:
    """What an adapter's settings came to on one model."""

    names: tuple[str, ...]
    """The modules with low-rank factors."""
    rows: tuple[TargetRow, ...]
    r: int
    notes: tuple[str, ...] = ()
    """What was left out although it holds weights, in words."""

    @property
    def parameters(self) -> int:
        """Everything that is trained."""
        return sum(row.parameters for row in self.rows)

    def lines(self) -> list[str]:
        """The table as plain text, one line per row, columns aligned.

        Ranks have a column of their own where they differ.
        """
        cells = self._cells()
        wide = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(f"{c:{'<' if i in (0, 2) else '>'}{wide[i]}}" for i, c in enumerate(row))
            for row in cells
        ]
        return lines + [f"note: {note}" for note in self.notes]

    def _cells(self) -> list[tuple[str, ...]]:
        """Header, rows and total; ranks have a column only where they differ."""
        differ = any(row.ranks not in ((), (self.r,)) for row in self.rows)
        head = "parameters" if differ else f"parameters at r={self.r}"
        cells = [("target modules", "layers", "shape (out x in)", "r", head)]
        cells += [
            (
                row.pattern,
                f"{row.count:,}",
                ", ".join(f"{out} x {columns}" for out, columns in row.shapes),
                ", ".join(map(str, row.ranks)) or "whole",
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        total = sum(row.count for row in self.rows)
        cells.append(("total", f"{total:,}", "", "", f"{self.parameters:,}"))
        columns = [0, 1, 2, 3, 4] if differ else [0, 1, 2, 4]
        return [tuple(row[i] for i in columns) for row in cells]

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        header, *rows = self._cells()
        notes = (tag("div", f"note: {note}") for note in self.notes)
        return join((grid(header, rows), *notes))

    def __str__(self) -> str:
        return "\n".join(self.lines())


def select(
    modules: Mapping[str, ModuleInfo], config: LoraConfig, *, new: bool = True
) -> tuple[list[str], list[str]]:
    """(modules to adapt, modules to train whole) by a config's settings, in the model's order.

    `new` is False for the settings of a trained adapter: its tensors say what it reaches, and a
    setting that does nothing here (peft names two heads where a model has one) is none of the
    user's typos.

    Raises TargetError for a setting that matches nothing, or something it cannot act on.
    """
    saved = _saved(modules, config.modules_to_save, new)
    names = resolve(modules, config.target_modules, new=new)
    kept = _without_excluded(modules, names, config.exclude_modules, new)
    kept = [n for n in kept if not any(_contains(module, n) for module in saved)]
    kept = _in_layers(kept, config, new)
    if not kept:
        raise TargetError(
            f"none of {len(names)} target modules is left",
            details=["all are excluded, trained whole, or in layers that were not asked for"],
        )
    if new:
        _check_patterns(kept, config)
    return kept, saved


def resolve(
    modules: Mapping[str, ModuleInfo], target_modules: str | Sequence[str], *, new: bool = True
) -> list[str]:
    """Names of the modules that target_modules names, in the model's order.

    Raises TargetError for a pattern that matches nothing (of a trained adapter, where none matches
    anything), or something that is no layer.
    """
    if target_modules in (ALL_LINEAR, ATTENTION):
        return _shortcut(modules, str(target_modules))
    if not target_modules:
        raise TargetError("target_modules is empty", hint=f"`{ALL_LINEAR}` adapts every layer")
    patterns, found = _matches(modules, target_modules, "target_modules")
    _refuse_experts(modules, found)
    unmatched = [p for p in patterns if not found[p]]
    if new or len(unmatched) == len(patterns):
        _refuse_unmatched(modules, unmatched, of=patterns)
    _refuse_unadaptable(modules, found)
    chosen = {name for names in found.values() for name in names}
    return [name for name in modules if name in chosen]


def table(
    modules: Mapping[str, ModuleInfo],
    names: Sequence[str],
    config: LoraConfig,
    *,
    whole: Sequence[TargetRow] = (),
    biases: Collection[str] = (),
    notes: Sequence[str] = (),
) -> TargetTable:
    """The resolved names as a table: one row per list entry, else one per kind of layer.

    A layer that two list entries match is counted in the first one's row.

    Args:
        whole: rows for what is trained besides factors.
        biases: those of `names` whose bias is trained.
    """
    targets = config.target_modules
    groups: dict[str, list[str]] = {}
    for name in names:
        if isinstance(targets, str) or name in targets:
            label = name.rpartition(".")[2]
        else:
            label = next(t for t in targets if name.endswith("." + t))
        groups.setdefault(label, []).append(name)
    rows = []
    for label, members in groups.items():
        parameters = 0
        for name in members:
            out, columns = modules[name].shape or (0, 0)
            parameters += config.rank_of(name) * (out + columns)
            parameters += out * (config.lora_bias + (name in biases))
        rows.append(
            TargetRow(
                pattern=label,
                count=len(members),
                shapes=tuple(dict.fromkeys(modules[m].shape or (0, 0) for m in members)),
                parameters=parameters,
                ranks=tuple(dict.fromkeys(config.rank_of(m) for m in members)),
            )
        )
    return TargetTable(names=tuple(names), rows=(*rows, *whole), r=config.r, notes=tuple(notes))


def input_group(name: str) -> str:
    """A name for the layer's input: projections that read the same tensor get the same one.

    By convention of names within one parent (q, k and v; gate and up); a layer of no known group
    is a group of its own.
    """
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}{_GROUP.get(leaf, leaf)}"


def _saved(
    modules: Mapping[str, ModuleInfo], modules_to_save: Sequence[str], new: bool
) -> list[str]:
    """The modules to train whole; those inside others are part of these."""
    found = _by_ending(modules, modules_to_save)
    unmatched = [pattern for pattern in modules_to_save if not found[pattern]]
    if unmatched and (new or len(unmatched) == len(modules_to_save)):
        raise TargetError(
            f"{len(unmatched)} of {len(modules_to_save)} modules_to_save match no module",
            details=[_advice(modules, pattern) for pattern in unmatched],
        )
    chosen = {name for names in found.values() for name in names}
    inner = {n for n in chosen if any(n.startswith(f"{outer}.") for outer in chosen)}
    return [name for name in modules if name in chosen - inner]


def _contains(module: str, name: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _without_excluded(
    modules: Mapping[str, ModuleInfo],
    names: Sequence[str],
    exclude: str | Sequence[str] | None,
    new: bool,
) -> list[str]:
    if not exclude:
        return list(names)
    patterns, found = _matches(modules, exclude, "exclude_modules")
    useless = [p for p in patterns if not _excludes(modules, names, found[p])] if new else []
    if useless:
        details = [
            f"`{pattern}`: {found[pattern][0]} is a {modules[found[pattern][0]].cls}, no target"
            if found[pattern]
            else _advice(modules, pattern)
            for pattern in useless
        ]
        raise TargetError(
            f"{len(useless)} of {len(patterns)} exclude_modules exclude nothing",
            details=details,
            hint="name layers by their endings; a block is excluded by an expression such as"
            r" `.*\.self_attn\..*`",
        )
    gone = {name for excluded in found.values() for name in excluded}
    return [name for name in names if name not in gone]


def _excludes(
    modules: Mapping[str, ModuleInfo], names: Sequence[str], found: Sequence[str]
) -> bool:
    """Whether a pattern takes a target away, or names a layer that could have been one."""
    return any(name in names or modules[name].kind != "other" for name in found)


def _in_layers(names: Sequence[str], config: LoraConfig, new: bool) -> list[str]:
    """The names in the layers that layers_to_transform numbers.

    The number is the first one in the name, after the list that layers_pattern names, or after any
    list: an expert's number comes later.
    """
    numbers, patterns = config.layers_to_transform, config.layers_pattern
    wanted = (numbers,) if isinstance(numbers, int) else tuple(numbers or ())
    if not wanted:
        if patterns:
            raise TargetError("layers_pattern is set, but layers_to_transform is not")
        return list(names)
    if isinstance(config.target_modules, str) and config.target_modules not in (
        ALL_LINEAR,
        ATTENTION,
    ):
        raise TargetError(
            "layers_to_transform cannot be used with an expression in target_modules",
            hint="put the layers into the expression, or name the modules in a list",
        )
    lists = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in lists] or [r".*?\.[^.]*\.(\d+)\."]
    numbered = {name: _layer(name, expressions) for name in names}
    there = sorted({n for n in numbered.values() if n is not None})
    missing = [n for n in wanted if n not in there] if new else []
    if missing:
        raise TargetError(
            f"{len(missing)} of {len(wanted)} layers_to_transform are not there: {missing[0]}",
            details=[f"target modules are in layers {there[0]} to {there[-1]}" if there else
                     "no target module is in a numbered layer"],
            hint="layers_pattern names the list of layers" if not there else None,
        )  # fmt: skip
    return [name for name in names if numbered[name] in wanted]


def _layer(name: str, expressions: Sequence[str]) -> int | None:
    for expression in expressions:
        match = re.match(expression, name)
        if match is not None:
            return int(match[1])
    return None


def _check_patterns(names: Sequence[str], config: LoraConfig) -> None:
    """Every key of rank_pattern and alpha_pattern must fit a target module."""
    unused = []
    for field in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, field))
        unused += [(field, key) for key in keys if not any(fits(key, name) for name in names)]
    if unused:
        leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        details = []
        for field, key in unused:
            close = nearest(key.rpartition(".")[2], leaves) or nearest(key, names)
            details.append(f"{field} `{key}`" + (f": did you mean `{close}`?" if close else ""))
        raise TargetError(
            f"{len(unused)} keys of rank_pattern and alpha_pattern match no target module",
            details=details,
            hint=f"target modules: {', '.join(leaves[:12])}",
        )


def _shortcut(modules: Mapping[str, ModuleInfo], word: str) -> list[str]:
    names = [
        name
        for name, info in modules.items()
        if info.kind == "linear" and not info.is_head and (word == ALL_LINEAR or info.attention)
    ]
    if not names:
        what = "linear layer" if word == ALL_LINEAR else "linear layer inside an attention module"
        raise TargetError(f"target_modules `{word}` matches nothing: the model has no {what}")
    return names


def _matches(
    modules: Mapping[str, ModuleInfo], given: str | Sequence[str], field: str
) -> tuple[list[str], dict[str, list[str]]]:
    """(patterns, pattern -> names): one expression for whole names, or a list of endings."""
    if not isinstance(given, str):
        patterns = list(dict.fromkeys(given))
        return patterns, _by_ending(modules, patterns)
    try:
        compiled = re.compile(given)
    except re.error as error:
        raise TargetError(f"{field} `{given}` is no regular expression: {error}") from None
    return [given], {given: [name for name in modules if name and compiled.fullmatch(name)]}


def _by_ending(modules: Mapping[str, ModuleInfo], patterns: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> names, in one pass over names and their endings."""
    found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for name in modules:
        ending = name
        while ending:
            if ending in found:
                found[ending].append(name)
            ending = ending.partition(".")[2]
    return found


def _refuse_experts(modules: Mapping[str, ModuleInfo], found: Mapping[str, Sequence[str]]) -> None:
    """Experts share one parameter of three dimensions, whatever their files are called."""
    experts = {name: info for name, info in modules.items() if info.kind == "experts"}
    wrong = {}
    for pattern, names in found.items():
        named = [n for n in names if n in experts] or [
            n for n, info in experts.items() if not names and _names_experts(pattern, n, info)
        ]
        if named:
            wrong[pattern] = named[0]
    if not wrong:
        return
    kept = [n for p, names in found.items() if p not in wrong for n in names]
    rest = (
        f"{len(kept)} layers are left: {', '.join(_endings(kept))}" if kept else "nothing is left"
    )
    pattern, name = next(iter(wrong.items()))
    raise TargetError(
        f"{len(wrong)} of {len(found)} target_modules name experts, which LoRA does not adapt",
        details=[
            f"`{pattern}` means {name}, {experts[name].cls}, whose weights are"
            f" {' and '.join(experts[name].weights)} of all experts at once"
        ],
        hint=f"without them {rest}; `{ALL_LINEAR}` adapts all that is linear around the experts",
    )


def _names_experts(pattern: str, name: str, info: ModuleInfo) -> bool:
    """Whether a pattern that matches no module means these experts, as code or files name them.

    `experts.down_proj`, `experts.3.up_proj`, or `gate_proj`, which became part of `gate_up_proj`.
    """
    around, _, leaf = pattern.rpartition(".")
    words = set(leaf.split("_"))
    if not any(words <= set(weight.split("_")) for weight in info.weights):
        return False
    around = re.sub(r"\.?(\d+|\*)$", "", around)
    return not around or f".{name}".endswith(f".{around}")


def _endings(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _refuse_unmatched(
    modules: Mapping[str, ModuleInfo], unmatched: Sequence[str], of: Sequence[str]
) -> None:
    if not unmatched:
        return
    leaves = _layer_names(modules)
    details = []
    for pattern in unmatched:
        close = nearest(pattern.rpartition(".")[2], [*leaves, ALL_LINEAR, ATTENTION])
        if pattern in (ALL_LINEAR, ATTENTION):
            advice = "stands alone, not in a list"
        elif pattern in leaves:
            advice = f"is read as a regular expression for the whole name; write [{pattern}]"
        else:
            advice = f"did you mean `{close}`?" if close else "nothing has a name like it"
        details.append(f"`{pattern}`: {advice}")
    raise TargetError(
        f"{len(unmatched)} of {len(of)} target_modules match no module",
        details=details,
        hint=f"linear layers of this model: {', '.join(leaves) or 'none'}",
    )


def _layer_names(modules: Mapping[str, ModuleInfo]) -> list[str]:
    return _endings([n for n, info in modules.items() if info.kind == "linear"])


def _advice(modules: Mapping[str, ModuleInfo], pattern: str) -> str:
    leaves = _endings([n for n in modules if n])
    if pattern in leaves:
        return f"`{pattern}`: is read as a regular expression for the whole name; write [{pattern}]"
    close = nearest(pattern.rpartition(".")[2], leaves)
    return f"`{pattern}`: " + (f"did you mean `{close}`?" if close else "nothing is called like it")


def _refuse_unadaptable(
    modules: Mapping[str, ModuleInfo], found: Mapping[str, Sequence[str]]
) -> None:
    wrong = [
        (pattern, name)
        for pattern, names in found.items()
        for name in names
        if modules[name].kind not in ("linear", "embedding")
    ]
    if not wrong:
        return
    pattern, name = wrong[0]
    more = f"  (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise TargetError(
        f"target_modules match {len(wrong)} modules that are no linear layers or embeddings",
        details=[f"`{pattern}` matches {name}, which is a {modules[name].cls}{more}"],
        hint="LoRA adapts linear layers and embeddings; name them by their endings, for example"
        " q_proj",
    )
