"""Every error a user of decal can cause.

    DecalError                exit 2: asked wrongly
    ├── ConfigError           run.yaml, --set, keyword arguments
    ├── DataError             rows, layouts, templates, masks
    ├── BaseModelError        a base that is missing, unreadable or not what it should be
    ├── AdapterError          an adapter that is unreadable or does not fit its base
    ├── TargetError           target_modules that match nothing or the wrong thing
    ├── QuantError            weights or settings that a format cannot hold
    ├── OutputError           an output folder in use                        (exit 2)
    ├── StorageError          a full disk, a file that cannot be written     (exit 1)
    ├── TrainingError         NaN, no gradient, nothing to train             (exit 1)
    ├── VerificationError     what was written is not what was meant         (exit 1)
    └── Interrupted           Ctrl-C, after what can be kept was kept        (exit 130)
                              SIGTERM, likewise                              (exit 143)

What is worth saying but stops nothing is a `DecalWarning`, given through `warnings`; the CLI shows
it as one line.

A message is one sentence, details below it, and `hint` says what to do. Problems of one kind are
collected and raised once: counts first, then the first offender with both values.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import PurePath


class DecalError(Exception):
    """Base of all errors that decal raises on purpose.

    Args:
        message: one sentence that names the thing and both values.
        details: further lines, shown indented below the message.
        hint: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  {d}" for d in self.details)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class ConfigError(DecalError):
    """Settings that are unknown, of the wrong type, or contradict each other."""


class DataError(DecalError):
    """Training or evaluation data that cannot be read or would train nothing."""


class BaseModelError(DecalError):
    """A base model that is missing, unreadable, or not the one it should be."""


class AdapterError(DecalError):
    """An adapter that is unreadable, unsupported, or does not fit its base."""


class TargetError(DecalError):
    """Target modules that match nothing or cannot be adapted."""


class QuantError(DecalError):
    """Weights or settings that a quantization format cannot hold."""


class OutputError(DecalError):
    """An output that exists already."""


class StorageError(DecalError):
    """The disk refused: full, read-only, or gone."""

    exit_code = 1


class TrainingError(DecalError):
    """Training that cannot go on: NaN, missing gradients, nothing trainable."""

    exit_code = 1


class VerificationError(DecalError):
    """A written file differs from what was meant."""

    exit_code = 1


class Interrupted(DecalError):  # noqa: N818 (nothing went wrong)
    """The user stopped the work; the message says what was kept and how to go on."""

    exit_code = 130


class DecalWarning(UserWarning):
    """Something that works and that the user should know; one sentence."""


_LONGEST = 200
_MOST = 2000
"""Names that are compared, and their characters: both may come from a stranger's file."""


def first_of(lines: Sequence[str]) -> str:
    """The first line, and how many more there are."""
    return lines[0] + (f"  (and {len(lines) - 1} more)" if lines[1:] else "")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name closest to `name`, or None if none is close enough to suggest."""
    if len(name) > _LONGEST:  # no typing error; and comparing takes the square of the length
        return None
    short = [k for k in known[:_MOST] if len(k) <= _LONGEST]
    found = difflib.get_close_matches(name, short, n=1, cutoff=0.6)
    return found[0] if found else None


def nearest_file(name: str, known: Sequence[str]) -> str | None:
    """The known file name closest to `name`: near in its stem too, not only by a common suffix."""
    near = nearest(name, known)
    alike = near is not None and nearest(PurePath(name).stem, [PurePath(near).stem])
    return near if alike else None
