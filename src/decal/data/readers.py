"""Files -> raw rows, by suffix. Knows neither what columns mean nor where data sets come from.

`READERS` is the seam: a reader yields (row number, decoded row or RowError). What a row's number
is, is what a user finds again in an editor:

    .jsonl .ndjson   one object per line                    the line
    .json            an array of objects, or an object      the place in the array
                     that holds one such array
    .csv .tsv        a header, then records                 the line on which the record begins
    .parquet         columns                                the place in the table
    .txt             documents with blank lines between     the line on which the document begins

All but .parquet may also be compressed: `.jsonl.gz`. Only .jsonl and .parquet are read piece by
piece; the others are held in memory while they are read. A .json file with one object per line is
read as .jsonl, because that is what many programs write under this name.

A file may come from a stranger, so what is read at once is bounded: a line, a file that must be
held whole, and how much larger than itself a compressed file may become.
"""

from __future__ import annotations

import codecs
import csv
import errno
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from decal.data.problems import RowError, columns_text
from decal.errors import DataError
from decal.untrusted import parse_json

RawRow: TypeAlias = "tuple[int, object | RowError]"

CSV_FIELD_LIMIT = 2**31 - 1
"""Python's own limit, 128 KB a cell, is shorter than some documents."""

LINE_LIMIT = 64 << 20
"""Bytes of one line of JSON; a book has about one million."""

WHOLE_LIMIT = 4 << 30
"""Bytes of a file that is held in memory while it is read."""

FREE = 256 << 20
"""Bytes that any compressed file may become."""

RATIO = 100
"""Beyond that, bytes for each byte of the file. Text shrinks to a tenth or a thirtieth; a file made
to fill memory to a thousandth."""

HINT_UTF8 = "save the file as UTF-8"


def suffix_of(path: str | Path) -> str:
    """The suffix in small letters, with `.gz` and what stands before it: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def read_file(path: Path) -> Iterator[RawRow]:
    """The rows of a file.

    Raises:
        DataError: a file type that is not read, or a file that cannot be read.
    """
    suffix = suffix_of(path)
    plain = suffix.removesuffix(".gz")
    if plain not in READERS or suffix == ".parquet.gz":
        raise DataError(
            f"`{path}` is not one of the file types that are read: {', '.join(READERS)}",
            hint="write one JSON object per line into a .jsonl file",
        )
    try:
        yield from READERS[plain](path)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"`{path}` cannot be read: {why}") from error


def _open(path: Path) -> io.BufferedIOBase:
    if not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no regular file")
    if not suffix_of(path).endswith(".gz"):
        return path.open("rb")
    return io.BufferedReader(_Inflated(path), 1 << 20)


class _Allowance:
    """How many bytes a compressed file may still become."""

    def __init__(self, path: Path):
        self._path = path
        self._size = path.stat().st_size
        self._left = max(FREE, RATIO * self._size)

    def take(self, count: int) -> None:
        """Raises DataError where `count` bytes more are too many."""
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"`{self._path}` becomes more than {RATIO} times its {self._size:,} bytes",
                hint="it may be made to fill your memory; if you trust it, decompress it first",
            )


class _Inflated(io.RawIOBase):
    """The decompressed bytes of a .gz file, as far as they are allowed."""

    def __init__(self, path: Path):
        self._allowance = _Allowance(path)
        self._file = gzip.open(path, "rb")  # noqa: SIM115 (closed by `close`)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._allowance.take(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


# --- JSON -------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[RawRow]:
    with _open(path) as file:
        yield from _json_lines(path, file)


def _json_lines(path: Path, file: io.BufferedIOBase) -> Iterator[RawRow]:
    lines = iter(lambda: file.readline(LINE_LIMIT + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > LINE_LIMIT:
            raise DataError(
                f"line {number} of `{path}` is longer than {LINE_LIMIT:,} bytes",
                hint="each row is one line; break the text of the row up into several rows",
            )
        if number == 1:
            line = _without_mark(path, line)
        if line.strip():
            yield number, _json_line(number, line)


def _json_line(number: int, line: bytes) -> object | RowError:
    try:
        row: object = parse_json(line.decode("utf-8").rstrip(), nan=True)
        return row
    except UnicodeDecodeError as error:
        bad = line[error.start]
        return RowError(
            "not UTF-8",
            f"byte {error.start + 1} of line {number} is 0x{bad:02x}, not UTF-8 text",
            hint=HINT_UTF8,
        )
    except json.JSONDecodeError as error:
        hint = "each line must be one whole JSON object"
        if number == 1 and line.lstrip().startswith(b"["):
            hint = "the file is one JSON array; name it .json, or write a line for each element"
        return RowError(
            "invalid JSON",
            f"invalid JSON on line {number}, column {error.colno}: {error.msg}",
            hint=hint,
        )
    except ValueError as error:
        return RowError("invalid JSON", f"JSON on line {number} cannot be used: {error}")


def _json(path: Path) -> Iterator[RawRow]:
    text = _text(path)
    try:
        whole = parse_json(text, nan=True)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, io.BytesIO(text.encode("utf-8")))
            return
        raise DataError(
            f"`{path}` is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            hint="a .json file holds one array of objects; one object per line is .jsonl",
        ) from None
    except ValueError as error:
        raise DataError(f"`{path}` cannot be used: {error}") from None
    yield from enumerate(_array(path, whole), start=1)


def _array(path: Path, whole: object) -> list[object]:
    """The array of rows: the whole file, or the one list that its object holds."""
    if isinstance(whole, list):
        return whole
    hint = "a .json file holds one array of objects"
    if not isinstance(whole, dict):
        raise DataError(f"`{path}` holds no array of rows", hint=hint)
    lists = {key: value for key, value in whole.items() if isinstance(value, list)}
    rows = {key: value for key, value in lists.items() if value and isinstance(value[0], dict)}
    if len(lists) == 1 and len(rows) == 1:
        return next(iter(rows.values()))
    found = columns_text(lists or whole) or "nothing"
    raise DataError(
        f"`{path}` is one object with {found}, not an array of rows",
        hint=f"{hint}, or an object with one such array in it",
    )


# --- tables -----------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[RawRow]:
    yield from _records(path, ",")


def _tsv(path: Path) -> Iterator[RawRow]:
    yield from _records(path, "\t")


def _records(path: Path, delimiter: str) -> Iterator[RawRow]:
    limit = csv.field_size_limit(CSV_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    first = 1
    try:
        for cells in reader:
            number, first = first, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(path, cells)
            elif len(cells) != len(header):
                yield number, RowError("ragged rows", _ragged(number, cells, header))
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"`{path}` is not valid CSV: the record that begins on line {first}: {error}",
            hint='a cell with line breaks or quotes stands in quotes: "He said ""yes"""',
        ) from None
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"the header of `{path}` has the column `{twice[0]}` more than once",
            hint="the first line must name each column once",
        )
    return names


def _ragged(number: int, cells: list[str], header: list[str]) -> str:
    plural = "" if len(cells) == 1 else "s"
    return (
        f"the record on line {number} has {len(cells)} cell{plural}, the header has {len(header)}"
    )


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    number, allowance = 0, _Allowance(path)
    try:
        with pq.ParquetFile(path) as table:
            classes = _classes(table.schema_arrow.metadata)
            for batch in table.iter_batches(batch_size=1024):
                allowance.take(batch.nbytes)
                for row in batch.to_pylist():
                    number += 1
                    yield number, plain_row(row, classes)
    except (DataError, OSError):
        raise
    except Exception as error:  # of pyarrow, or of Python where a value is none: dates, text
        first_line = next(iter(str(error).splitlines()), "")
        raise DataError(f"`{path}` is not a readable parquet file: {first_line}") from error


def _classes(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of the classes per column, where `datasets` wrote them into the file."""
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def plain_row(row: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    """A row of an Arrow table as the row it was made of.

    Arrow gives all objects of a column the same keys and fills up with nulls; they are left out.
    Class labels become their names, -1 (no label) becomes null.
    """
    plain = {column: _without_fillers(value) for column, value in row.items()}
    for column, names in classes.items():
        value = row.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            plain[column] = names[value] if 0 <= value < len(names) else None
    return plain


def _without_fillers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_fillers(v) for k, v in value.items() if v is not None}
    return [_without_fillers(v) for v in value] if isinstance(value, list) else value


# --- text -------------------------------------------------------------------------------------


def _txt(path: Path) -> Iterator[RawRow]:
    document: list[str] = []
    first = 1
    lines = _text(path).replace("\r\n", "\n").split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            if not document:
                first = number
            document.append(line)
        elif document:
            yield first, {"text": "\n".join(document)}
            document = []


def _text(path: Path) -> str:
    content = _without_mark(path, _whole(path))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"`{path}` is not UTF-8 text: byte {error.start - start + 1} of line {line} is "
            f"0x{content[error.start]:02x}",
            hint=HINT_UTF8,
        ) from None


def _whole(path: Path) -> bytes:
    pieces, size = [], 0
    with _open(path) as file:
        while piece := file.read(1 << 24):
            pieces.append(piece)
            size += len(piece)
            if size > WHOLE_LIMIT:
                raise DataError(
                    f"`{path}` holds more than {WHOLE_LIMIT:,} bytes, and would be held in memory",
                    hint="write its rows into a .jsonl or .parquet file",
                )
    return b"".join(pieces)


def _without_mark(path: Path, content: bytes) -> bytes:
    """The bytes without a byte order mark of UTF-8; that of UTF-16 is an error."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"`{path}` is UTF-16 text, not UTF-8", hint=HINT_UTF8)
    return content.removeprefix(codecs.BOM_UTF8)


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
}
"""File suffix -> reader that yields (row number, decoded row or RowError)."""
