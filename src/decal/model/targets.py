"""Target modules: names in, names out.

Pure: knows no torch and no model, only what a caller says about each module (`ModuleInfo`).

The patterns mean what they mean in PEFT: a list entry is a whole name or the end of one after a
dot, a single string is a regular expression for the whole name, `all-linear` is every linear layer
except the output head. `attention` is ours: the linear layers inside attention modules. Unlike in
PEFT every pattern must match something, and must match only what can be adapted: one typo among
several names is an error, not a layer that silently stays frozen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from decal.errors import TargetError, nearest

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
    """linear | embedding | other: only linear layers can be adapted."""
    shape: tuple[int, int] | None
    """[out, in]; None for what is no layer."""
    cls: str
    """Class name, for messages."""
    is_head: bool = False
    """Whether this is the output head."""
    attention: bool = False
    """Whether it lies inside an attention module."""


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One line of the table: what one pattern, or one kind of layer, came to."""

    pattern: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    """Distinct [out, in], in order of appearance."""
    parameters: int
    """Adapter parameters of these layers: r * (in + out) each."""


@dataclass(frozen=True, kw_only=True)
class TargetTable:
    """What `target_modules` came to on one model."""

    names: tuple[str, ...]
    rows: tuple[TargetRow, ...]
    r: int
    notes: tuple[str, ...] = ()
    """What was left out although it holds weights, in words."""

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    def lines(self) -> list[str]:
        """The table as plain text, one line per row, columns aligned."""
        cells = [("target modules", "layers", "shape (out x in)", f"parameters at r={self.r}")]
        cells += [
            (
                row.pattern,
                f"{row.count:,}",
                ", ".join(f"{out} x {columns}" for out, columns in row.shapes),
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        cells.append(("total", f"{len(self.names):,}", "", f"{self.parameters:,}"))
        wide = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [
            f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:<{wide[2]}}  {d:>{wide[3]}}"
            for a, b, c, d in cells
        ]
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def resolve(modules: Mapping[str, ModuleInfo], target_modules: str | Sequence[str]) -> list[str]:
    """Names of the modules to adapt, in the model's order.

    Raises TargetError for a pattern that matches nothing, or something that is no linear layer.
    """
    if target_modules in (ALL_LINEAR, ATTENTION):
        return _shortcut(modules, str(target_modules))
    if not target_modules:
        raise TargetError("target_modules is empty", hint=f"`{ALL_LINEAR}` adapts every layer")
    if isinstance(target_modules, str):
        patterns = [target_modules]
        found = {target_modules: _by_expression(modules, target_modules)}
    else:
        patterns = list(dict.fromkeys(target_modules))
        found = _by_ending(modules, patterns)
    _refuse_unmatched(modules, [p for p in patterns if not found[p]], of=patterns)
    _refuse_unadaptable(modules, found)
    chosen = {name for names in found.values() for name in names}
    return [name for name in modules if name in chosen]


def table(
    modules: Mapping[str, ModuleInfo],
    names: Sequence[str],
    target_modules: str | Sequence[str],
    r: int,
    notes: Sequence[str] = (),
) -> TargetTable:
    """The resolved names as a table: one row per list entry, else one per kind of layer.

    A layer that two list entries match is counted in the first one's row.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if isinstance(target_modules, str) or name in target_modules:
            label = name.rpartition(".")[2]
        else:
            label = next(t for t in target_modules if name.endswith("." + t))
        groups.setdefault(label, []).append(name)
    rows = []
    for label, members in groups.items():
        shapes = [modules[m].shape or (0, 0) for m in members]
        rows.append(
            TargetRow(
                pattern=label,
                count=len(members),
                shapes=tuple(dict.fromkeys(shapes)),
                parameters=sum(r * (out + columns) for out, columns in shapes),
            )
        )
    return TargetTable(names=tuple(names), rows=tuple(rows), r=r, notes=tuple(notes))


def input_group(name: str) -> str:
    """A name for the layer's input: projections that read the same tensor get the same one.

    By convention of names within one parent (q, k and v; gate and up); a layer of no known group
    is a group of its own.
    """
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}{_GROUP.get(leaf, leaf)}"


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


def _by_expression(modules: Mapping[str, ModuleInfo], expression: str) -> list[str]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise TargetError(
            f"target_modules `{expression}` is no regular expression: {error}"
        ) from None
    return [name for name in modules if name and compiled.fullmatch(name)]


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


def _refuse_unmatched(
    modules: Mapping[str, ModuleInfo], unmatched: Sequence[str], of: Sequence[str]
) -> None:
    if not unmatched:
        return
    leaves = list(
        dict.fromkeys(n.rpartition(".")[2] for n, info in modules.items() if info.kind == "linear")
    )
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


def _refuse_unadaptable(
    modules: Mapping[str, ModuleInfo], found: Mapping[str, Sequence[str]]
) -> None:
    wrong = [
        (pattern, name)
        for pattern, names in found.items()
        for name in names
        if modules[name].kind != "linear"
    ]
    if not wrong:
        return
    pattern, name = wrong[0]
    more = f"  (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise TargetError(
        f"target_modules match {len(wrong)} modules that are no linear layers",
        details=[f"`{pattern}` matches {name}, which is a {modules[name].cls}{more}"],
        hint="LoRA adapts linear layers; name them by their endings, for example q_proj",
    )
