"""What check finds, in words and as plain values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decal import demo
from decal.errors import DataError
from decal.kernels import native
from decal.train.events import Event, Note
from decal.verbs import check as subject
from decal.verbs.check import Check, check
from decal.verbs.findings import Finding, before, machine
from decal.verbs.inputs import look
from decal.verbs.overfit import Learning
from decal.verbs.train import train
from tests import zoo
from tests.verbs.conftest import settings
from tests.verbs.test_classify import settings as classifier

PLAIN = {"max_steps": 8, "batch_size": 8, "lr": 2e-3}
"""Without evaluation: for runs that hold out no rows."""
KEYS = ["ready", "findings", "data", "targets", "model", "learning", "samples", "seconds"]


def rows(path: Path, texts: list[tuple[str, str]]) -> str:
    """Chats of one question and its answer."""
    roles = ("user", "assistant")
    chats = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
             for pair in texts]  # fmt: skip
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return str(path)


def texts(findings: Any, level: str) -> str:
    return "\n".join(f.line() for f in findings if f.level == level)


def cheap(config: Any, level: str) -> str:
    """Findings of a level that need no weights."""
    found = look(config)
    assert not found.problems
    return texts(before(found), level)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """A run with nothing to complain about."""
    return check(settings(tmp_path_factory.mktemp("sound")))


def test_a_sound_run_is_ready(sound: Check) -> None:
    """Mutations: take a note for a problem; look at the learning only."""
    assert sound.ready
    findings = [finding for finding in sound.findings if finding.area != "machine"]
    assert {finding.level for finding in findings} <= {"ok", "note"}
    areas = [finding.area for finding in findings]
    assert areas == sorted(areas, key=["data", "targets", "model", "learning"].index)
    assert set(areas) == {"data", "targets", "model", "learning"}


def test_everything_is_there_as_plain_values(sound: Check) -> None:
    """Mutations: drop a key; leave out what was measured."""
    found = json.loads(json.dumps(sound.as_dict()))
    assert list(found) == KEYS
    assert found["data"]["train_rows"] == 72
    assert found["data"]["ended_rows"] == 72
    assert found["data"]["duplicates_with_eval"] == {"rows": 0, "first": None, "other_label": 0}
    assert len(found["targets"]["modules"]) == 28
    assert found["targets"]["trainable_params"] == 4 * (311_296 // 16)
    assert found["model"]["embedding_rows"] == found["model"]["tokenizer_tokens"] == 2048
    assert found["model"]["tied"] is True
    assert 4 < found["model"]["bits_per_weight"] < 7
    assert len(found["model"]["fingerprint"]) == 64
    assert found["model"]["flattened"] is True
    assert found["model"]["leak"] < 5e-2
    assert found["learning"]["verdict"] == "learned"
    pieces = found["samples"][0]["pieces"]
    assert [piece["trained"] for piece in pieces] == [False, True, False]
    assert found["findings"][0].keys() == {"area", "level", "text", "details", "hint"}


def test_all_that_is_wrong_is_found_at_once(tmp_path: Path) -> None:
    """Nothing is loaded for it. Mutations: raise; let rows hide targets."""
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "usr", "content": "x"}]}) + "\n")
    data = {"path": str(path), "eval": None}
    config = settings(tmp_path, data=data, adapter={"target_modules": ["q_pro"]}, train=PLAIN)
    found = check(config)
    problems = [finding for finding in found.findings if finding.level == "problem"]
    assert [problem.area for problem in problems] == ["data", "targets"]
    assert all(problem.hint for problem in problems)
    assert not found.ready
    assert found.learning is None
    assert list(found.as_dict()) == KEYS


def test_what_only_the_weights_tell(tmp_path: Path) -> None:
    """Mutation: let the error of loading through."""
    base = zoo.save("llama", tmp_path / "base")
    tensors = base / "model.safetensors"
    zoo.rewrite(base, lambda held: {k: t for k, t in held.items() if "layers.1.mlp.up" not in k})
    assert tensors.exists()
    data = {"path": settings(tmp_path).data.path, "max_length": 512}
    found = check(settings(tmp_path, base=str(base), quant="none", data=data))
    assert "tensors are missing" in "".join(d for f in found.findings for d in f.details)
    assert not found.ready


def test_duplicates_are_counted_and_named(tmp_path: Path) -> None:
    """Mutations: compare training rows with themselves only; name the wrong pair."""
    pairs = [(f"question {i}", f"answer {i}") for i in range(9)]
    train_rows = rows(tmp_path / "train.jsonl", [*pairs, pairs[2]])
    held_out = rows(tmp_path / "eval.jsonl", [("new", "one"), ("question  4 ", "answer 4")])
    config = settings(tmp_path, data={"path": train_rows, "eval": held_out})
    said = cheap(config, "warning")
    assert f"1 of 2 (50.0%) evaluation rows have the text of a training row: first row 2 of " \
        f"{held_out}, the same as row 5" in said  # fmt: skip
    assert "1 of 10 (10.0%) training rows repeat an earlier one: first row 10, the same as row 3" \
        in said  # fmt: skip


def test_a_missing_library_is_said_before_it_costs_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: stay silent; warn where DECAL_ISA=off asked for it or a GPU computes."""
    monkeypatch.delenv("DECAL_ISA", raising=False)
    monkeypatch.setattr(native, "available", lambda: ("portable",))
    assert machine() == []
    monkeypatch.setattr(native, "available", lambda: ())
    monkeypatch.setattr(native, "why", lambda: "not built")
    (finding,) = machine()
    assert finding.level == "warning"
    assert "not built" in finding.line()
    assert "C++ compiler" in finding.line()
    monkeypatch.setenv("DECAL_ISA", "off")
    assert machine() == []
    monkeypatch.delenv("DECAL_ISA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine() == []


def test_rows_that_are_cut(tmp_path: Path) -> None:
    """An end that is never trained is a problem, a few cut rows are a note. Mutations: count
    tokens for rows; take any cut row for a problem."""
    answer = " ".join(["word"] * 40)
    path = rows(tmp_path / "cut.jsonl", [(f"say {i}", answer) for i in range(4)])
    data = {"path": path, "max_length": 24, "eval": None}
    found = look(settings(tmp_path, data=data, train=PLAIN))
    findings = before(found)
    assert "4 of 4 (100.0%) rows are cut" in texts(findings, "warning")
    assert "trained in none of 4 rows" in texts(findings, "problem")
    short = [(f"say {i}", "yes") for i in range(30)]
    path = rows(tmp_path / "mixed.jsonl", [*short, ("say", answer)])
    config = settings(tmp_path, data={**data, "path": path}, train=PLAIN)
    assert "1 of 31 (3.2%) rows are cut" in cheap(config, "note")
    assert "rows are" not in cheap(config, "warning")


def test_train_stops_at_problems_and_tells_warnings(tmp_path: Path) -> None:
    """Unless it is told not to check. Mutations: check in spite of it; keep warnings back; run
    the parts twice."""
    answer = " ".join(["word"] * 40)
    path = rows(tmp_path / "cut.jsonl", [(f"say {i % 3}", answer) for i in range(4)])
    data = {"path": path, "max_length": 24, "eval": None}
    config = settings(tmp_path, data=data, train=PLAIN)
    seen: list[Event] = []
    with pytest.raises(DataError, match="trained in none of 4 rows") as caught:
        train(config, dry_run=True, observe=seen.append)
    assert "--no-check trains anyway" in str(caught.value)
    warned = [event.text for event in seen if isinstance(event, Note) and event.warning]
    assert len([text for text in warned if "training rows repeat an earlier one" in text]) == 1
    seen.clear()
    train(config, dry_run=True, check=False, observe=seen.append)
    assert seen == []


def test_classes(tmp_path: Path) -> None:
    """Mutations: call any classes uneven; go by the first class."""
    base = zoo.save("bert", tmp_path / "base")
    even = classifier(tmp_path, base)
    assert "3 classes, from 12 rows" in cheap(even, "ok")
    path = tmp_path / "uneven.jsonl"
    few = [{"text": f"t {i}", "label": "rare" if i < 2 else "usual"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in few))
    uneven = classifier(tmp_path, base, data={"path": str(path), "eval": None})
    assert "uneven classes: 2 classes, from 2 rows (rare) to 28 (usual)" in cheap(uneven, "warning")


def test_a_classifier_is_checked_to_the_end(tmp_path: Path) -> None:
    """Mutations: mark tokens of rows that train none; probe flattening where rows are pooled."""
    found = check(classifier(tmp_path, zoo.save("bert", tmp_path / "base")))
    assert found.learning is not None
    assert found.learning.verdict == "learned"
    assert found.samples[0].label in ("cold", "hot", "mild")
    assert found.as_dict()["model"]["leak"] is None
    assert "evaluation rows have the text" in texts(found.findings, "warning")


def test_tied_heads(tmp_path: Path) -> None:
    """Mutations: ask for the head's name only; forget modules trained whole."""
    plain = {"r": 4, "target_modules": ["q_proj"]}
    assert "the adapter leaves it as it is" in cheap(settings(tmp_path, adapter=plain), "ok")
    for change in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ):
        said = cheap(settings(tmp_path, adapter={**plain, **change}), "note")
        assert "merging writes them apart, 1.0 MB more" in said


def test_more_rank_than_a_layer_has(tmp_path: Path) -> None:
    """Mutation: compare with the larger side."""
    adapter = {"r": 129, "target_modules": ["q_proj", "k_proj"]}
    said = cheap(settings(tmp_path, adapter=adapter), "warning")
    assert "r is 129 on k_proj, whose smaller side is 128 (1 of 2 kinds of layers)" in said


def test_the_beginning_of_rows(tmp_path: Path) -> None:
    """Mutation: look at the tokenizer and not at the rows."""
    data = {"path": settings(tmp_path).data.path, "max_length": 512}
    base = str(zoo.save("llama", tmp_path / "base"))
    config = settings(tmp_path, base=base, quant="none", data=data)
    assert "every row begins with one <s>" in cheap(config, "ok")
    assert "nothing here writes one" in cheap(settings(tmp_path), "ok")


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    """None of them is used. Mutation: count tokens instead of ids."""
    base = zoo.save("llama", tmp_path / "base")
    tokenizer = zoo.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(6)]})
    tokenizer.save_pretrained(base)
    data = {"path": settings(tmp_path).data.path, "max_length": 512}
    said = cheap(settings(tmp_path, base=str(base), quant="none", data=data), "warning")
    assert "2 tokens have none, first `<x4>` (263)" in said


def test_an_output_in_use_is_a_warning(tmp_path: Path, sound: Check) -> None:
    """Mutation: call the run not ready for it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (found,) = subject._output(settings(tmp_path))
    assert (found.level, found.area) == ("warning", "settings")


@pytest.mark.parametrize(
    ("verdict", "level"),
    [("learned", "ok"), ("unclear", "note"), ("skipped", "note"), ("failed", "problem")],
)
def test_verdicts(verdict: Any, level: str) -> None:
    """Mutation: be ready in spite of a run that learns nothing."""
    found = Learning(verdict=verdict, reason="so it is", losses=(2.0, 1.0))
    findings = subject._learning(found, None)  # type: ignore[arg-type]
    assert [(f.level, f.details) for f in findings] == [(level, ("█▅",))]
    assert Check(findings=tuple(findings)).ready == (verdict != "failed")


def test_line_of_a_finding() -> None:
    """Mutation: drop the hint."""
    found = Finding(area="data", level="warning", text="rows are gone", hint="look for them")
    assert found.line() == "rows are gone (look for them)"
    assert replace(found, hint=None).line() == "rows are gone"


def test_the_demo_task_has_no_leak() -> None:
    """Rows for training and testing differ in text. Mutation: none; it guards the demo."""
    known = {row.prompt for row in demo.rows("train")}
    assert not known & {row.prompt for row in demo.rows("test")}
