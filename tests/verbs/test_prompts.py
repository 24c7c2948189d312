"""Prompts from files: which lines and rows are prompts, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.errors import DataError
from decal.verbs.prompts import read_prompts
from decal.verbs.text import Chat


def rows(path: Path, *found: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    """Fails when blank lines, a mark of the byte order or outer spaces are kept."""
    file = tmp_path / "p.txt"
    file.write_text("\ufeffgrüße \n\n  two\n", encoding="utf-8")
    assert read_prompts(file) == ["grüße", "two"]


def test_rows(tmp_path: Path) -> None:
    """Fails when an answer at the end is asked for again, or tools are lost."""
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = rows(
        tmp_path / "p.jsonl",
        {"prompt": "plain", "completion": "x"},
        {"messages": [user, answer], "tools": tools},
        {"prompt": [user]},
        {"messages": [user, answer, user]},
    )
    plain, chat, asked, longer = read_prompts(file)
    assert plain == "plain"
    assert isinstance(chat, Chat)
    assert [m.role for m in chat.messages] == ["user"]
    assert chat.tools == tuple(tools)
    assert isinstance(asked, Chat)
    assert isinstance(longer, Chat)
    assert [m.role for m in longer.messages] == ["user", "assistant", "user"]


def test_rows_without_a_prompt_are_counted(tmp_path: Path) -> None:
    """Fails when the first bad row hides the others."""
    answer = {"role": "assistant", "content": "a"}
    file = rows(tmp_path / "p.jsonl", {"text": "x"}, {"prompt": "ok"}, {"messages": [answer]}, 3)
    with pytest.raises(DataError) as caught:
        read_prompts(file)
    assert caught.value.message.startswith("3 of 4 rows")
    assert caught.value.details == (
        "row 1: the row has text",
        "row 3: `messages` holds answers only",
        "row 4: the row is a number, not an object with columns",
    )


@pytest.mark.parametrize(("name", "text"), [("p.txt", "\n \n"), ("p.jsonl", "")])
def test_a_file_of_nothing(tmp_path: Path, name: str, text: str) -> None:
    """Fails when no prompts are taken for nothing to do."""
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(tmp_path / name)


def test_a_wrong_name(tmp_path: Path) -> None:
    """Fails when the neighbour that was meant is not named."""
    (tmp_path / "prompts.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "promts.txt")
    assert caught.value.hint == f"did you mean `{tmp_path / 'prompts.txt'}`?"
    with pytest.raises(DataError, match="is a folder"):
        read_prompts(tmp_path)
