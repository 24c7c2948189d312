"""Bytes and JSON that somebody else wrote, read within bounds.

A file can be of any size, a named pipe that never ends or never begins, nested until the stack is
gone, a number of a million digits (which Python refuses with an error of its own), or text that no
encoder takes. Here all of that is one of two things: OSError where the system refused, ValueError
with a reason for a user in it where the content is at fault. Who calls knows which file it was.

Python's limit on nesting differs by its version (a thousand, then ten thousand), and what is read
here is copied, compared and written by functions that go deep too. So the depth is bounded here.

Knows no formats and no errors of decal's.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["MAX_DEPTH", "may_be_path", "parse_json", "read_bounded"]

MAX_DEPTH = 64
"""Lists and objects inside each other; a JSON schema of a tool takes about twenty."""


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a regular file, or of a link to one.

    Raises:
        OSError: as the system says it.
        ValueError: more than `limit` bytes, a path that cannot be one, or neither file nor folder:
            a pipe would be waited for without end.
    """
    known = os.stat(path)
    if not stat.S_ISREG(known.st_mode) and not stat.S_ISDIR(known.st_mode):
        raise ValueError("it is no regular file")
    with Path(path).open("rb") as file:
        raw = file.read(min(limit, known.st_size) + 1)
    if len(raw) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return raw


def may_be_path(text: str) -> bool:
    """Whether a system can be asked for a file or folder of this name without an error of its own.

    Not a path are control characters, text that is too long, and `~`: whose home would it be.
    """
    parts = text.encode("utf-8", "surrogatepass").split(b"/")
    return (
        0 < len(text) <= 1000
        and max(map(len, parts)) <= 255
        and not text.startswith("~")
        and not any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 for char in text)
    )


def parse_json(text: bytes | str, *, unique: bool = False, nan: bool = False) -> Any:
    """The value of a JSON text, in UTF-8 where it is bytes.

    Args:
        unique: refuse objects that give one key twice, and -0: a second parser may take the first
            one, and a float. Otherwise the last one counts, and 0.
        nan: take NaN and Infinity, which are no JSON and which Python writes.

    Raises:
        ValueError: not JSON, nested too deeply, or with text or numbers that nothing could write
            again; a json.JSONDecodeError where there is a line and column to name.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark")
    try:
        value = _decoder(unique, nan).decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair, which is no text") from None
    return value


@cache
def _decoder(unique: bool, nan: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_once if unique else None,
        parse_constant=None if nan else _no_constant,
        parse_int=_integer if unique else None,
    )


def _integer(text: str) -> int:
    if text == "-0":  # to stricter parsers a float
        raise ValueError("-0 is no integer")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"`{counts.most_common(1)[0][0]:.100}` is given twice")
    return found


def _depth(value: Any) -> int:
    """How many lists and objects lie inside each other; stops counting above the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inside = [
            v.values() if isinstance(v, dict) else v for v in level if type(v) in (dict, list)
        ]
        depth += bool(inside)
        level = [item for items in inside for item in items]
    return depth
