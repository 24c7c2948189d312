"""Rows of a file or hub data set -> examples, with every schema error found at once.

It knows neither tokenizers nor templates. Two registries are the seams: `READERS` (file suffix ->
reader of raw rows) and `LAYOUTS` (columns -> example). The layout is found in the first readable
row and then required of all. Where a row fits several, the first in `LAYOUTS` wins: `messages`
before `prompt` and `completion`, because a chat holds its prompt already (data sets that carry
both repeat the first message as `prompt`). Further columns are ignored, and named in
`Rows.ignored`.

Files are read line by line, so that only the examples themselves are held in memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from decal.data.order import EVAL_STREAM, permutation
from decal.data.problems import Problems, RowError
from decal.errors import DataError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
MEANINGFUL_KEYS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "weight",
)
"""Keys of a message that change what should be trained: dropping them would be silently wrong."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst")

RawRow: TypeAlias = "tuple[int, object | RowError]"


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row: either `messages`, or `prompt` and `completion`."""

    row: int
    """Number of the row: its line in the file or its place in the hub data set, from 1."""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What was read: the examples, and what a user should be told about them."""

    source: str
    """The file or hub id."""
    layout: str
    """The name of the layout that was found, a key of LAYOUTS."""
    ignored: tuple[str, ...]
    """Columns (and `messages[].key` of messages) that were not used, sorted."""
    examples: list[Example]


@dataclass(frozen=True)
class Layout:
    """A way rows can look: the columns it needs, and how they become an example.

    `parse(row number, columns, ignored)` raises RowError, and adds to the set `ignored`.
    """

    columns: tuple[str, ...]
    parse: Callable[[int, Mapping[str, Any], set[str]], Example]


def read_rows(path: str, *, split: str = "train", limit: int | None = None) -> Rows:
    """Read the rows of a .jsonl file, or of a hub data set if there is no such file.

    Args:
        path: a file, or `owner/name` of a hub data set (loaded through `datasets`).
        split: split of the hub data set; files have none.
        limit: use only so many rows from the start.

    Raises:
        DataError: nothing at `path`, no rows, an unknown layout, or rows that cannot be used (all
            of them named by number and counted, in one error).
    """
    raw = _hub_rows(path, split, limit) if _is_hub_id(path) else _file_rows(Path(path))
    return _parse(raw, path, limit)


def split_eval(
    examples: Sequence[Example], eval: float | str | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split off evaluation rows; both parts keep the order of the data.

    Args:
        examples: all rows.
        eval: share of the rows (at least one is taken, at least one is left), the path of a file
            with rows of its own, or None.
        seed: which rows are taken depends on this and on the number of rows, on nothing else.

    Returns:
        Training rows and evaluation rows; the latter empty where `eval` is None.

    Raises:
        DataError: a share outside (0, 1), too few rows to split, or a bad evaluation file.
    """
    if eval is None:
        return list(examples), []
    if isinstance(eval, str):
        return list(examples), read_rows(eval).examples
    if not 0.0 < eval < 1.0:
        raise DataError(
            f"`data.eval` is {eval}, not a share between 0 and 1",
            hint="write e.g. 0.05, the path of a file, or null for no evaluation",
        )
    if len(examples) < 2:
        raise DataError(
            f"{len(examples)} row cannot be split into training and evaluation rows",
            hint="add rows, or set `data.eval: null`",
        )
    count = min(max(1, round(eval * len(examples))), len(examples) - 1)
    held_out = set(permutation(len(examples), seed, EVAL_STREAM)[:count].tolist())
    train = [example for i, example in enumerate(examples) if i not in held_out]
    return train, [examples[i] for i in sorted(held_out)]


# --- raw rows ---------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(
                        f"`{path}` is UTF-16 text, not UTF-8", hint="save the file as UTF-8"
                    )
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _json_line(number, line)


def _json_line(number: int, line: bytes) -> object | RowError:
    try:
        row: object = json.loads(line.decode("utf-8").rstrip())
        return row
    except UnicodeDecodeError as error:
        bad = line[error.start]
        return RowError(
            "not UTF-8",
            f"byte {error.start + 1} of line {number} is 0x{bad:02x}, not UTF-8 text",
            hint="save the file as UTF-8",
        )
    except json.JSONDecodeError as error:
        hint = "each line must be one whole JSON object"
        if number == 1 and line.lstrip().startswith(b"["):
            hint = "the file is one JSON array; write each element as a line of its own"
        return RowError(
            "invalid JSON",
            f"invalid JSON on line {number}, column {error.colno}: {error.msg}",
            hint=hint,
        )
    except RecursionError:
        return RowError("invalid JSON", f"JSON on line {number} is nested too deeply")


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}
"""File suffix -> reader that yields (row number, decoded row or RowError)."""


def _file_rows(path: Path) -> Iterator[RawRow]:
    if path.is_dir():
        raise DataError(
            f"`{path}` is a folder, not a file of rows", hint=_neighbour(path / "train.jsonl")
        )
    if not path.exists():
        raise DataError(f"there is no file `{path}`", hint=_neighbour(path))
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"`{path}` is not one of the file types that are read: {', '.join(READERS)}",
            hint="write one JSON object per line into a .jsonl file",
        )
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}") from error


def _neighbour(path: Path) -> str | None:
    """A hint with the file in the same folder that was probably meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder `{folder}` either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = nearest(path.name, names)
    if near is None:
        near = next((name for name in names if Path(name).suffix.lower() in READERS), None)
    return f"did you mean `{folder / near}`?" if near else None


def _is_hub_id(path: str) -> bool:
    """`owner/name` where there is no such file or folder, without a data file's suffix."""
    known_suffix = Path(path).suffix.lower() in DATA_SUFFIXES
    return bool(HUB_ID.fullmatch(path)) and not known_suffix and not Path(path).exists()


def _hub_rows(path: str, split: str, limit: int | None) -> Iterator[RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"split `{split}` of the hub data set `{path}` cannot be loaded",
            details=[f"{type(error).__name__}: {first_line}"],
            hint=f"there is no local file `{path}` either; check the name, the split and the "
            "network connection",
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    yield from enumerate(rows, start=1)


# --- layouts ----------------------------------------------------------------------------------


def _parse(raw: Iterator[RawRow], source: str, limit: int | None) -> Rows:
    problems = Problems(source)
    examples: list[Example] = []
    ignored: set[str] = set()
    layout: str | None = None
    total = 0
    for number, row in raw:
        if limit is not None and total == limit:
            break
        total += 1
        try:
            if isinstance(row, RowError):
                raise row
            columns = _columns(row)
            if layout is None:
                layout = _detect(columns, number, source)
            examples.append(_example(LAYOUTS[layout], number, columns, ignored))
        except RowError as problem:
            problems.add(number, problem)
    if error := problems.error(total):
        raise error
    if layout is None:
        raise DataError(f"`{source}` has no rows")
    return Rows(source=source, layout=layout, ignored=tuple(sorted(ignored)), examples=examples)


def _columns(row: object) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {_kind(row)}, not an object with columns")
    return row


def _detect(columns: Mapping[str, Any], number: int, source: str) -> str:
    for name, layout in LAYOUTS.items():
        if all(columns.get(column) is not None for column in layout.columns):
            return name
    wanted = [" and ".join(f"`{c}`" for c in layout.columns) for layout in LAYOUTS.values()]
    found = ", ".join(f"`{column}`" for column in columns) or "none"
    known = [column for layout in LAYOUTS.values() for column in layout.columns]
    near = {column: nearest(column, known) for column in columns if column not in known}
    hints = [f"rename `{column}` to `{meant}`" for column, meant in near.items() if meant]
    raise DataError(
        f"the columns of `{source}` fit no layout: row {number} has {found}",
        details=[f"expected {', or '.join(wanted)}"],
        hint=hints[0] if hints else "rename the columns, or convert the rows to `messages`",
    )


def _example(layout: Layout, number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    missing = [column for column in layout.columns if columns.get(column) is None]
    if missing:
        kind = f"no `{missing[0]}`"
        found = ", ".join(f"`{column}`" for column in columns) or "no columns"
        raise RowError(
            kind,
            f"{kind} (the row has {found})",
            hint="all rows of a file must have the layout of its first row",
        )
    ignored.update(column for column in columns if column not in layout.columns)
    return layout.parse(number, columns, ignored)


def _messages(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    turns = columns["messages"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowError("wrong type of `messages`", f"`messages` is {_kind(turns)}, not a list")
    if not turns:
        raise RowError("empty `messages`", "`messages` is empty")
    messages = tuple(_message(i, turn, ignored) for i, turn in enumerate(turns, start=1))
    if not any(message.role == "assistant" for message in messages):
        raise RowError(
            "no assistant message",
            f"none of the {len(messages)} messages is the assistant's, so nothing can be trained",
        )
    return Example(row=number, messages=messages)


def _message(i: int, turn: object, ignored: set[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError("wrong type of message", f"message {i} is {_kind(turn)}, not an object")
    role = turn.get("role")
    if role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else None
        raise RowError(
            "unknown role",
            f"message {i} has the role {json.dumps(role, ensure_ascii=False, default=str)}",
            hint=f"did you mean `{near}`?" if near else f"roles are {', '.join(ROLES)}",
        )
    for key, value in turn.items():
        if key in ("role", "content") or value is None or value == []:
            continue
        if key in MEANINGFUL_KEYS:
            raise RowError(
                f"`{key}` in a message",
                f"message {i} has `{key}`, which cannot be trained on yet",
                hint=f"write what the model shall say into `content`, and remove `{key}`",
            )
        ignored.add(f"messages[].{key}")
    content = _text(turn.get("content"), f"`content` of message {i} ({role})", "`content`")
    if role == "assistant" and not content.strip():
        raise RowError("empty assistant message", f"message {i} (assistant) is empty")
    return Message(role, content)


def _prompt_completion(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    prompt = _text(columns["prompt"], "`prompt`", "`prompt`")
    completion = _text(columns["completion"], "`completion`", "`completion`")
    if not completion.strip():
        raise RowError("empty completion", "`completion` is empty")
    return Example(row=number, prompt=prompt, completion=completion)


LAYOUTS: dict[str, Layout] = {
    "messages": Layout(("messages",), _messages),
    "prompt-completion": Layout(("prompt", "completion"), _prompt_completion),
}
"""Layouts in order of precedence."""


def _text(value: object, what: str, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"wrong type of {column}", f"{what} is {_kind(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"broken text in {column}",
            f"{what} has half of a surrogate pair at character {error.start + 1}",
        ) from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)
