"""The run folder: everything one training leaves, written so that it can be killed at any moment.

    run.yaml        the settings, as text
    info.json       versions, machine, threads, the base's fingerprint, the quantizer's identity
    metrics.jsonl   one JSON object per line; NaN and infinity become null
    report.html, loss.png, spectrum.png         for people; samples.json where outputs were sampled
    tensorboard/ and wandb/     where train.report_to asks for them
    checkpoints/step-00000100/{trainable,optimizer}.safetensors, state.json
    adapter/ or model/      the result

A checkpoint is a folder that is written beside, forced to disk and renamed. Its state.json holds
the sha256 of every other file and of the state itself, so a checkpoint that a failing disk or a
copy damaged is found out before it is used, and the one before it is taken. One process at a time
may hold the folder: the lock is the kernel's (flock), so a killed process cannot leave it locked.

Knows no optimizer, no model and no schedule: tensors by name, and a state that is plain JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from decal.errors import DecalError, OutputError, StorageError
from decal.store.files import (
    JSON_LIMIT,
    atomic_folder,
    check_free,
    file_lock,
    is_leftover,
    read_json,
    require_space,
    sweep,
    write_json,
    write_text,
    writing,
)
from decal.store.tensorfile import load_tensors, read_header, save_tensors
from decal.untrusted import parse_json, read_bounded

__all__ = ["Checkpoint", "RunFolder"]

_STEP = re.compile(r"step-(\d{8,})")
_KEPT = 2
"""Newest checkpoints that rotation leaves, each with the best one it knew; two, so that one may
turn out damaged."""
_OWN = (
    "run.yaml",
    "info.json",
    "metrics.jsonl",
    "loss.png",
    "spectrum.png",
    "report.html",
    "samples.json",
    "tensorboard",
    "wandb",
    "checkpoints",
    "adapter",
    "model",
)
"""What an earlier run may have left, removed when another begins in its folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found sound."""

    step: int
    path: Path
    state: dict[str, Any]
    warning: str | None = None
    """Set if a newer checkpoint was damaged and passed over: one sentence for the user."""

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors written under `stem`, on the CPU, in memory of their own.

        Raises StorageError if there are none or the file became unreadable.
        """
        file = read_header(self.path / f"{stem}.safetensors", StorageError)
        try:
            return load_tensors(file)
        except OSError as error:
            raise StorageError(f"`{file.path}` cannot be read: {error.strerror}") from error


class RunFolder:
    """One run's folder, held by this process until `close` (or the end of a `with` block).

    Make one with `create` or `open`.
    """

    def __init__(self, path: Path, lock: int):
        self.path = path
        self._lock = lock

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], settings: str, *, force: bool = False
    ) -> RunFolder:
        """Begins a run: the folder, held, with `settings` in run.yaml.

        With `force`, what an earlier run left is removed; files that are no run's stay.

        Raises:
            OutputError: the folder is not empty, or another process trains into it.
            StorageError: the disk refused.
        """
        out = Path(path)
        cls.check_new(out, force=force)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        run = cls(out, hold(out))
        try:
            with writing(out):
                for name in _OWN:
                    remove(out / name)
            write_text(out / "run.yaml", settings)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def check_new(cls, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Raises OutputError if `create` would; writes nothing."""
        out = Path(path)
        hint = "go on with --resume, start over with --force, or choose another output"
        if not _never_began(out):
            check_free(out, force=force, hint=hint)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Holds the folder of a run that began earlier.

        Raises:
            OutputError: there is no run, or another process trains into it.
        """
        out = Path(path)
        if not (out / "run.yaml").is_file():
            raise OutputError(f"`{out}` holds no run", hint="start one without --resume")
        return cls(out, hold(out))

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder for reading only, not held: another process may be training into it."""
        return cls(Path(path), -1)

    def close(self) -> None:
        """Lets the folder go. Closing twice is fine."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> str:
        """The text of run.yaml."""
        path = self.path / "run.yaml"
        try:
            return read_bounded(path, JSON_LIMIT).decode("utf-8")
        except OSError as error:
            raise OutputError(f"`{path}` cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise OutputError(f"`{path}` is damaged: {error}") from error

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replaces info.json."""
        write_json(self.path / "info.json", _finite(dict(info)))

    def info(self) -> dict[str, Any]:
        """What info.json says; empty if there is none. Raises OutputError if it is damaged."""
        path = self.path / "info.json"
        return read_json(path, OutputError) if path.exists() else {}

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl and hands it to the system at once.

        A number that is not finite becomes null: NaN is no JSON.
        """
        line = json.dumps(_finite(dict(row)), allow_nan=False) + "\n"
        with writing(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that a kill cut short is left out.

        Raises StorageError, naming the first, if other lines are damaged: nothing that decal does
        leaves such lines, and curves with silent holes are worse than none.
        """
        if not self._metrics.exists():
            return []
        with writing(self._metrics):
            lines = self._metrics.read_bytes().splitlines()
        rows = [_row(line) for line in lines]
        if rows and rows[-1] is None:
            rows.pop()
        damaged = [number for number, row in enumerate(rows, 1) if row is None]
        if damaged:
            raise StorageError(
                f"`{self._metrics}`: {len(damaged)} of {len(lines)} lines are damaged",
                details=[f"line {damaged[0]}: {lines[damaged[0] - 1][:60]!r}"],
                hint="restore the file, or remove these lines to go on without their steps",
            )
        return [row for row in rows if row is not None]

    def truncate_metrics(self, step: int) -> None:
        """Drops the rows after `step`, which a resumed run writes again, and a torn last line."""
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
        write_text(self._metrics, text)

    def write_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        best: int | None = None,
    ) -> Path:
        """Writes checkpoints/step-N, then removes all but the newest two and the best of each.

        Checkpoints of later steps go too: they are damaged ones that a resumed run had passed over.

        `tensors` maps file stems to CPU tensors. `state` is plain JSON without NaN; floats come
        back to the bit. Raises StorageError if the disk refuses; older checkpoints are then as they
        were.
        """
        folder = self._checkpoints / f"step-{step:08d}"
        plain = json.loads(json.dumps(dict(state), allow_nan=False))
        with atomic_folder(folder, force=True) as place:
            for stem, named in tensors.items():
                save_tensors(place / f"{stem}.safetensors", named, {"format": "pt"})
            self._sync_metrics()
            document = {
                "step": step,
                "best": best,
                "sha256": {file.name: _hash(file) for file in sorted(place.iterdir())},
                "state_sha256": _state_hash(plain),
                "state": plain,
            }
            write_json(place / "state.json", document)
        self.rotate(step)
        return folder

    def require_space(self, checkpoint: int, count: int, result: int) -> None:
        """Raises StorageError unless the disk has room for what a run will hold at once.

        That is `count` checkpoints of `checkpoint` bytes, but no more than rotation keeps and one
        that is being written, and the `result`; what earlier sittings left counts as there.
        """
        held = [self._checkpoints / f"step-{step:08d}" for step in self.steps()]
        with writing(self._checkpoints):
            there = sum(file.stat().st_size for folder in held for file in folder.iterdir())
        needed = checkpoint * min(count, 2 * _KEPT + 1) + result - there
        if needed > 0:
            require_space(self.path, needed)

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of one step. Raises StorageError if it is missing or damaged."""
        folder = self._checkpoints / f"step-{step:08d}"
        if not folder.is_dir():
            raise StorageError(f"run `{self.path}` has no checkpoint of step {step}")
        return _read_checkpoint(folder)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest sound checkpoint, or None if the run has none yet.

        Where a newer one is damaged, `warning` says so. Raises StorageError if all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = _read_checkpoint(self._checkpoints / f"step-{step:08d}")
            except DecalError as error:
                damaged.append(error.message)
                continue
            if not damaged:
                return found
            warning = f"going back to step {found.step}, because {damaged[0]}"
            return Checkpoint(found.step, found.path, found.state, warning)
        if damaged:
            raise StorageError(
                f"run `{self.path}`: none of its {len(damaged)} checkpoints is sound",
                details=damaged[:1],
                hint="start over with --force, or choose another output",
            )
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        if not self._checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(folder.name) for folder in self._checkpoints.iterdir())
        return sorted(int(m[1]) for m in found if m)

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _sync_metrics(self) -> None:
        """Forces metrics to disk before the checkpoint that goes on from them."""
        with suppress(FileNotFoundError), self._metrics.open("rb") as file:
            os.fsync(file.fileno())

    def rotate(self, newest: int) -> None:
        """Removes all checkpoints but two up to `newest` and those that were the best at the time.

        Writing does it; a resumed run does it too, because the one before may have been killed in
        the middle of it.
        """
        with writing(self._checkpoints):
            sweep(self._checkpoints)
            steps = self.steps()
            last = [step for step in steps if step <= newest][-_KEPT:]
            kept = {*last, *(self._best_at(step) for step in last)}
            for step in steps:
                if step not in kept:
                    remove(self._checkpoints / f"step-{step:08d}")

    def _best_at(self, step: int) -> int | None:
        """The step whose weights were the best when the checkpoint of `step` was written."""
        try:
            document = read_json(self._checkpoints / f"step-{step:08d}/state.json", StorageError)
        except StorageError:  # damaged: nothing will go on from it
            return None
        best = document.get("best")
        return best if isinstance(best, int) else None


def _never_began(out: Path) -> bool:
    """The folder holds no more than a run leaves that was killed before its settings stood."""
    if not out.is_dir():
        return False
    with writing(out):
        return all(f.name == ".lock" or is_leftover(f.name) for f in out.iterdir())


def hold(out: Path) -> int:
    """Takes the folder's lock, and clears what a killed process left half written."""
    with writing(out):
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if file_lock(handle):
        with suppress(OSError):  # a full disk: the lock holds, only its owner's id is not known
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        with writing(out):
            sweep(out)
        return handle
    owner = os.pread(handle, 32, 0).decode("ascii", "replace")
    os.close(handle)
    raise OutputError(
        f"another process (id {owner or 'unknown'}) trains into `{out}`",
        hint="wait for it, stop it, or choose another output",
    )


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _row(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None if it is not what was written."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step", 0)) is not int:
        return None
    numbers = [row.get(name) for name in ("loss", "eval_loss")]
    return row if all(n is None or type(n) in (int, float) for n in numbers) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_hash(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_checkpoint(folder: Path) -> Checkpoint:
    document = read_json(folder / "state.json", StorageError)
    manifest: Any = document.get("sha256")
    state: Any = document.get("state")
    complete = isinstance(manifest, dict) and isinstance(state, dict)
    complete = complete and type(document.get("step")) is int
    if not complete or _state_hash(state) != document.get("state_sha256"):
        raise StorageError(f"`{folder / 'state.json'}` is not what was written")
    for name, digest in manifest.items():
        file = folder / Path(name).name
        try:
            found = _hash(file)
        except OSError as error:
            raise StorageError(f"`{file}` cannot be read: {error.strerror}") from error
        if found != digest:
            raise StorageError(f"`{file}` is not what was written")
    return Checkpoint(document["step"], folder, state)
