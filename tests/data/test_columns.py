"""Columns made by templates."""

from __future__ import annotations

import pytest

from decal.data.columns import Columns
from decal.data.problems import RowError
from decal.errors import DataError


def test_templates() -> None:
    """Mutations: format with str.format (`a.b` would be an attribute); keep doubled braces."""
    columns = Columns({"prompt": "Sort {{x}}: {a.b} ({n}, {ok})", "completion": "{a.b}"})
    made = columns.apply({"a.b": "{y}", "n": 3, "ok": True})
    assert made["prompt"] == "Sort {x}: {y} (3, true)"
    assert made["completion"] == "{y}"
    assert made["n"] == 3
    assert columns.made == {"prompt", "completion"}
    assert columns.used == {"a.b", "n", "ok"}


def test_a_column_alone_is_handed_on() -> None:
    chat = [{"role": "user"}]
    assert Columns({"messages": "{chat}"}).apply({"chat": chat})["messages"] is chat
    assert Columns({"label": "{n}"}).apply({"n": 4})["label"] == "4"


def test_unknown_column_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"`data.columns.text` names the column `sentense`") as e:
        Columns({"text": "{sentense}"}).apply({"sentence": "a"})
    assert e.value.hint == "did you mean `{sentence}`?"


def test_null_and_lists_are_row_errors() -> None:
    """Mutation: write `None` into the text."""
    columns = Columns({"text": "a {b}"})
    columns.apply({"b": "x"})
    with pytest.raises(RowError, match="`b` is null"):
        columns.apply({"b": None})
    with pytest.raises(RowError, match="`b` is missing"):
        columns.apply({})
    with pytest.raises(RowError, match="`b` is a list"):
        columns.apply({"b": ["x"]})


@pytest.mark.parametrize(("text", "place"), [("a } b", 3), ("{", 1), ("{}", 1), ("{{{", 3)])
def test_single_braces(text: str, place: int) -> None:
    with pytest.raises(DataError, match=f"at character {place} of"):
        Columns({"text": text})
