"""What a path is taken for, and what is said of paths that are nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from decal import demo
from decal.errors import AdapterError, DecalError, OutputError
from decal.model.adapter import Adapter
from decal.verbs.target import BASE, base_of, metadata_json, read, resolve
from decal.verbs.train import RunResult


def test_runs_adapters_and_models_are_told_apart(finished: RunResult) -> None:
    """Mutation: look for config.json before run.yaml, or forget the run."""
    run = resolve(finished.run)
    assert (run.kind, run.path, run.run) == ("adapter", str(finished.weights), finished.run)
    alone = resolve(finished.weights)
    assert (alone.kind, alone.run) == ("adapter", None)
    assert resolve(demo.base_path()).kind == "model"


@pytest.mark.parametrize("name", ["someone/model", "someone/model@v1"])
def test_a_name_that_is_no_folder_is_looked_up_on_the_hub(name: str) -> None:
    """Fails when an id is taken for a model unseen; the tests have no network."""
    with pytest.raises(DecalError, match="`someone/model` is neither a folder nor") as caught:
        resolve(name)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_a_missing_folder_brings_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "tickets run ü").mkdir()
    with pytest.raises(DecalError, match="there is nothing at") as caught:
        resolve(tmp_path / "tickets run u")
    assert caught.value.hint == f"did you mean `{tmp_path / 'tickets run ü'}`?"


def test_files_and_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DecalError, match="is a file"):
        resolve(tmp_path / "x.txt")
    with pytest.raises(DecalError, match="neither a run, an adapter nor a model"):
        resolve(tmp_path)


def test_a_run_without_weights_has_not_finished(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(OutputError, match="has not finished") as caught:
        resolve(tmp_path)
    assert "--resume" in str(caught.value.hint)


def test_a_model_is_not_read_as_an_adapter() -> None:
    with pytest.raises(AdapterError, match="is a model, not an adapter"):
        read(demo.base_path())


def test_the_base_is_the_given_or_the_recorded(finished: RunResult) -> None:
    """Mutation: prefer the recorded base to the given one."""
    _, adapter = read(finished.run)
    assert base_of(adapter)[0] == str(demo.base_path())
    assert base_of(adapter, "other") == ("other", None)
    nameless = Adapter(config=adapter.config, tensors=adapter.tensors, metadata={}, base=None)
    with pytest.raises(AdapterError, match="does not say which base"):
        base_of(nameless)
    broken = Adapter(config=adapter.config, tensors={}, metadata={BASE: "{"}, base=None)
    with pytest.raises(AdapterError, match="is not JSON"):
        metadata_json(broken, BASE)
