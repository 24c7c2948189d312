"""`report`: of one run and of several, finished or not; and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from decal.errors import DecalError, OutputError, StorageError
from decal.report.html import MARK
from decal.train.events import Event, Note
from decal.verbs.candidates import candidates
from decal.verbs.report import facts, gather, report
from decal.verbs.train import RunResult, train
from tests.verbs.conftest import STEPS, settings


def copied(finished: RunResult, folder: Path, **result: Any) -> Path:
    """A copy of the run without its pages; `result` replaces facts of its result."""
    leave_out = shutil.ignore_patterns("*.html", "*.png", "checkpoints")
    copy = Path(shutil.copytree(finished.run, folder, ignore=leave_out))
    info = json.loads((copy / "info.json").read_text())
    info["result"] |= result
    (copy / "info.json").write_text(json.dumps(info))
    return copy


def unfinished(finished: RunResult, folder: Path) -> Path:
    """As a kill in the middle leaves it, with the last line torn."""
    copy = copied(finished, folder)
    shutil.rmtree(copy / "adapter")
    info = json.loads((copy / "info.json").read_text())
    del info["result"]
    (copy / "info.json").write_text(json.dumps(info))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 4, "lo')
    return copy


def sweep(finished: RunResult, folder: Path) -> Path:
    """A sweep with a candidate in each state."""
    copied(finished, folder / "r4")
    copied(finished, folder / "again")
    copied(finished, folder / "lost")
    unfinished(finished, folder / "now")
    states = {"r4": "done", "again": "done", "lost": "stopped", "now": "training", "r8": "waiting"}
    listed = [
        {"name": name, "settings": {"adapter.r": 4}, "status": status,
         "why": "r4 was better at step 4." if status == "stopped" else None}
        for name, status in states.items()
    ]  # fmt: skip
    document = {"grid": {"adapter.r": [4, 8]}, "candidates": listed}
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder


def test_a_run_leaves_its_report(finished: RunResult) -> None:
    """With what it needs to be shown. Mutation: train without it, or without its sizes."""
    page = (finished.run / "report.html").read_text(encoding="utf-8")
    assert MARK in page
    assert "What the adapter learned" in page
    assert (finished.run / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    (one,) = candidates([finished.run]).candidates
    assert one.finished
    assert one.trainable == finished.trainable_params
    assert one.total == finished.total_params
    assert one.nbytes == sum(f.stat().st_size for f in finished.weights.iterdir())
    assert one.steps == one.last_step == STEPS
    assert one.best is not None


def test_a_report_that_fails_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: let its error through, or do it before the result stands."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("decal.verbs.leaves.report", fail)
    told: list[Event] = []
    config = settings(tmp_path, train={"max_steps": 1, "batch_size": 2}, quant="none")
    done = train(config, observe=told.append)
    assert done is not None
    notes = [event.text for event in told if isinstance(event, Note)]
    assert notes[-1] == "the run is whole, but report.html could not be written: no ink"
    assert "result" in json.loads((done.run / "info.json").read_text())
    assert (done.run / "loss.png").exists()


def test_an_older_run_is_measured_by_its_files(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: need sizes that earlier versions did not write."""
    run = copied(finished, tmp_path / "run")
    info = json.loads((run / "info.json").read_text())
    for name in ("trainable_params", "total_params", "adapter_bytes"):
        del info["result"][name]
    (run / "info.json").write_text(json.dumps(info))
    (one,) = candidates([run]).candidates
    assert one.trainable == finished.trainable_params
    assert one.total is None
    assert one.nbytes


def test_several_runs(finished: RunResult, finished_plain: RunResult, tmp_path: Path) -> None:
    """Named after their folders, or longer where two are called alike; one page, three pictures."""
    first, second = copied(finished, tmp_path / "a/run"), copied(finished_plain, tmp_path / "b/run")
    out = tmp_path / "both.html"
    assert report([first, second], out) == out
    page = out.read_text(encoding="utf-8")
    assert "a/run" in page
    assert "b/run" in page
    assert "quant.format" in page
    pictures = sorted(file.name for file in tmp_path.glob("*.png"))
    assert pictures == ["both-loss.png", "both-quality.png", "both-spectrum.png"]
    assert not list(first.glob("*.html"))


def test_a_sweep_shows_every_state(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: recommend one that was stopped or has not ended, or leave the waiting ones out."""
    folder = sweep(finished, tmp_path / "sweep")
    found, out = gather(folder)
    assert out == folder / "report.html"
    states = {one.name: one.status for one in found.candidates}
    assert states == {"r4": "done", "again": "done", "lost": "stopped", "now": "unfinished",
                      "r8": "waiting"}  # fmt: skip
    assert not {"lost", "now", "r8"} & set(found.advice.names)
    page = report(folder).read_text(encoding="utf-8")
    assert "lost was stopped at step 8 of 8: r4 was better at step 4." in page
    assert "r8 is waiting" in page
    assert "adapter.r = 4, 8" in page
    assert sorted(file.name for file in folder.glob("*.png")) == ["loss.png", "quality.png"]
    plain = facts(found, out)
    assert json.loads(json.dumps(plain)) == plain
    assert [one["name"] for one in plain["candidates"]] == [one.name for one in found.candidates]


def test_a_killed_run_has_a_report(finished: RunResult, tmp_path: Path) -> None:
    run = unfinished(finished, tmp_path / "run")
    page = report(run).read_text(encoding="utf-8")
    assert "run has not ended: it is at step 3 of 8" in page
    assert "What the adapter" not in page
    assert (run / "loss.png").exists()


def test_a_full_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No adapter, no spectrum; samples of the model itself. Mutation: look for an adapter."""
    monkeypatch.setattr("decal.verbs.samples._LONGEST", 3)
    config = settings(
        tmp_path,
        quant="none",
        adapter={"method": "full"},
        train={"max_steps": 2, "batch_size": 2, "lr": 1e-4},
    )
    done = train(config)
    assert done is not None
    (one,) = candidates([done.run]).candidates
    assert one.method == "full"
    assert one.r is None
    assert one.trainable == one.total == done.total_params
    page = report(done.run, samples=1).read_text(encoding="utf-8")
    assert "What the adapter" not in page
    (sample,) = json.loads((done.run / "samples.json").read_text())
    assert list(sample["outputs"]) == ["base", "run"]


def test_what_is_no_run_is_refused(finished: RunResult, tmp_path: Path) -> None:
    """Each with what to do. Mutation: an empty page, or a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("x")
    for path, message in {
        tmp_path / "nothing": "there is nothing at",
        tmp_path / "file": "is a file",
        tmp_path / "empty": "is empty",
        tmp_path / "other": "is neither a run nor a sweep",
        finished.weights: r"neither a run nor a sweep\nhint: `decal inspect .* --spectrum`",
        finished.run.parent: r"hint: there are runs in it: `decal report .*run`",
    }.items():
        with pytest.raises(DecalError, match=message):
            report(path)
    with pytest.raises(DecalError, match="no folder"):
        report([])
    with pytest.raises(DecalError, match="is named twice"):
        report([finished.run, finished.run], tmp_path / "x.html")


def test_damaged_files_are_errors(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: a curve with a hole in it, or a sweep without some of its candidates."""
    run = copied(finished, tmp_path / "run")
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("nonsense\n" + good)
    with pytest.raises(StorageError, match=r"1 of .* lines are damaged"):
        report(run)
    (run / "metrics.jsonl").write_text(good)
    (run / "info.json").write_text("{")
    with pytest.raises(OutputError, match=r"info\.json"):
        report(run)
    folder = sweep(finished, tmp_path / "sweep")
    for text, message in {
        "[]": "holds no JSON object",
        '{"candidates": []}': "lists no candidates",
        '{"candidates": [{"name": "../x", "status": "done"}]}': "candidate that is none",
        '{"candidates": [{"name": "..", "status": "done"}]}': "candidate that is none",
        '{"candidates": [{"name": "x", "status": "lost"}]}': "candidate that is none",
    }.items():
        (folder / "sweep.json").write_text(text)
        with pytest.raises(OutputError, match=message):
            report(folder)


def test_what_cannot_be_read_beside_is_said(finished: RunResult, tmp_path: Path) -> None:
    """Settings of a later version, an adapter that was cut off. Mutation: no report at all."""
    run = copied(finished, tmp_path / "run")
    (run / "run.yaml").write_text("bse: x\n")
    (run / "adapter/adapter_model.safetensors").write_bytes(b"xx")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 3.0}\n')
    page = report(run).read_text(encoding="utf-8")
    assert "its settings cannot be read" in page
    assert "its adapter cannot be read" in page


def test_only_reports_are_replaced(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: overwrite whatever is there, or refuse the last report."""
    run = copied(finished, tmp_path / "run")
    out = tmp_path / "mine.html"
    out.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="is no report of decal's"):
        report(run, out)
    assert out.read_text() == "<p>mine</p>"
    report(run, out, force=True)
    report(run, out)
    with pytest.raises(OutputError, match="is a folder"):
        report(run, tmp_path)


def test_names_from_files_do_not_act(finished: RunResult, tmp_path: Path) -> None:
    """A folder's name is a text of somebody's. Mutation: paste it."""
    run = copied(finished, tmp_path / "<img src=x onerror=alert(1)>")
    page = report(run).read_text(encoding="utf-8")
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_result_shows_itself_in_a_notebook(finished: RunResult) -> None:
    """In short, and with figures. Mutation: the dataclass's own text, with model and tokens."""
    assert len(repr(finished)) < 2000
    assert repr(finished).startswith("RunResult(run=")
    shown = finished._repr_html_()
    assert "report.html" in shown
    assert f"{finished.trainable_params:,}" in shown
    for figure in (finished.plot(), finished.spectrum()):
        assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
