"""Samples: the rows of evaluation, answered once and shown by every later report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from decal.errors import DataError, DecalError, OutputError
from decal.runfile import dump_run, load_run
from decal.verbs.candidates import candidates
from decal.verbs.compare import compare
from decal.verbs.report import report
from decal.verbs.rows import read_run_rows
from decal.verbs.samples import make_samples, read_samples
from decal.verbs.train import RunResult, train
from tests import zoo
from tests.verbs import test_classify
from tests.verbs.test_report import copied, sweep, unfinished


def test_evaluation_rows_are_answered_once(
    finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `compare` answers them. Mutation: training rows, or the expected answer in the prompt."""
    run = copied(finished, tmp_path / "tickets")
    report(run, samples=2)
    rows = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert len(rows) == 2
    asked = read_run_rows(load_run(run / "run.yaml")).eval.examples[:2]
    assert asked[0].messages is not None
    assert [row["expected"] for row in rows] == [
        e.messages[-1].content for e in asked if e.messages
    ]
    assert rows[0]["prompt"] == asked[0].messages[0].content
    assert list(rows[0]["outputs"]) == ["base", "tickets"]
    prompts = [row["prompt"] for row in rows]
    wanted = compare(None, {"a": str(run)}, prompts=prompts)["results"]["a"]["outputs"]
    assert [row["outputs"]["tickets"] for row in rows] == wanted
    monkeypatch.setattr("decal.verbs.report.make_samples", lambda *_: 1 / 0)
    page = report(run).read_text(encoding="utf-8")
    assert "Sample outputs" in page
    assert rows[0]["prompt"].splitlines()[-1] in page


def test_a_sweep_has_one_file_for_all(finished: RunResult, tmp_path: Path) -> None:
    """Candidates without weights are left out. Mutation: ask them all."""
    folder = sweep(finished, tmp_path / "sweep")
    found = candidates([folder])
    make_samples(found, 1)
    (row,) = json.loads((folder / "samples.json").read_text())
    assert list(row["outputs"]) == ["base", "r4", "again", "lost"]
    assert len(set(row["outputs"].values()) - {row["outputs"]["base"]}) <= 1
    assert not (folder / "r4/samples.json").exists()
    (sample,) = read_samples(found)
    assert sample.outputs == row["outputs"]


def test_runs_of_one_name_keep_their_own_answers(
    finished: RunResult, finished_plain: RunResult, tmp_path: Path
) -> None:
    """On two bases, in two groups. Mutation: one file for both, or the other's name in it."""
    first, second = copied(finished, tmp_path / "a/run"), copied(finished_plain, tmp_path / "b/run")
    found = candidates([first, second])
    make_samples(found, 1)
    for folder in (first, second):
        (row,) = json.loads((folder / "samples.json").read_text())
        assert list(row["outputs"]) == ["base", "run"]
    (sample,) = read_samples(found)
    assert list(sample.outputs) == ["base", "a/run", "b/run"]


def test_a_classifier_names_labels(tmp_path: Path) -> None:
    """Without probabilities, so that right ones are seen. Mutation: complete its texts."""
    base = zoo.save("llama_classify", tmp_path / "base")
    train_settings = {"max_steps": 3, "batch_size": 4, "lr": 1e-3}
    done = train(test_classify.settings(tmp_path, base, train=train_settings))
    assert done is not None
    report(done.run, samples=3)
    rows = json.loads((done.run / "samples.json").read_text())
    assert len(rows) == 3
    assert {row["expected"] for row in rows} <= set(test_classify.LABELS)
    assert {row["outputs"]["run"] for row in rows} <= set(test_classify.LABELS)
    assert "eval accuracy" in (done.run / "report.html").read_text()


def test_what_cannot_be_sampled_is_refused(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: an empty samples.json."""
    with pytest.raises(DecalError, match="no run has left weights"):
        make_samples(candidates([unfinished(finished, tmp_path / "killed")]), 1)
    run = copied(finished, tmp_path / "run")
    config = load_run(run / "run.yaml")
    data = config.data.model_copy(update={"eval": None})
    (run / "run.yaml").write_text(dump_run(config.model_copy(update={"data": data})))
    with pytest.raises(DataError, match="no evaluation rows"):
        make_samples(candidates([run]), 1)
    assert not (run / "samples.json").exists()


def test_a_damaged_file_is_an_error(finished: RunResult, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    for text, message in {
        "{": "cannot be read",
        "{}": "is no list of samples",
        '[{"prompt": 1, "outputs": {}}]': "is no list",
        '[{"prompt": "x", "outputs": {"base": 3}}]': "is no list",
    }.items():
        (run / "samples.json").write_text(text)
        with pytest.raises(OutputError, match=message):
            report(run)
    shutil.rmtree(run)
