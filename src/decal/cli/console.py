"""What the CLI prints, and where: stdout carries data, stderr carries everything else.

Colours only on a terminal, never with NO_COLOR. rich is imported when something rich is printed:
`decal --help` and error messages do without it. Knows no commands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from decal.errors import DecalError

__all__ = [
    "facts",
    "log",
    "out",
    "say",
    "show_error",
    "show_json",
    "show_usage",
    "show_warning",
    "table",
    "write",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BOLD, _RED, _YELLOW, _CYAN = 1, 31, 33, 36


def write(text: str, *, end: str = "\n") -> None:
    """Data: plain text to stdout."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """Data for programs: one indented JSON document on stdout."""
    write(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@cache
def log() -> Console:
    """The console on stderr; text is never cut or wrapped where stderr is not a terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


@cache
def out() -> Console:
    """The console on stdout, for what is drawn there if it is a terminal."""
    from rich.console import Console

    return Console(highlight=False)


def say(what: Any) -> None:
    """One stage of the work, on stderr: text as it is, or anything that rich can draw."""
    log().print(what, markup=False)


def _painted(text: str, colour: int, stream: TextIO) -> str:
    """`text` in bold and colour if the stream is a terminal that wants them."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{_BOLD};{colour}m{text}\x1b[0m"


def _complain(
    label: str, colour: int, message: str, details: Iterable[str], hint: str | None
) -> None:
    lines = [_wrapped(_harmless(message), f"{label}: ", colour)]
    lines += [_wrapped(_harmless(detail), "  ") for detail in details]
    if hint:
        lines.append(_wrapped(_harmless(hint), "hint: ", _CYAN))
    sys.stdout.flush()
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def _harmless(text: str) -> str:
    """Control characters written out: a name from a stranger's file must not steer a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _wrapped(text: str, label: str, colour: int | None = None) -> str:
    """`text` after its label; on a terminal broken between words, never inside a path."""
    shown = label if colour is None else _painted(label.rstrip(), colour, sys.stderr) + " "
    if not sys.stderr.isatty():
        return shown + text
    width = max(shutil.get_terminal_size().columns, 40)
    lines = textwrap.wrap(
        text,
        width - 1,
        initial_indent=" " * len(label),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return shown + "\n".join(lines)[len(label) :] if lines else shown + text


def show_error(error: DecalError) -> None:
    """An error in decal's voice on stderr; stopping on request is not called an error."""
    label, colour = ("stopped", _YELLOW) if error.exit_code > 128 else ("error", _RED)
    _complain(label, colour, error.message, error.details, error.hint)


def show_usage(label: str, message: str, hint: str | None = None) -> None:
    """A mistake in the command line, or in decal itself."""
    _complain(label, _RED, message, (), hint)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Python's warnings as one line on stderr, without the source that raised them."""
    _complain("warning", _YELLOW, " ".join(str(message).split()), (), None)


def facts(values: Mapping[str, Any], indent: int = 0) -> None:
    """A mapping as aligned lines on stdout: sections indented, lists of mappings as tables."""
    width = max((len(str(key)) for key in values), default=0)
    pad = " " * indent
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            write(f"{pad}{key}")
            facts(value, indent + 2)
        elif _is_table(value):
            write(f"{pad}{key}")
            table(value, indent + 2)
        else:
            write(f"{pad}{key!s:<{width}}  {_fact(value)}".rstrip())


def table(rows: Sequence[Mapping[str, Any]], indent: int = 0) -> None:
    """Mappings as aligned columns on stdout, numbers to the right."""
    columns = []
    for key in dict.fromkeys(key for row in rows for key in row):
        cells = [_fact(row.get(key)) for row in rows]
        width = max(len(cell) for cell in [key, *cells])
        side = ">" if all(cell[:1].isdigit() for cell in cells) else "<"
        columns.append([f"{cell:{side}{width}}" for cell in (key, *cells)])
    for line in zip(*columns, strict=True):
        write((" " * indent + "  ".join(line)).rstrip())


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(row, Mapping) for row in value)
    )


def _fact(value: Any) -> str:
    if value is None or (isinstance(value, list | tuple | dict) and not value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_fact(v) for v in value)
    return _harmless(str(value))
