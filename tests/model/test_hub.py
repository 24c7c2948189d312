"""Hub ids and what is said of the hub's answers; the hub itself is in tests/hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, errors

from decal.errors import AdapterError, BaseModelError
from decal.model.hub import (
    commit_of,
    hub_error,
    may_be_on_hub,
    model_folder,
    near_path,
    split_revision,
)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("gpt2@main", ("gpt2", "main")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@", ("owner/name@", None)),
        ("../runs/a@b", ("../runs/a@b", None)),
        ("/runs/a@b", ("/runs/a@b", None)),
    ],
)
def test_revisions_are_split_off_hub_ids_only(path: str, parts: tuple[str, str | None]) -> None:
    assert split_revision(path) == parts


def test_a_folder_with_an_at_sign_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the disk is not looked at first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run@home").mkdir()
    assert split_revision("run@home") == ("run@home", None)


@pytest.mark.parametrize("path", ["./a", "/a/b", "a/b/c", "~/a", "-a", "a b", ""])
def test_paths_are_no_hub_ids(path: str) -> None:
    assert not may_be_on_hub(path)


def test_commits_are_read_from_the_cache_only(tmp_path: Path) -> None:
    """Fails when any folder of 40 hex digits is taken for a commit."""
    commit = "0123456789" * 4
    assert commit_of(tmp_path / "models--a--b" / "snapshots" / commit) == commit
    assert commit_of(tmp_path / commit) is None
    assert commit_of(tmp_path / "snapshots" / "main") is None


def test_a_silent_network_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question has a time limit, and then only the cache is looked into.

    Fails when the limit is dropped: whoever swallows packets then stops decal for minutes.
    """
    asked: list[float | None] = []

    def swallow(_: HfApi, path: str, *, revision: str | None, timeout: float | None) -> None:
        asked.append(timeout)
        raise errors.HTTPError("timed out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", swallow)
    with pytest.raises(BaseModelError, match="cannot be reached \\(timed out\\)"):
        model_folder("nobody/nothing-at-all")
    assert asked == [10.0]


def test_an_error_is_told_by_what_it_came_from(tmp_path: Path) -> None:
    """Libraries wrap what the hub said. Fails when only the outermost error is looked at."""
    try:
        try:
            raise errors.OfflineModeIsEnabled("no")
        except errors.OfflineModeIsEnabled as error:
            raise OSError("Can't load the model") from error
    except OSError as wrapped:
        found = hub_error("a/b", None, wrapped, AdapterError)
    assert isinstance(found, AdapterError)
    assert "HF_HUB_OFFLINE" in str(found.hint)
    assert hub_error("a/b", None, found, AdapterError) is found


def test_a_name_nearby_is_the_better_hint(tmp_path: Path) -> None:
    (tmp_path / "tickets").mkdir()
    typo = str(tmp_path / "tikets")
    assert near_path(typo) == str(tmp_path / "tickets")
    found = hub_error(typo, None, errors.OfflineModeIsEnabled("no"), AdapterError)
    assert found.hint == f"did you mean `{tmp_path / 'tickets'}`?"
