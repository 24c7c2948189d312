"""Prompts from a file: a line of text each, or rows with `messages` or `prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path

from decal.data.messages import kind, parse_messages, parse_tools
from decal.data.problems import Problems, RowError
from decal.data.readers import read_file, suffix_of
from decal.errors import DataError, nearest_file
from decal.verbs.text import Chat, Prompt

_TEXT = (".txt", ".md", "")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts in a file.

    A .txt file (or one without a suffix) has one prompt a line. Rows of any other file that decal
    reads have a column `prompt`, or `messages`, of which answers at the end are left out.

    Raises:
        DataError: no such file, no prompts, or rows that hold none; all of them in one error.
    """
    file = Path(expanduser(path))
    if not file.is_file():
        siblings = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
        near = nearest_file(file.name, siblings)
        what = "is a folder" if file.is_dir() else "does not exist"
        hint = f"did you mean `{file.with_name(near)}`?" if near and file.name != near else None
        raise DataError(f"the prompts file `{path}` {what}", hint=hint)
    prompts = _lines(file) if suffix_of(file) in _TEXT else _rows(file)
    if not prompts:
        raise DataError(f"`{path}` holds no prompts", hint="write one prompt a line")
    return prompts


def _lines(file: Path) -> list[Prompt]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"`{file}` is not UTF-8 text", hint="save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"`{file}` cannot be read: {error.strerror or error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _rows(file: Path) -> list[Prompt]:
    problems = Problems(str(file))
    prompts: list[Prompt] = []
    total = 0
    for number, row in read_file(file):
        total += 1
        try:
            if isinstance(row, RowError):
                raise row
            prompts.append(_prompt(row))
        except RowError as problem:
            problems.add(number, problem)
    if error := problems.error(total):
        raise error
    return prompts


def _prompt(row: object) -> Prompt:
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {kind(row)}, not an object with columns")
    turns = row.get("messages")
    prompt = row.get("prompt") if turns is None else None
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    column = "messages" if prompt is None else "prompt"
    turns = turns if prompt is None else prompt
    if turns is None or isinstance(turns, str):
        raise RowError(
            "no `prompt` and no `messages`", f"the row has {', '.join(row) or 'nothing'}"
        )
    messages = parse_messages(turns, column, set())
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError(f"no question in `{column}`", f"`{column}` holds answers only")
    return Chat(messages, parse_tools(row.get("tools")))
