"""The sweep folder: one process, a state that is whole, and what --force may remove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.errors import OutputError
from decal.store.run import RunFolder
from decal.store.sweep import PICTURES, STATUSES, SweepFolder


def state(*names: str, status: str = "waiting") -> dict[str, Any]:
    listed = [{"name": n, "settings": {}, "status": status, "why": None} for n in names]
    return {"grid": {"adapter.r": [4]}, "candidates": listed}


def test_create_write_and_open(tmp_path: Path) -> None:
    """Fails when the state is not replaced, or the settings are not the text that was given."""
    with SweepFolder.create(tmp_path / "deep" / "s", "base: x\n", state("r4")) as sweep:
        assert sweep.read() == state("r4")
        sweep.write(state("r4", "r8", status="done"))
    with SweepFolder.open(tmp_path / "deep" / "s") as sweep:
        assert sweep.settings == "base: x\n"
        assert sweep.read() == state("r4", "r8", status="done")
    with pytest.raises(OutputError, match="holds no sweep") as caught:
        SweepFolder.open(tmp_path)
    assert caught.value.hint == "start one without --resume"


def test_a_second_sweep_is_refused_or_replaces_what_is_a_sweeps(tmp_path: Path) -> None:
    """Fails when a file of the user's goes with --force, or a candidate of the old sweep stays."""
    path = tmp_path / "s"
    SweepFolder.create(path, "old", state("r4", "r8")).close()
    RunFolder.create(path / "r4", "run").close()
    for name in ("notes.txt", "photo.png", "report.html", *PICTURES):
        (path / name).write_text("x")
    with pytest.raises(OutputError, match="not empty") as caught:
        SweepFolder.create(path, "new", state("r16"))
    assert "--resume" in str(caught.value.hint)
    assert "--force" in str(caught.value.hint)
    with SweepFolder.create(path, "new", state("r16"), force=True) as sweep:
        assert sweep.settings == "new"
    left = {file.name for file in path.iterdir()} - {".lock"}
    assert left == {"notes.txt", "photo.png", "sweep.yaml", "sweep.json"}


def test_a_folder_is_held(tmp_path: Path) -> None:
    """Fails when two sweeps may write into one folder."""
    with (
        SweepFolder.create(tmp_path / "s", "x", state("r4")),
        pytest.raises(OutputError, match="another process"),
    ):
        SweepFolder.open(tmp_path / "s")
    SweepFolder.open(tmp_path / "s").close()


@pytest.mark.parametrize("name", ["..", ".", "", "/", "../other", "a/b", str(Path.home())])
def test_names_that_lead_out_of_the_folder_remove_nothing(tmp_path: Path, name: str) -> None:
    """A stranger's sweep.json. Fails when --force follows it."""
    (tmp_path / "other").mkdir()
    path = tmp_path / "s"
    SweepFolder.create(path, "x", state("r4")).close()
    (path / "sweep.json").write_text(json.dumps(state(name)))
    with pytest.raises(OutputError, match="damaged"):
        SweepFolder.create(path, "y", state("r4"), force=True)
    assert (tmp_path / "other").is_dir()
    assert (path / "sweep.yaml").read_text() == "x"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"candidates": 3}', '{"candidates": [{"name": "r4"}]}', '{"candidates": ['],
)
def test_a_damaged_state_is_said(tmp_path: Path, text: str) -> None:
    """Fails when it is taken for a sweep without candidates."""
    SweepFolder.create(tmp_path / "s", "x", state("r4")).close()
    (tmp_path / "s" / "sweep.json").write_text(text)
    with SweepFolder.open(tmp_path / "s") as sweep, pytest.raises(OutputError):
        sweep.read()


def test_unknown_statuses_are_damage(tmp_path: Path) -> None:
    SweepFolder.create(tmp_path / "s", "x", state("r4")).close()
    for status in STATUSES:
        with SweepFolder.open(tmp_path / "s") as sweep:
            sweep.write(state("r4", status=status))
            sweep.read()
    with SweepFolder.open(tmp_path / "s") as sweep:
        sweep.write(state("r4", status="lost"))
        with pytest.raises(OutputError, match="lists no candidates"):
            sweep.read()
