"""`decal report` and `decal inspect --spectrum` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.cli import main
from tests.report.made_up import candidate, learned, report


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the verb; keeps what it was called with."""
    called: dict[str, Any] = {}

    def gather(folders: list[str], out: Path | None, **options: Any) -> Any:
        called.update(folders=folders, out=out, **options)
        return report([candidate(r) for r in (4, 8, 16)]), Path("runs/report.html")

    monkeypatch.setattr("decal.verbs.report.gather", gather)
    monkeypatch.setattr("decal.verbs.report.write_report", lambda made, out: out)
    return called


def test_options_reach_the_verb(
    gathered: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: drop an option, or the recommendation."""
    assert main(["report", "a", "b", "-o", "x.html", "--samples", "3", "--force"]) == 0
    assert callable(gathered.pop("observe"))
    assert gathered == {"folders": ["a", "b"], "out": Path("x.html"), "samples": 3, "force": True}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("Take r16: it has the lowest evaluation loss")
    assert "go on doubling, to r=32" in shown[1]
    assert shown[-1] == f"report  {Path('runs/report.html')}"


def test_json(gathered: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["advice"]["recommended"] == ["r16"]
    assert [one["name"] for one in found["candidates"]] == ["r4", "r8", "r16"]


def test_no_folder_is_asked_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert main(["report", "does-not-exist"]) == 2
    assert "there is nothing at `does-not-exist`" in capsys.readouterr().err


def test_inspect_shows_a_spectrum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: lose the base, the header's facts in the JSON, or the strips."""
    asked: list[Any] = []

    def spectrum(path: str, *, base: str | None, observe: Any) -> dict[str, Any]:
        asked.append((path, base))
        return learned(8)

    monkeypatch.setattr("decal.verbs.spectrum.spectrum", spectrum)
    monkeypatch.setattr("decal.verbs.inspect.inspect", lambda path: {"kind": "adapter"})
    assert main(["inspect", "x", "--spectrum", "--base", "b"]) == 0
    assert asked == [("x", "b")]
    assert "r=7 would keep 99 % of the update's energy" in capsys.readouterr().out
    assert main(["inspect", "x", "--spectrum", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "adapter"
    assert found["spectrum"]["rank"] == 7
    assert main(["inspect", "x", "--base", "b"]) == 2
    assert "--base is for --spectrum" in capsys.readouterr().err
