"""`data` settings -> examples, with every schema error found at once.

It knows neither tokenizers nor templates. Where rows come from: a file (readers.py), or a hub data
set or folder (hub.py). What their columns mean: columns.py and layouts.py. Columns that are not
used are named in `Rows.ignored`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from decal.config import DataConfig
from decal.data.columns import Columns
from decal.data.example import Example, Message
from decal.data.hub import data_set_rows
from decal.data.layouts import find_layout, parse_row, require_layout, with_system
from decal.data.messages import kind
from decal.data.order import EVAL_STREAM, SHUFFLE_STREAM, permutation
from decal.data.problems import Problems, RowError
from decal.data.readers import READERS, RawRow, read_file, suffix_of
from decal.errors import DataError, nearest_file

__all__ = ["Example", "Message", "Rows", "read_rows", "split_eval"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_SUFFIXES = (*READERS, ".gz", ".zst", ".zip")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What was read: the examples, and what a user should be told about them."""

    source: str
    """The file, folder or hub id, with the split if it is not `train`."""
    layout: str
    """The name of the layout that was found, a key of LAYOUTS."""
    ignored: tuple[str, ...]
    """Columns (and `messages[].key` of messages) that were not used, sorted."""
    examples: list[Example]


def read_rows(settings: DataConfig, *, seed: int = 0) -> Rows:
    """Read the rows that `settings` name; `DataConfig(path=…)` is enough for a file.

    Honours path, name, split, layout, columns, system, limit, shuffle (by `seed`) and streaming;
    the other settings are the encoder's and `split_eval`'s.

    Raises:
        DataError: nothing at `path`, no rows, an unknown layout, settings that do not fit the
            data, or rows that cannot be used (all of them named by number and counted, in one
            error).
    """
    path = _one_file(settings)
    if path is None:
        raw = data_set_rows(settings, seed)
        split = "" if settings.split == "train" else f" ({settings.split})"
        return _parse(raw, f"{settings.path}{split}", settings)
    raw = _file_rows(path)
    if settings.shuffle:
        rows = list(raw)
        raw = (rows[i] for i in permutation(len(rows), seed, SHUFFLE_STREAM).tolist())
    return _parse(islice(raw, settings.limit), str(path), settings)


def split_eval(rows: Rows, settings: DataConfig, seed: int = 0) -> tuple[Rows, Rows]:
    """Evaluation rows by `settings.eval`; both parts keep the order of the data.

    A share is split off `rows`: at least one row is taken, at least one is left. The first row of
    every class stays, so that no class is evaluated that was not trained. A file is read
    with the same settings (its layout must be that of `rows`). For a hub data set or folder, `eval`
    may also name another split of it.

    Args:
        rows: what `read_rows` made of the same settings.
        seed: which rows are taken depends on this and on the number of rows, on nothing else.

    Returns:
        Training rows and evaluation rows, each with its own source; the latter without examples
        where `eval` is null.

    Raises:
        DataError: too few rows to split, or evaluation rows that cannot be used.
    """
    examples = rows.examples
    if settings.eval is None:
        return rows, replace(rows, examples=[])
    if isinstance(settings.eval, str):
        return rows, read_rows(_eval_settings(settings, rows.layout), seed=seed)
    if len(examples) < 2:
        raise DataError(
            f"{len(examples)} row cannot be split into training and evaluation rows",
            hint="add rows, or set `data.eval: null`",
        )
    count = min(max(1, round(settings.eval * len(examples))), len(examples) - 1)
    needed = _firsts(examples)
    shuffled = permutation(len(examples), seed, EVAL_STREAM).tolist()
    held_out = set([i for i in shuffled if i not in needed][:count])
    if not held_out:
        raise DataError(
            f"no row can be held out for evaluation: each of the {len(examples)} is the only one "
            "of its class",
            hint="add rows, or set `data.eval: null`",
        )
    train = [example for i, example in enumerate(examples) if i not in held_out]
    return replace(rows, examples=train), replace(
        rows, examples=[examples[i] for i in sorted(held_out)]
    )


def _firsts(examples: Sequence[Example]) -> set[int]:
    """Indices of the first example of each class."""
    first: dict[str, int] = {}
    for i, example in enumerate(examples):
        if example.label is not None:
            first.setdefault(example.label, i)
    return set(first.values())


def _eval_settings(settings: DataConfig, layout: str) -> DataConfig:
    named = str(settings.eval)
    same = {"layout": layout, "eval": None}
    has_splits = _is_hub_id(settings.path) or Path(settings.path).is_dir()
    is_split = re.fullmatch(r"\w+", named) and not Path(named).exists()
    if has_splits and is_split:
        return settings.model_copy(update={**same, "split": named})
    return settings.model_copy(update={**same, "path": named, "name": None, "split": "train"})


# --- where rows come from ---------------------------------------------------------------------


def _one_file(settings: DataConfig) -> Path | None:
    """The file to read; None where `datasets` must load a hub data set or a folder."""
    path = Path(settings.path)
    if _is_hub_id(settings.path):
        return None
    if path.is_dir():
        return _split_file(path, settings.split) if settings.name is None else None
    for setting, default in (("split", "train"), ("name", None)):
        given = getattr(settings, setting)
        if given != default:
            raise DataError(
                f"`data.{setting}` is {given}, but `{settings.path}` is a file and has none",
                hint=f"leave out `data.{setting}`",
            )
    return path


def _split_file(folder: Path, split: str) -> Path | None:
    """`train.jsonl` in a folder, if it alone is called so: its rows keep their line numbers."""
    found = [
        entry
        for entry in folder.iterdir()
        if entry.is_file()
        and suffix_of(entry).removesuffix(".gz") in READERS
        and entry.name.removesuffix(suffix_of(entry)).lower() == split.lower()
    ]

    return found[0] if len(found) == 1 else None


def _file_rows(path: Path) -> Iterator[RawRow]:
    if not path.exists():
        raise DataError(f"there is no file `{path}`", hint=_neighbour(path))
    yield from read_file(path)


def _neighbour(path: Path) -> str | None:
    """A hint with the file in the same folder that was probably meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder `{folder}` either"
    if not path.suffix and path.name == str(path):
        return "a hub data set is named owner/name"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = nearest_file(path.name, names)
    if near is not None:
        return f"did you mean `{folder / near}`?"
    rows = [name for name in names if Path(name).suffix.lower() in READERS]
    return f"`{folder}` holds {', '.join(rows[:3])}{', …' if rows[3:] else ''}" if rows else None


def _is_hub_id(path: str) -> bool:
    """`owner/name` where there is no such file or folder, without a data file's suffix."""
    known_suffix = Path(path).suffix.lower() in DATA_SUFFIXES
    return bool(HUB_ID.fullmatch(path)) and not known_suffix and not Path(path).exists()


# --- what they mean ---------------------------------------------------------------------------


def _parse(raw: Iterator[RawRow], source: str, settings: DataConfig) -> Rows:
    problems = Problems(source)
    columns = Columns(settings.columns)
    examples: list[Example] = []
    ignored: set[str] = set()
    layout: str | None = None
    total = 0
    for number, row in raw:
        total += 1
        try:
            if isinstance(row, RowError):
                raise row
            made = columns.apply(_object(row))
            if layout is None:
                layout = _layout(made, columns.made, number, source, settings.layout)
            example = parse_row(layout, number, made, ignored)
            examples.append(_with_system(example, settings.system, layout))
        except RowError as problem:
            problems.add(number, problem)
    if error := problems.error(total):
        raise error
    if layout is None:
        raise DataError(f"`{source}` has no rows")
    unused = tuple(sorted(ignored - columns.used))
    return Rows(source=source, layout=layout, ignored=unused, examples=examples)


def _object(row: object) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {kind(row)}, not an object with columns")
    return row


def _layout(
    columns: Mapping[str, Any], made: frozenset[str], number: int, source: str, asked: str
) -> str:
    if asked == "auto":
        return find_layout(columns, made, number, source)
    require_layout(asked, columns, number, source)
    return asked


def _with_system(example: Example, system: str | None, layout: str) -> Example:
    if system is None:
        return example
    if example.messages is None:
        raise DataError(
            f"`data.system` is for chats, and the rows are {layout}",
            hint="leave out `data.system`, or write its text into the prompts with `data.columns`",
        )
    return replace(example, messages=with_system(example.messages, system))
