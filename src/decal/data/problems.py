"""Problems of rows: collected while reading or encoding, raised once. Knows no formats.

A row's number is its line in the file (blank lines counted) or its place in the array, table or
hub data set, all from 1, and it is the same number in every message, in `Example.row`, `Sample.row`
and `Batch.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from decal.data.example import Example
from decal.data.sample import Sample
from decal.errors import DataError

SHOWN = 5
LONGEST = 400
"""Characters of what is wrong with one row; its values may be of any length."""
MOST_COLUMNS = 24
"""Columns that a message names; a row may have any number of them, of any length."""


def columns_text(columns: Iterable[str]) -> str:
    """Names of columns for a message, each shortened, a few of them; empty for none."""
    names = list(columns)
    shown = [f"`{name}`" if len(name) <= 60 else f"`{name[:57]}...`" for name in names]
    more = f" and {len(names) - MOST_COLUMNS:,} more" if len(names) > MOST_COLUMNS else ""
    return ", ".join(shown[:MOST_COLUMNS]) + more


class RowError(Exception):
    """One row that cannot be used. Internal: users see the `DataError` made of all of them.

    Args:
        kind: what rows with the same trouble share; they are counted and shown together.
        text: what is wrong with this row, with its values; left out: the kind.
        hint: what the user can do about this kind.
    """

    def __init__(self, kind: str, text: str | None = None, hint: str | None = None):
        super().__init__(text or kind)
        self.kind = kind
        self.text = text or kind
        self.hint = hint


class Problems:
    """Collects row problems; memory stays small however many rows are bad."""

    def __init__(self, source: str):
        self.source = source
        self._first: dict[str, tuple[int, RowError]] = {}
        self._rows: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}

    def add(self, row: int, problem: RowError) -> None:
        """Note that row number `row` has `problem`."""
        self._first.setdefault(problem.kind, (row, problem))
        shown = self._rows.setdefault(problem.kind, [])
        if len(shown) < SHOWN:
            shown.append(row)
        self._counts[problem.kind] = self._counts.get(problem.kind, 0) + 1

    def error(self, total: int) -> DataError | None:
        """All problems as one error, or None; `total` is the number of rows looked at."""
        if not self._counts:
            return None
        bad = sum(self._counts.values())
        hints = [problem.hint for _, problem in self._first.values() if problem.hint]
        return DataError(
            f"{bad:,} of {total:,} row{'s' if total != 1 else ''} of `{self.source}` "
            "cannot be used",
            details=[self._line(kind) for kind in self._first],
            hint="; ".join(dict.fromkeys(hints)) or None,
        )

    def _line(self, kind: str) -> str:
        row, problem = self._first[kind]
        others = self._rows[kind][1:]
        line = f"row {row}: {problem.text[:LONGEST]}"
        if not others:
            return line
        more = self._counts[kind] - 1
        rest = ", …" if more > len(others) else ""
        return f"{line} (and {more:,} more: {', '.join(map(str, others))}{rest})"


def each_row(
    examples: Iterable[Example],
    source: str,
    encode: Callable[[Example], Sample | None],
    dropped: list[int],
) -> Iterator[Sample]:
    """Samples of all rows, one after the other.

    After the first bad row no more samples come, only the error when all rows have been seen.

    Args:
        encode: raises RowError on a bad row, and returns None for one that is to be left out.
        dropped: numbers of the rows left out are appended.

    Raises:
        DataError: bad rows, all of them in one error; or all rows were left out.
    """
    problems = Problems(source)
    total = bad = 0
    for example in examples:
        total += 1
        try:
            sample = encode(example)
        except RowError as problem:
            problems.add(example.row, problem)
            bad += 1
            continue
        if sample is None:
            dropped.append(example.row)
        elif not bad:
            yield sample
    if error := problems.error(total):
        raise error
    if total and len(dropped) == total:
        rows = f"all {total:,} rows of `{source}` are" if total > 1 else f"the row of `{source}` is"
        raise DataError(
            f"{rows} longer than `data.max_length` and dropped",
            hint="raise `data.max_length`, or set `data.overflow: truncate`",
        )
