"""`decal verify`: exit codes, and what is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal import demo
from decal.cli import main

FOUND: dict[str, Any] = {
    "kind": "model",
    "path": "m",
    "checks": [
        {"check": "files", "result": "ok", "detail": "3 tensors"},
        {"check": "record", "result": "PROBLEM", "detail": "file `a` is missing  (and 1 more)"},
        {"check": "base", "result": "not checked", "detail": "it is not here"},
    ],
    "problems": ["record: file `a` is missing", "record: tensor `b` was changed"],
}


def _given(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> dict[str, Any]:
    called: dict[str, Any] = {}

    def verify(path: str, **kwargs: Any) -> dict[str, Any]:
        called.update(kwargs, path=path)
        return found

    monkeypatch.setattr("decal.verbs.verify.verify", verify)
    return called


def test_all_problems_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an option is dropped, or a problem behind "1 more" is not shown."""
    called = _given(monkeypatch, FOUND)
    assert main(["verify", "m", "--base", "b", "--adapter", "a", "--full"]) == 1
    assert callable(called.pop("observe"))
    assert called == {
        "path": "m", "base": "b", "adapter": "a", "full": True, "trust_remote_code": False,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "  record: tensor `b` was changed\n" in out
    assert out.endswith("model m: 2 problems in 2 checks\n")


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _given(monkeypatch, {**FOUND, "problems": []})
    assert main(["verify", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"] == FOUND["checks"]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 sound, 2 nothing there."""
    assert main(["verify", str(demo.base_path())]) == 0
    assert "no problems in 2 checks" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2
