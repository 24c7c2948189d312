"""Columns made from others by templates: `data.columns`. Knows neither layouts nor files.

A template is text with the names of columns in braces: `Sort this: {text}`. Doubled braces are
braces. Numbers become text. A template that is nothing but one column hands its value on as it is,
so a list of messages can be renamed too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from decal.data.problems import RowError, columns_text
from decal.errors import DataError, nearest

PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class Columns:
    """The templates of `data.columns`.

    Raises:
        DataError: a brace that neither names a column nor is doubled.
    """

    def __init__(self, templates: Mapping[str, str]):
        self._parts = {target: _parts(target, text) for target, text in templates.items()}
        self._checked = False

    @property
    def made(self) -> frozenset[str]:
        """The columns that are made."""
        return frozenset(self._parts)

    @property
    def used(self) -> frozenset[str]:
        """The columns that templates name."""
        return frozenset(name for parts in self._parts.values() for _, name in parts if name)

    def apply(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with the made columns beside, or in place of, its own.

        Raises:
            DataError: the first row lacks a column that a template names.
            RowError: a later row lacks one, or has null or a list where text is made.
        """
        if not self._parts:
            return row
        if not self._checked:
            self._require(row)
            self._checked = True
        return {**row, **{target: _fill(parts, row) for target, parts in self._parts.items()}}

    def _require(self, row: Mapping[str, Any]) -> None:
        for target, parts in self._parts.items():
            for _, name in parts:
                if name and name not in row:
                    near = nearest(name, list(row))
                    found = columns_text(row) or "none"
                    raise DataError(
                        f"`data.columns.{target}` names the column `{name}`, which the data does "
                        "not have",
                        details=[f"the first row has {found}"],
                        hint=f"did you mean `{{{near}}}`?" if near else None,
                    )


def _parts(target: str, template: str) -> list[tuple[str, str | None]]:
    """(text, column behind it or None), in order."""
    parts: list[tuple[str, str | None]] = []
    text, end = "", 0
    for found in PART.finditer(template):
        text += template[end : found.start()]
        end = found.end()
        if found[0] in ("{{", "}}"):
            text += found[0][0]
        elif found[1]:
            parts.append((text, found[1].strip()))
            text = ""
        else:
            raise DataError(
                f"`data.columns.{target}` has a single `{found[0]}` at character "
                f"{found.start() + 1} of {template!r}",
                hint="a column is named {like_this}; braces themselves are written {{ and }}",
            )
    return [*parts, (text + template[end:], None)]


def _fill(parts: list[tuple[str, str | None]], row: Mapping[str, Any]) -> object:
    if len(parts) == 2 and parts[0][0] == parts[1][0] == "" and parts[0][1]:
        value = _value(parts[0][1], row)
        return value if isinstance(value, list | Mapping) else _as_text(parts[0][1], value)
    return "".join(
        text + (_as_text(name, _value(name, row)) if name else "") for text, name in parts
    )


def _value(name: str, row: Mapping[str, Any]) -> object:
    if row.get(name) is None:
        what = "is null" if name in row else "is missing"
        raise RowError(f"no `{name}`", f"`{name}` {what}, and `data.columns` uses it")
    return row[name]


def _as_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    kind = "a list" if isinstance(value, list) else "an object"
    raise RowError(
        f"wrong type of `{name}`",
        f"`{name}` is {kind}, and `data.columns` puts it into text",
        hint="only text and numbers can stand in a template with other text",
    )
