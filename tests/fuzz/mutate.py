"""Damage to valid inputs: to their bytes, and to the values of a JSON document.

Everything comes from one `random.Random`, so that a failing input can be made again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any

EVIL_BYTES = (
    b"", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b'"', b"'", b"\\", b"{",
    b"}", b"[", b"]", b"[" * 70, b"[" * 5000, b'{"a":' * 2000, b":", b",", b"&a [*a]", b"*a",
    b"!!x ", b"!!python/object:os.system ", b"<<: ", b"---\n", b"null", b"true", b"NaN",
    b"-Infinity", b"1e999", b"-0", b"-1", b"0", b"9223372036854775808", b"9" * 4400, b"1.5",
    b'"\\ud800"', b"\xed\xa0\x80",
    b"../../etc/passwd", b"/etc/passwd", b"a" * 3000, b"\xf0\x9f\x98\x80", b"\x1b[2J", b"%s%n",
    b"(a+)+$", b"${HOME}", b"{{x}}", b"~", b"\0" * 300, b"\xff\xff\xff\xff\xff\xff\xff\x7f",
)  # fmt: skip
EVIL_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63), 10**30, float("nan"),
    float("inf"), "", " ", "a", "\0", "\ud800", "../x", "/etc/passwd", "a" * 3000, "(", "(a+)+$",
    "[", ".*" * 20 + "x", "\x1b[2J", "default", "none", "all-linear", "float32", "load",
    "__class__", [], [[]], [None], [""], [0], ["a", 1], {}, {"": None}, {"a": {}},
    {"a": [1, "b"]}, [[[[[[]]]]]],
    [0] * 300, {str(i): i for i in range(300)},
)  # fmt: skip


def damaged(seed: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """`seed` after one to four changes; pieces may come from `others`."""
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        _change(data, others, random)
    return bytes(data)


def _change(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 1, 2, 4, 8, 30, 200)))
    kind = random.randrange(8)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[at:end]
    elif kind == 2:
        data[at:at] = random.randbytes(random.choice((1, 2, 8)))
    elif kind == 3:
        other = random.choice(others)
        start = random.randrange(len(other) + 1)
        data[at:end] = other[start : start + random.randrange(200)]
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data[at:at] = data[at:end] * random.choice((1, 2, 50))
    else:
        data[at : random.choice((at, end))] = random.choice(EVIL_BYTES)


def altered(document: Any, random: Random) -> Any:
    """A copy of a JSON document with one to three of its values, keys or lists changed."""
    changed = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 2, 3))):
        changed = _alter(changed, random)
    return changed


def _alter(value: Any, random: Random) -> Any:
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return copy.deepcopy(random.choice(EVIL_VALUES))
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    kind = random.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[random.choice(("", "a", "\ud800", "x" * 2000, f"{key}s", "__metadata__"))] = value[
            key
        ]
    elif kind == 2 and isinstance(value, list):
        value.insert(key, copy.deepcopy(random.choice(EVIL_VALUES)))
    elif kind == 3:
        other = random.choice(list(value.values()) if isinstance(value, dict) else value)
        value[key] = copy.deepcopy(other)
    else:
        value[key] = _alter(value[key], random)
    return value


def text_of(document: Any) -> bytes:
    """JSON text of a document, halves of surrogate pairs as escapes."""
    return json.dumps(document).encode("ascii")
