"""Every file type: what its rows are, which number they have, and every way it can be broken."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decal.data.problems import RowError
from decal.data.readers import read_file, suffix_of
from decal.errors import DataError

ROWS = [{"text": "Grüße,\nAnn", "n": 1}, {"text": 'He said "yes"', "n": 2}]


def rows(path: Path) -> list[tuple[int, Any]]:
    return list(read_file(path))


def put(path: Path, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.JSON"])
@pytest.mark.parametrize("whole", [ROWS, {"data": ROWS}, {"version": "1.0", "rows": ROWS}])
def test_json_array(tmp_path: Path, name: str, whole: Any) -> None:
    """Numbers are places. Mutation: count from 0."""
    assert rows(put(tmp_path / name, json.dumps(whole, indent=1))) == list(enumerate(ROWS, 1))


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert rows(put(tmp_path / "a.json", text)) == list(enumerate(ROWS, 1))


BROKEN_JSON = {
    '[{"a": 1},\n {"a": }]': "line 2, column 8",
    "[": "line 1, column 2",
    '"x"': "holds no array of rows",
    '{"a": [{}], "b": [{}]}': "is one object with `a`, `b`",
    '{"a": [1, 2]}': "is one object with `a`",
    '{"a": 1}': "is one object with `a`",
}


@pytest.mark.parametrize("text", BROKEN_JSON)
def test_broken_json_is_named_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError) as caught:
        rows(put(tmp_path / "a.json", text))
    assert BROKEN_JSON[text] in caught.value.message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables(tmp_path: Path, name: str, mark: bytes) -> None:
    """Numbers are the lines on which records begin, after line breaks in quotes and blank lines.
    Mutations: number the records; keep the byte order mark in the first column's name; split at
    line breaks."""
    tab = "\t" if ".tsv" in name else ","
    text = f'text{tab} n\r\n"Grüße{tab}\nAnn"{tab}1\r\n\r\n"He said ""yes"""{tab}2\r\nx{tab}\r\n'
    found = rows(put(tmp_path / name, mark + text.encode()))
    assert found == [
        (2, {"text": f"Grüße{tab}\nAnn", "n": "1"}),
        (5, {"text": 'He said "yes"', "n": "2"}),
        (6, {"text": "x", "n": ""}),
    ]


def test_ragged_record_is_a_row_error(tmp_path: Path) -> None:
    """Mutation: fill up short records."""
    found = rows(put(tmp_path / "a.csv", "a,b\n1,2\n1\n1,2,3\n"))
    assert [number for number, _ in found] == [2, 3, 4]
    assert found[0][1] == {"a": "1", "b": "2"}
    assert [str(problem) for _, problem in found[1:]] == [
        "the record on line 3 has 1 cell, the header has 2",
        "the record on line 4 has 3 cells, the header has 2",
    ]


def test_broken_table_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the record that begins on line 3"):
        rows(put(tmp_path / "a.csv", 'a,b\n1,2\n"1,2\n3,4\n'))
    with pytest.raises(DataError, match="has the column `a` more than once"):
        rows(put(tmp_path / "a.csv", "a,b,a\n1,2,3\n"))


def test_long_cells_are_read_and_pythons_limit_is_left_as_it_was(tmp_path: Path) -> None:
    """Mutation: keep Python's limit of 128 KB a cell."""
    before = csv.field_size_limit()
    text = "x" * 200_000
    assert rows(put(tmp_path / "a.csv", f"text\n{text}\n")) == [(2, {"text": text})]
    assert csv.field_size_limit() == before


def test_text_is_documents_with_blank_lines_between(tmp_path: Path) -> None:
    """Mutation: a row for each line."""
    path = put(tmp_path / "a.txt", "\n\none\r\n  two\n \n\nthree")
    assert rows(path) == [(3, {"text": "one\n  two"}), (7, {"text": "three"})]


def test_parquet(tmp_path: Path) -> None:
    """Arrow fills objects up with nulls; mutation: keep them, and a call gets arguments that it
    never had."""
    path = tmp_path / "a.parquet"
    table = [{"text": "a", "calls": [{"x": 1}]}, {"text": None, "calls": [{"y": "b"}]}]
    pq.write_table(pa.Table.from_pylist(table), path)
    assert rows(path) == list(enumerate(table, 1))


def test_parquet_class_labels_become_names(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "a.parquet"
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"label": [1, 0, -1]}, features=features)
    pq.write_table(data.data.table, path)
    assert rows(path) == [(1, {"label": "yes"}), (2, {"label": "no"}), (3, {"label": None})]


def test_broken_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a readable parquet file"):
        rows(put(tmp_path / "a.parquet", "not parquet, but long enough for a footer"))


def test_compressed_lines(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl.gz", '{"a": 1}\n\n{"a": }\n')
    (first, row), (third, problem) = rows(path)
    assert (first, row, third) == (1, {"a": 1}, 3)
    assert isinstance(problem, RowError)


CUT_SHORT = gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9]


@pytest.mark.parametrize("content", [b"plain", CUT_SHORT], ids=["plain", "cut short"])
def test_broken_compression(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        rows(path)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt"])
def test_other_encodings_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="byte 2 of line 2 is 0xfc"):
        rows(put(tmp_path / name, b"a\nb\xfc"))
    with pytest.raises(DataError, match="UTF-16"):
        rows(put(tmp_path / name, "a,b".encode("utf-16")))


def test_suffixes() -> None:
    assert suffix_of("a/b.v2.JSONL.gz") == ".jsonl.gz"
    assert suffix_of("b.v2.csv") == ".csv"
    assert suffix_of("b") == ""
    with pytest.raises(DataError, match="not one of the file types"):
        rows(Path("a.parquet.gz"))
