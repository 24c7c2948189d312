"""Heat maps of adapters as tables: kinds of modules down, layers across, the colour by size.

A table scrolls inside its box where layers are many, its numbers can be read and copied, and it
takes the page's colours. Numbers are shown where they have room; each cell names itself when it is
pointed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from decal.markup import Child, Markup, tag
from decal.report.html import table
from decal.report.spectra import (
    Kind,
    Learned,
    decimals,
    kinds,
    largest,
    layers,
    percent,
    relative,
    sentence,
)

ROOM = 8
"""Layers up to which cells hold their numbers."""
FULL = 0.55
"""Opacity of the largest value: text stays readable on it in both schemes."""


def spectra_table(learned: Mapping[str, Learned]) -> Markup:
    """The adapters one below the other, a few numbers of each."""
    rows: list[Sequence[Child]] = []
    for name, one in learned.items():
        modules = one["modules"]
        ranks = [module["effective_rank"] for module in modules]
        sizes = [module["relative"] for module in modules]
        rows.append(
            (
                name,
                str(max((module["r"] for module in modules), default=0)),
                f"{sum(ranks) / max(len(ranks), 1):.1f}",
                percent(sum(sizes) / len(sizes)) if relative(one) else "–",
                str(max((module["directions"][0] for module in modules), default=0)),
                str(one["rank_everywhere"]),
                str(one["rank"]),
            )
        )
    # Non-breaking: a number is not parted from its sign.
    header = ("", "r", "effective rank", "update / weight", "90\u00a0% in", "99\u00a0% in",
              "one r for 99\u00a0%")  # fmt: skip
    return table(header, rows)


def heat_maps(
    name: str, learned: Learned, *, beside: Child = None, folded: bool = False, opened: bool = True
) -> Markup:
    """The heat maps of one adapter, after what stands `beside` them.

    Args:
        folded: into a line with the adapter's name that opens; `opened` says whether it is open.
    """
    rows, columns = kinds(learned), layers(learned)
    share = relative(learned)
    top = largest(rows)
    factor = 100 if share else 1
    digits = decimals(factor * top)

    def shown(value: float) -> str:
        return f"{factor * value:.{digits}f}"

    title = "Update over base weight, in %" if share else "Norm of the update"
    sizes = _heat(rows, columns, lambda row: row.sizes, top, shown)
    ranks = _heat(
        rows,
        columns,
        lambda row: row.ranks,
        max((row.r for row in rows), default=1),
        "{:.1f}".format,
        last=True,
    )
    why = f"Norms stand alone, because {learned['base']}." if learned["base"] else None
    body = (
        tag("p", sentence(learned), class_="say"),
        why and tag("p", why, class_="note"),
        _arranged(
            beside,
            (tag("h3", title), sizes),
            (tag("h3", "Effective rank"), ranks),
            wide=len(columns) > ROOM,
        ),
        *_beside(learned),
    )
    if not folded:
        return tag("div", *body)
    return tag("details", tag("summary", name), *body, open="" if opened else None)


def _arranged(
    beside: Child, first: Sequence[Markup], second: Sequence[Markup], *, wide: bool
) -> Markup:
    """Two maps in one column beside a figure or beside each other; one below the other if wide."""
    maps = (tag("div", *first), tag("div", *second))
    if wide:
        return tag("div", beside, *maps)
    columns = (tag("div", beside), tag("div", *first, *second)) if beside else maps
    return tag("div", *columns, class_="figures")


def _heat(
    rows: Sequence[Kind],
    columns: Sequence[int | None],
    values: Callable[[Kind], Sequence[float | None]],
    top: float,
    shown: Callable[[float], str],
    *,
    last: bool = False,
) -> Markup:
    numbers = len(columns) <= ROOM
    head = tag(
        "tr",
        tag("th", "layer"),
        *(tag("th", _layer(layer) if numbers or i % 4 == 0 else "", class_="m")
          for i, layer in enumerate(columns)),
        tag("th", "99 % in", class_="n") if last else tag("th", "mean", class_="n"),
    )  # fmt: skip
    body = [
        tag(
            "tr",
            tag("th", row.name, scope="row"),
            *(
                _cell(value, top, shown, numbers, f"{row.name}, layer {_layer(layer)}")
                for value, layer in zip(values(row), columns, strict=True)
            ),
            tag("td", f"{row.directions[1]} of {row.r}" if last else shown(_mean(values(row))),
                class_="n"),
        )
        for row in rows
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)),
               class_="scroll heat few" if numbers else "scroll heat", tabindex="0")  # fmt: skip


def _cell(
    value: float | None, top: float, shown: Callable[[float], str], numbers: bool, where: str
) -> Markup:
    if value is None:
        return tag("td", "", class_="c")
    share = value / top if top else 0.0
    fill = tag("i", style=f"opacity:{FULL * share:.3f}")
    label = tag("span", shown(value)) if numbers else None
    return tag("td", fill, label, class_="c", title=f"{where}: {shown(value)}")


def _layer(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else 0.0


def _beside(learned: Learned) -> list[Markup]:
    rows = [(row["name"], f"{row['norm']:.4g}") for row in learned["beside"]]
    if not rows:
        return []
    return [tag("h3", "Trained beside the factors"), table(("", "norm"), rows)]
