"""decal push hands its verb what was asked, and prints where it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.cli import main
from decal.verbs import push as verb
from decal.verbs.push import Pushed


@pytest.mark.parametrize("as_json", [False, True])
def test_push(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    """Fails when an option is dropped or two are swapped."""
    called: dict[str, Any] = {}

    def record(target: Path, repo: str, **options: Any) -> Pushed:
        called.update(target=target, repo=repo, **options)
        url = "https://hub/me/x"
        return Pushed(repo=repo, url=url, commit="c0ffee", files=("a", "b"), card="kept")

    monkeypatch.setattr(verb, "push", record)
    options = ["--private", "--revision", "v2", "-m", "First", *(["--json"] if as_json else [])]
    assert main(["push", "runs/x", "me/x", *options]) == 0
    assert callable(called.pop("say"))
    assert called == {
        "target": Path("runs/x"),
        "repo": "me/x",
        "private": True,
        "revision": "v2",
        "message": "First",
    }
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["commit"] == "c0ffee"
    else:
        assert "files   a, b\n" in out
        assert "url     https://hub/me/x\n" in out
