"""A disk that is full, read-only or faulty: a clear error, nothing lost, and the run goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from decal.errors import BaseModelError, DataError, OutputError, StorageError
from decal.store.run import RunFolder
from decal.train import train as train_job
from decal.train.events import Event, Note
from decal.verbs.train import train
from tests.chaos import server
from tests.chaos.points import GROWS, OTHERWISE, Points, install
from tests.chaos.same import assert_same_training, leftovers
from tests.train.tiny_run import TinyModel, job


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Disk:
    """Refuses the point of this number and all later ones that need room, until it is freed."""

    def __init__(self, first: int, number: int = errno.ENOSPC):
        self.first, self.number = first, number
        self.grown = 0

    def decide(self, phase: str, kind: str, number: int) -> tuple[str, Callable[[], None]] | None:
        if kind not in GROWS:
            return None
        self.grown += 1
        return ("torn", self.refuse) if self.grown >= self.first else None

    def refuse(self) -> None:
        raise OSError(self.number, os.strerror(self.number))

    @contextmanager
    def under(self, root: Path) -> Iterator[None]:
        undo = install(Points(self.decide), root)
        try:
            yield
        finally:
            undo()


def tiny(path: Path, observe: Callable[[Event], None] = lambda event: None) -> None:
    """Trains the tiny model as `decal train` would: resumed where a run has begun."""
    begun = (path / "run.yaml").exists()
    with RunFolder.open(path) if begun else RunFolder.create(path, "tiny\n") as run:
        model = TinyModel(noise=0.1)
        train_job(
            job(run, model, max_steps=8, eval_every=3, save_every=2, observe=observe, resume=begun)
        )


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_write(tmp_path: Path, stride: int) -> None:
    """Writes, fsyncs, mkdirs and renames of a run in turn, torn in the middle; then space is made.

    Fails when an OSError gets through, when the error is not a storage error of exit code 1, or
    when anything of the run is lost.
    """
    tiny(tmp_path / "straight")
    endless = Disk(1 << 30)
    with endless.under(tmp_path):
        tiny(tmp_path / "counted")
    assert endless.grown > 100
    for first in range(1, endless.grown + 1, stride):
        path = tmp_path / f"full-{first}"
        try:
            with Disk(first).under(tmp_path):
                tiny(path)
            # Only the folder's own fsync may fail unsaid: some systems have none for folders.
            assert first == endless.grown
        except StorageError as error:
            assert (error.exit_code, "full" in error.message) == (1, True)  # noqa: PT017
        before = RunFolder.look(path).steps()
        tiny(path)
        assert_same_training(tmp_path / "straight", path)
        assert not before or RunFolder.look(path).steps()[-1] >= before[-1]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_other_refusals_are_said_too(tmp_path: Path, number: int) -> None:
    """Fails when only a full disk has words."""
    said = {errno.EROFS: "read-only", errno.EACCES: "no permission", errno.EDQUOT: "full"}
    with (
        Disk(1, number).under(tmp_path),
        pytest.raises(StorageError, match=said.get(number, "could not be written")) as caught,
    ):
        tiny(tmp_path / "run")
    assert caught.value.exit_code == 1
    assert "run" in caught.value.message


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "flipped": _flip,
    "empty": lambda file: file.write_bytes(b"") and None,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_found_out(tmp_path: Path, name: str, damage: str) -> None:
    """The newest is damaged: it is said, the one before is taken, and the end is the same.

    Fails when a file is read without its hash.
    """

    class StopError(Exception):
        pass

    def stop(event: Event) -> None:
        if getattr(event, "step", 0) == 7:
            raise StopError

    tiny(tmp_path / "straight")
    path = tmp_path / "run"
    with pytest.raises(StopError):
        tiny(path, observe=stop)
    DAMAGES[damage](path / "checkpoints" / "step-00000006" / name)
    notes: list[str] = []
    tiny(path, observe=lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert len(notes) == 1
    assert notes[0].startswith("going back to step 4, because `")
    assert name in notes[0]
    assert_same_training(tmp_path / "straight", path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    server.write_inputs(root)
    return root


def test_a_disk_that_is_full_at_the_end(inputs: Path) -> None:
    """A real run whose adapter, plot or result cannot be written; resumed, they are.

    Fails when the end of a run that has trained all its steps cannot be done again.
    """
    train(server.settings(inputs, "straight", "nf4"))
    config = server.settings(inputs, "full", "nf4")
    disk = Disk(1)
    for where in ("save", "end"):
        saved = False

        def decide(phase: str, kind: str, number: int) -> Any:
            nonlocal saved
            saved = saved or phase == "save"
            now = "end" if saved and phase == OTHERWISE else phase
            return disk.decide(phase, kind, number) if now == where else None  # noqa: B023

        undo = install(Points(decide), inputs)
        try:
            with pytest.raises(StorageError, match="full"):
                train(config, resume=where == "end")
        finally:
            undo()
        assert (inputs / "full" / "adapter").exists() == (where == "end")
        assert "result" not in RunFolder.look(config.output).info()
    train(config, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours = (inputs / "full" / "adapter" / name).read_bytes()
        assert ours == (inputs / "straight" / "adapter" / name).read_bytes()
    assert "result" in RunFolder.look(config.output).info()
    assert leftovers(inputs / "full") == []


def test_a_cut_base_and_damaged_rows_are_named(inputs: Path) -> None:
    """The files and the row. Fails when a run folder is begun before its inputs are read."""
    config = server.settings(inputs, "never", "nf4")
    weights, rows = inputs / "base" / "model.safetensors", inputs / "rows.jsonl"
    for file, kind, words in (
        (weights, BaseModelError, "cannot be loaded"),
        (rows, DataError, "rows.jsonl"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) * 2 // 3 + 3])
        try:
            with pytest.raises(kind) as caught:
                train(config)
        finally:
            file.write_bytes(whole)
        assert words in str(caught.value)
        assert not Path(config.output).exists()


def test_two_processes_in_one_folder(inputs: Path) -> None:
    """The second is refused and told of the first. Fails when a resume asks for no lock."""
    config = server.settings(inputs, "straight-2", "nf4")
    with (
        RunFolder.create(config.output, "x\n"),
        pytest.raises(OutputError, match=f"another process \\(id {os.getpid()}\\) trains into"),
    ):
        train(config, resume=True)


def test_room_is_asked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five checkpoints and the result, less what is there. Fails when a run finds out later."""
    free = [1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free[0]))
    with pytest.raises(StorageError, match=r"needs [\d.]+ kB, its disk has 1 B free"):
        tiny(tmp_path / "run")
    assert RunFolder.look(tmp_path / "run").metrics() == []
    numbers = sum(p.numel() for p in TinyModel().parameters.values())
    free[0] = 4 * numbers * (5 * 3 + 1)  # five of weights and two moments, and the result
    tiny(tmp_path / "run")
    free[0] = 1
    with pytest.raises(StorageError, match="needs"):
        tiny(tmp_path / "other")
    held = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints").rglob("*.*"))
    assert held > free[0]
    tiny(tmp_path / "run")  # what it needs lies there already
