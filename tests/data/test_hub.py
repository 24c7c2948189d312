"""Hub data sets and folders: splits, configurations, order, and what is said without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi, constants, errors

from decal.config import DataConfig
from decal.data.example import Message
from decal.data.source import read_rows, split_eval
from decal.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts(**settings: Any) -> list[str | None]:
    return [example.text for example in read_rows(DataConfig(**settings)).examples]


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **settings: Any) -> datasets.Dataset:
        asked.append((path, settings))
        return datasets.Dataset.from_list([{"messages": CHAT, "prompt": "Hi"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows(DataConfig(path="HuggingFaceH4/no_robots", name="x", split="test", limit=2))
    options = {"name": "x", "split": "test", "streaming": False}
    assert asked == [("HuggingFaceH4/no_robots", options)]
    assert [example.row for example in rows.examples] == [1, 2]
    assert rows.examples[0].messages == (Message("user", "Hi"), Message("assistant", "Ho"))
    assert (rows.source, rows.ignored) == ("HuggingFaceH4/no_robots (test)", ("prompt",))


@pytest.mark.parametrize("streaming", [False, True])
def test_shuffle_comes_before_limit(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows keep their numbers. Mutations: limit first; the same order for every seed."""
    data = datasets.Dataset.from_list([{"text": str(i)} for i in range(1, 31)])
    stream = data.to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream if streaming else data)
    settings = DataConfig(path="a/b", shuffle=True, limit=5, streaming=streaming)
    chosen = [read_rows(settings, seed=seed).examples for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert any(int(example.text or 0) > 5 for example in chosen[0])
    if not streaming:
        assert all(example.row == int(example.text or 0) for example in chosen[0])


def test_class_labels_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: hand the numbers on."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    rows = read_rows(DataConfig(path="a/b"))
    assert [example.label for example in rows.examples] == ["yes", "no"]


def test_failure_offline_is_a_data_error() -> None:
    """The real library, offline (tests/conftest.py)."""
    with pytest.raises(DataError, match="`nobody/no-such-rows` cannot be loaded") as caught:
        read_rows(DataConfig(path="nobody/no-such-rows"))
    assert "there is no local file" in str(caught.value)


@pytest.mark.parametrize("answer", [OSError("no route"), None])
def test_a_silent_hub_is_asked_once(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: let `datasets` ask it five times with pauses (23 seconds)."""
    asked: list[str] = []

    def info(self: HfApi, path: str, timeout: float) -> None:
        asked.append(path)
        if answer:
            raise answer

    def load(path: str, **_: Any) -> datasets.Dataset:
        assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == bool(answer)
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(path="a/b") == ["a"]
    assert asked == ["a/b"]
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (errors.RepositoryNotFoundError, "there is no hub data set `a/b`"),
        (errors.GatedRepoError, "`a/b` is gated"),
    ],
)
def test_a_hub_that_says_no(kind: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(self: HfApi, path: str, timeout: float) -> None:
        raise kind("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=text):
        texts(path="a/b")


def test_folder_of_files(tmp_path: Path) -> None:
    """One file for a split is read as a file; several are put together by `datasets`."""
    folder = tmp_path / "rows"
    lines(folder / "train.jsonl", "a", "b")
    lines(folder / "test.jsonl", "c")
    assert read_rows(DataConfig(path=folder)).source == str(folder / "train.jsonl")
    assert texts(path=folder, split="test") == ["c"]
    parts = tmp_path / "parts"
    lines(parts / "train-1.jsonl", "a", "b")
    lines(parts / "train-2.jsonl", "c")
    assert texts(path=parts) == ["a", "b", "c"]
    assert texts(path=parts, streaming=True, limit=2) == ["a", "b"]
    with pytest.raises(DataError, match="has no split `tain`: it has train") as caught:
        texts(path=parts, split="tain")
    assert caught.value.hint == "did you mean `data.split: train`?"


def test_configurations(tmp_path: Path) -> None:
    lines(tmp_path / "rows" / "a.jsonl", "a")
    lines(tmp_path / "rows" / "b.jsonl", "b")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("one-a", "b"))
    (tmp_path / "rows" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (tmp_path / "rows" / "a.jsonl").rename(tmp_path / "rows" / "one-a.jsonl")
    assert texts(path=tmp_path / "rows", name="b") == ["b"]
    with pytest.raises(DataError, match="has several configurations: one-a, b"):
        texts(path=tmp_path / "rows")
    with pytest.raises(DataError, match="has no configuration `one`: it has one-a, b"):
        texts(path=tmp_path / "rows", name="one")


def test_saved_data_sets(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(path=tmp_path / "one") == ["a", "b"]
    assert texts(path=tmp_path / "two", split="test") == ["b"]
    with pytest.raises(DataError, match="has no split `tset`: it has train, test"):
        texts(path=tmp_path / "two", split="tset")
    with pytest.raises(DataError, match="is one saved data set, and has no split `test`"):
        texts(path=tmp_path / "one", split="test")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"of the folder .* cannot be loaded"):
        texts(path=tmp_path / "none")


def test_eval_is_another_split(tmp_path: Path) -> None:
    """Mutation: take the name for a file."""
    lines(tmp_path / "rows" / "train.jsonl", "a", "b")
    lines(tmp_path / "rows" / "test.jsonl", "c")
    settings = DataConfig(path=tmp_path / "rows", eval="test")
    rows = read_rows(settings)
    train, held_out = split_eval(rows, settings)
    assert [len(part.examples) for part in (train, held_out)] == [2, 1]
    assert held_out.source.endswith("test.jsonl")
