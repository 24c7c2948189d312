"""Regular expressions in the settings of an adapter: those that could take forever are refused.

peft takes names of modules as patterns, and Python's `re` tries every way in which repeats can
share a text. Two shapes make that explode. A repeat in a repeat takes exponential time, `(a+)+`;
k repeats in a row, `.*a.*b`, take about n^k / k! steps on a name of n characters. A repeat is
harmless where what follows ends it: `\\d+\\.` and `(\\w+\\.)*` can be read in one way only.

The check reads the parsed expression and runs nothing. It refuses a few that would be quick, and
none that libraries are known to write: their longest have four repeats in a row. What it lets
through may still take about a second for each name.

Rejected: a time limit, which only a signal could keep, in a main thread only.

Knows no settings and no adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

# The parser behind re.compile. It has no public name; its trees are the same since 3.11.
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["why_costly"]

NAME = 150
"""Characters of a long module path; names in a file may be longer."""
STEPS = 1e8
"""For one name; about a second."""
LONGEST = 20_000
_FEW = 16
"""Repetitions that are as good as written out."""

_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def why_costly(pattern: str, names: Iterable[str]) -> str | None:
    """Why matching `pattern` against module paths may take too long; None if it may not.

    Raises:
        re.error: it is no regular expression.
    """
    if len(pattern) > LONGEST:
        return f"is a pattern of {len(pattern):,} characters"
    try:
        re.compile(pattern)
        tree = list(_parser.parse(pattern))
        if _nested(tree, inside=False):
            return "repeats a repeat, which can take forever to match"
        count = _in_a_row(tree)
    except (RecursionError, OverflowError):
        return "is nested too deeply"
    longest = max([NAME, *map(len, names)])
    if longest**count / math.factorial(count) > STEPS:
        return f"has {count} open repeats in a row, which can take too long to match"
    return None


def _nested(nodes: Sequence[Any], *, inside: bool) -> bool:
    """Whether something that can match in several ways is itself repeated many times."""
    for place, (kind, given) in enumerate(nodes):
        if kind in _REPEATS:
            low, high, body = given
            if inside and low != high and not _ended(nodes, place):
                return True
            if _nested(list(body), inside=inside or high > _FEW):
                return True
            continue
        if inside and kind is op.BRANCH:
            return True
        if any(_nested(part, inside=inside) for part in _parts(kind, given)):
            return True
    return False


def _in_a_row(nodes: Sequence[Any]) -> int:
    """The most open repeats that one way through the expression passes."""
    count = 0
    for place, (kind, given) in enumerate(nodes):
        if kind in _REPEATS:
            low, high, body = given
            count += low != high > _FEW and not _ended(nodes, place)
            count += _in_a_row(list(body)) * min(high, _FEW)
        else:
            count += max((_in_a_row(part) for part in _parts(kind, given)), default=0)
    return count


def _parts(kind: Any, given: Any) -> list[list[Any]]:
    """The expressions inside a node that is no repeat; alternatives are several."""
    if kind is op.SUBPATTERN:
        return [list(given[-1])]
    if kind is op.BRANCH:
        return [list(part) for part in given[1]]
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return [list(given[1])]
    if kind is op.ATOMIC_GROUP:
        return [list(given)]
    if kind is op.GROUPREF_EXISTS:
        return [list(part) for part in given[1:] if part]
    return []


def _ended(nodes: Sequence[Any], place: int) -> bool:
    """Whether a repeat of single characters is followed by a character that is none of them."""
    body = list(nodes[place][1][2])
    if len(body) != 1 or place + 1 == len(nodes) or nodes[place + 1][0] is not op.LITERAL:
        return False
    return not _takes(body[0], chr(nodes[place + 1][1]))


def _takes(node: Any, char: str) -> bool:
    kind, given = node
    if kind is op.LITERAL:
        return bool(given == ord(char))
    if kind is op.NOT_LITERAL:
        return bool(given != ord(char))
    if kind is op.IN:
        negated = given[0][0] is op.NEGATE
        return any(_takes(item, char) for item in given[negated:]) != negated
    if kind is op.RANGE:
        return bool(given[0] <= ord(char) <= given[1])
    if kind is op.CATEGORY:
        return re.fullmatch(_CATEGORIES[given], char) is not None
    return True


_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d", op.CATEGORY_NOT_DIGIT: r"\D", op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S", op.CATEGORY_WORD: r"\w", op.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
