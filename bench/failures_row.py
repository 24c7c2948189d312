"""What a row of docs/failures.md is made of, and how a tool is watched while it works.

Knows no situation and no tool: `failures_*.py` hold those, `failures.py` runs them and writes the
document.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Verdict = Literal["right", "error", "found", "warning", "told", "silent"]
"""What became of the user: the result was right; the work was refused; what was wrong was found on
request; the result was wrong, and a warning or a printed number said so, or nothing did."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one tool did."""

    who: str
    verdict: Verdict
    text: str
    """What was measured, with its numbers, and what the tool said, in its own words."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One situation, and every tool that was put into it."""

    what: str
    seen: Sequence[Seen]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One failure."""

    title: str
    failure: str
    """What goes wrong, in a sentence or two."""
    cases: Sequence[Case]
    threads: Sequence[str] = ()
    """Where it was reported: `peft#2321`."""


MakeRow = Callable[[Path], Row]
"""Runs one row's situations in an empty folder."""


@dataclass
class Heard:
    """What a tool said while it was watched, and how it ended."""

    lines: list[str] = field(default_factory=list)
    """Warnings and log lines from level warning upward; deprecations apart."""
    printed: str = ""
    """Standard output and standard error."""
    error: BaseException | None = None

    def verdict(self, right: bool, about: str = "") -> Verdict:
        """Whether the tool refused, was right, or was wrong with or without a word about it.

        A warning counts if the expression `about` is found in it.
        """
        if self.error is not None:
            return "error"
        return "right" if right else "warning" if self.said(about) else "silent"

    def said(self, about: str = "") -> str | None:
        """The first warning in which the expression is found."""
        return next((line for line in self.lines if re.search(about, line)), None)

    def words(self, about: str = "", limit: int = 300) -> str:
        """The error, else a warning about it, else the first one, quoted for the document."""
        if self.error is not None:
            return quoted(f"{type(self.error).__name__}: {self.error}", limit)
        line = self.said(about) or self.said()
        return "no warning" if line is None else quoted(line, limit)


class _Ear(logging.Handler):
    def __init__(self, heard: Heard):
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.lines.append(record.getMessage())


@contextlib.contextmanager
def watched() -> Iterator[Heard]:
    """Collects warnings, log lines, output and an error, which goes no further."""
    heard, ear, out = Heard(), None, io.StringIO()
    ear = _Ear(heard)
    # Libraries that own their handlers do not hand their records on to the root logger.
    loggers = [logging.getLogger(n) for n in (None, "transformers", "peft", "trl", "accelerate")]
    loggers = [logger for logger in loggers if logger.name == "root" or not logger.propagate]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        with (
            warnings.catch_warnings(record=True) as given,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            warnings.simplefilter("always")
            try:
                yield heard
            except Exception as error:
                heard.error = error
    finally:
        for logger in loggers:
            logger.removeHandler(ear)
        heard.printed = out.getvalue()
        outdated = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
        heard.lines += [str(w.message) for w in given if not issubclass(w.category, outdated)]


def quoted(text: str, limit: int = 300) -> str:
    """A tool's words in quotation marks and on one line, shortened; without folders of here."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]+/", "", text)
    text = re.sub(r"(?<![\w.:/])(/[\w.+-]+)+/(?=[\w.+-])", "…/", text)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    text = " / ".join(" ".join(line.split()) for line in lines if line.strip())
    return '"' + (text if len(text) <= limit else text[: limit - 1].rstrip() + "…") + '"'
