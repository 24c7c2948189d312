"""The sweep folder: what candidates there are, and what became of each.

    sweep.yaml      the settings that the sweep began from, as text
    sweep.json      the grid, how candidates are judged, and every candidate: name, the settings
                    that are its own, status, and why it is over
    NAME/           the run folder of a candidate (run.py)
    report.html     and pictures

sweep.json is replaced as a whole, so that a killed sweep leaves the state before or after a change.
A candidate's own progress is in its run folder. One process at a time may hold the folder.

Knows no models and no settings: they are text and plain JSON here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decal.errors import OutputError
from decal.store.files import JSON_LIMIT, check_free, read_json, write_json, write_text, writing
from decal.store.run import hold, remove
from decal.untrusted import read_bounded

PICTURES = ("loss.png", "quality.png", "spectrum.png")
STATUSES = ("waiting", "training", "done", "stopped", "failed")
"""`stopped` was ended in favour of others; its run folder is whole all the same."""


class SweepFolder:
    """One sweep's folder, held by this process until the end of a `with` block."""

    def __init__(self, path: Path, lock: int):
        self.path = path
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        settings: str,
        state: Mapping[str, Any],
        *,
        force: bool = False,
    ) -> SweepFolder:
        """Begins a sweep: the folder, held, with settings and state.

        With `force`, what an earlier sweep left is removed: its candidates' folders and reports.

        Raises:
            OutputError: the folder is not empty, or another process works in it.
            StorageError: the disk refused.
        """
        out = Path(path)
        cls.check_new(out, force=force)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        sweep = cls(out, hold(out))
        try:
            with writing(out):
                for name in sweep._left_behind():
                    remove(out / name)
            write_text(out / "sweep.yaml", settings)
            sweep.write(state)
        except BaseException:
            sweep.close()
            raise
        return sweep

    @classmethod
    def check_new(cls, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Raises OutputError if `create` would; writes nothing."""
        hint = "go on with --resume, start over with --force, or choose another output"
        check_free(Path(path), force=force, hint=hint)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SweepFolder:
        """Holds the folder of a sweep that began earlier. Raises OutputError if there is none."""
        out = Path(path)
        if not (out / "sweep.json").is_file():
            raise OutputError(f"`{out}` holds no sweep", hint="start one without --resume")
        return cls(out, hold(out))

    def close(self) -> None:
        """Lets the folder go. Closing twice is fine."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> SweepFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> str:
        """The text of sweep.yaml. Raises OutputError if it cannot be read."""
        path = self.path / "sweep.yaml"
        try:
            return read_bounded(path, JSON_LIMIT).decode("utf-8")
        except (OSError, ValueError) as error:
            raise OutputError(f"`{path}` cannot be read: {error}") from error

    def read(self) -> dict[str, Any]:
        """What sweep.json says. Raises OutputError if it is damaged."""
        state = read_json(self.path / "sweep.json", OutputError)
        candidates = state.get("candidates")
        sound = isinstance(candidates, list) and all(_is_candidate(c) for c in candidates)
        if not sound:
            raise OutputError(
                f"`{self.path / 'sweep.json'}` is damaged: it lists no candidates",
                hint="choose another output, or remove the folder",
            )
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces sweep.json. Raises StorageError if the disk refuses."""
        write_json(self.path / "sweep.json", dict(state))

    def _left_behind(self) -> list[str]:
        """What an earlier sweep has put here, by its own account."""
        if not (self.path / "sweep.json").is_file():
            return []
        names = [candidate["name"] for candidate in self.read()["candidates"]]
        own = ["sweep.yaml", "sweep.json", "samples.json", "report.html", *PICTURES]
        return [name for name in (*names, *own) if _is_name(name)]


def _is_name(text: str) -> bool:
    """Whether it names something in a folder, and no place outside of it nor the folder itself."""
    return text not in ("", ".", "..") and "/" not in text and Path(text).name == text


def _is_candidate(value: Any) -> bool:
    """Whether it is an entry of `candidates` as `write` is given them."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and _is_name(value["name"])
        and isinstance(value.get("settings"), dict)
        and value.get("status") in STATUSES
    )
