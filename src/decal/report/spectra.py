"""The spectrum of an adapter for people: one row for each kind of module, its layers as a strip.

Takes the plain values of `decal.verbs.spectrum`; knows no adapters and no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decal.report.tables import BLOCKS

Learned = Mapping[str, Any]
"""What `decal.verbs.spectrum.spectrum` returns."""
WIDEST = 40
"""Characters of a strip; more layers are averaged into so many."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All modules of one kind: each number is the mean of a layer's modules, experts say."""

    name: str
    sizes: list[float | None]
    """Update over base weight, or the update's norm, by layer; None where a layer has none."""
    ranks: list[float | None]
    """Effective rank, by layer."""
    directions: tuple[int, int]
    """Those of 90 % and 99 % of the energy, in the module that needs most."""
    r: int
    """The largest."""


def relative(learned: Learned) -> bool:
    """Whether the sizes can be shown beside the base's weights: all of them, or none."""
    return bool(learned["modules"]) and all(
        module["relative"] is not None for module in learned["modules"]
    )


def layers(learned: Learned) -> list[int | None]:
    """The layers in order; None, what stands outside of them, last."""
    found = {module["layer"] for module in learned["modules"]}
    return [*sorted(layer for layer in found if layer is not None), *([None] * (None in found))]


def kinds(learned: Learned) -> list[Kind]:
    """One entry for each kind of module, in the model's order."""
    size = "relative" if relative(learned) else "norm"
    columns = layers(learned)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for module in learned["modules"]:
        groups.setdefault(module["kind"], []).append(module)
    return [
        Kind(
            name=name,
            sizes=_by_layer(group, size, columns),
            ranks=_by_layer(group, "effective_rank", columns),
            directions=(
                max(module["directions"][0] for module in group),
                max(module["directions"][1] for module in group),
            ),
            r=max(module["r"] for module in group),
        )
        for name, group in groups.items()
    ]


def largest(rows: Sequence[Kind]) -> float:
    """The largest size of all kinds and layers."""
    return max((v for row in rows for v in row.sizes if v is not None), default=0.0)


def _by_layer(
    group: Sequence[Mapping[str, Any]], field: str, columns: Sequence[int | None]
) -> list[float | None]:
    found: list[float | None] = []
    for layer in columns:
        values = [module[field] for module in group if module["layer"] == layer]
        found.append(sum(values) / len(values) if values else None)
    return found


def ranks_shown(count: int) -> list[int]:
    """1, 2, 4, ... and `count` itself."""
    powers = [1 << i for i in range(count.bit_length()) if 1 << i < count]
    return [*powers, count] if count else []


def sentence(learned: Learned) -> str:
    """What the spectrum says about the rank, in a sentence."""
    if not learned["kept"]:
        return "The adapter changes nothing: every update is zero."
    used, each, most = learned["rank"], learned["rank_everywhere"], _largest(learned)
    if used >= most:
        return f"All directions are in use: less than r={most} keeps less than 99 % of the energy."
    every = "in every module too" if each <= used else f"r={each} in every module"
    return f"r={used} would keep 99 % of the update's energy in all, {every}; it has r={most}."


def _largest(learned: Learned) -> int:
    return max((module["r"] for module in learned["modules"]), default=0)


def lines(learned: Learned) -> list[str]:
    """The spectrum as text, for a terminal."""
    modules = learned["modules"]
    kept = "   ".join(f"r={r} {percent(learned['kept'][r - 1])}" for r in
                      ranks_shown(len(learned["kept"])))  # fmt: skip
    head = (
        f"{learned['path']}: r={_largest(learned)}, lora_alpha={learned['lora_alpha']:g},"
        f" {len(modules)} modules, {learned['parameters']:,} parameters"
    )
    found = [
        head,
        sentence(learned),
        *([f"energy kept by one rank everywhere: {kept}"] * bool(kept)),
    ]
    if learned["base"]:
        found.append(f"norms stand alone, because {learned['base']}")
    found += ["", *_rows(learned), ""]
    found += [f"trained beside: {row['name']}, norm {row['norm']:.4g}" for row in learned["beside"]]
    return found[:-1] if not found[-1] else found


def _rows(learned: Learned) -> list[str]:
    rows = kinds(learned)
    size_top = largest(rows)
    title = "update / weight" if relative(learned) else "norm of the update"
    factor, unit = (100, " %") if relative(learned) else (1, "")
    digits = decimals(factor * size_top)

    def shown(value: float) -> str:
        return f"{factor * value:.{digits}f}{unit}"

    columns = layers(learned)
    cells = [("", title, "mean", "most", "effective rank", "mean", "90 %", "99 %", "of r")]
    cells += [
        (
            row.name,
            strip(row.sizes, size_top),
            shown(_mean(row.sizes)),
            shown(max(v for v in row.sizes if v is not None)),
            strip(row.ranks, row.r),
            f"{_mean(row.ranks):.1f}",
            str(row.directions[0]),
            str(row.directions[1]),
            str(row.r),
        )
        for row in rows
    ]
    wide = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    drawn = [
        "  ".join(f"{cell:{'<' if i in (0, 1, 4) else '>'}{wide[i]}}" for i, cell in
                  enumerate(row)).rstrip()
        for row in cells
    ]  # fmt: skip
    numbered = [layer for layer in columns if layer is not None]
    if numbered:
        drawn.append(f"strips: layers {numbered[0]} to {numbered[-1]}, from nothing to the most")
    return drawn


def strip(values: Sequence[float | None], top: float) -> str:
    """Values as blocks from 0 to `top`; a dot stands where there is none."""
    if len(values) > WIDEST:
        values = [_pool(values, i) for i in range(WIDEST)]
    scale = top or 1.0
    return "".join("·" if v is None else BLOCKS[min(7, round(v / scale * 7))] for v in values)


def _pool(values: Sequence[float | None], place: int) -> float | None:
    start, end = (i * len(values) // WIDEST for i in (place, place + 1))
    known = [v for v in values[start:end] if v is not None]
    return sum(known) / len(known) if known else None


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else 0.0


def decimals(top: float) -> int:
    """Digits after the point at which values up to `top` can be told apart and stay aligned."""
    return 1 if top >= 5 else 2 if top >= 0.5 else 3 if top >= 0.05 else 4


def percent(share: float) -> str:
    """`7.2 %`, with three digits; never 100 % of what is less."""
    value = 100 * share
    if 99.95 <= value < 100 and share < 1:
        return f"{min(value, 99.99):.2f} %"
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.3g} %"
