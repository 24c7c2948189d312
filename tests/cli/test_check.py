"""What `decal check` prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decal.cli import check as command
from decal.cli import console, main
from decal.config import RunConfig
from decal.verbs import check as verb
from decal.verbs import train as training
from decal.verbs.check import Check, ShownSample
from decal.verbs.findings import Finding, Level


def finding(level: Level, **more: Any) -> Finding:
    return Finding(area="data", level=level, text=f"this is {level}", **more)


FOUND = Check(
    findings=(
        finding("ok", details=("a table",), hint="never shown"),
        finding("warning", hint="look again"),
    ),
    samples=(
        ShownSample(row=7, label=None, pieces=(("[INST] ask", False), ("answer", True))),
        ShownSample(row=8, label="hot", pieces=(("x" * 900, False),)),
    ),
    seconds=2.4,
)
NOT_READY = Check(findings=(*FOUND.findings, finding("problem")))


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\ndata: d.jsonl\noutput: o\n", encoding="utf-8")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings that the verb was called with; it finds FOUND, or trouble at r = 3."""
    calls: list[RunConfig] = []

    def check(config: RunConfig, **options: Any) -> Check:
        assert callable(options.pop("observe"))
        assert not options
        calls.append(config)
        return NOT_READY if getattr(config.adapter, "r", 0) == 3 else FOUND

    monkeypatch.setattr(verb, "check", check)
    console.out.cache_clear()
    return calls


def test_what_it_prints(
    run_yaml: Path, asked: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not on a terminal: no colours, no wrapping. Mutations: show hints of what is as it should be;
    lose a detail; mark what is not trained."""
    assert main(["check", str(run_yaml), "--set", "train.lr=1e-3"]) == 0
    assert asked[0].train.lr == 1e-3
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "data",
        "  ok       this is ok",
        "           a table",
        "  warning  this is warning",
        "           hint: look again",
    ]
    assert lines[5:7] == ["row 7, what is trained in [[brackets]]", "[INST] ask[[answer]]"]
    assert lines[7] == "row 8, class hot"
    assert lines[8] == f"{'x' * 400} … 100 characters … {'x' * 400}"
    assert lines[9] == "ready: 1 warning (2 s)"


def test_a_run_that_is_not_ready(
    run_yaml: Path, asked: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: exit with 0, or with 2."""
    assert main(["check", str(run_yaml), "--set", "adapter.r=3"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "not ready: 1 problem and 1 warning (0 s)"
    assert main(["check", str(run_yaml), "--set", "adapter.r=3", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] is False
    assert [f["level"] for f in found["findings"]] == ["ok", "warning", "problem"]


def test_settings_that_cannot_be_read(run_yaml: Path, asked: list[RunConfig]) -> None:
    """Mutation: make a finding of them."""
    assert main(["check", str(run_yaml), "--set", "train.lrr=1"]) == 2
    assert main(["check", str(run_yaml.parent / "none.yaml")]) == 2
    assert asked == []


@pytest.mark.parametrize("no_color", [False, True])
def test_it_fits_a_terminal(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and brackets where there are no colours. Mutations: never wrap; ask for a
    terminal only."""
    drawn = Console(width=80, force_terminal=True, no_color=no_color, record=True, highlight=False)
    monkeypatch.setattr(console, "out", lambda: drawn)
    long = finding("note", hint="and so on " * 20)
    command._show(Check(findings=(long,), samples=FOUND.samples[:1]))
    text = drawn.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "\n           and so on" in text.replace("hint: ", "")
    assert ("[[answer]]" in text) == no_color


@pytest.mark.parametrize(("flags", "wanted"), [([], True), (["--no-check"], False)])
def test_train_can_leave_it_out(
    flags: list[str], wanted: bool, run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: swap the two."""
    seen: list[bool] = []
    monkeypatch.setattr(training, "train", lambda *_, **options: seen.append(options["check"]))
    assert main(["train", str(run_yaml), *flags]) == 0
    assert seen == [wanted]
