"""Classifiers from labelled rows to a merged model: head, class names and scores are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from decal.config import RunConfig
from decal.errors import DataError
from decal.model.adapter import Adapter
from decal.verbs.load import load
from decal.verbs.merge import merge
from decal.verbs.text import classify
from decal.verbs.train import RunResult, train
from tests import zoo

LABELS = ("cold", "hot", "mild")
WORDS = {"cold": "snow ice", "hot": "sun fire", "mild": "rain wind"}
ARCHITECTURES = [name for name, tiny in zoo.ZOO.items() if tiny.task == "classify"]


def labelled(folder: Path, count: int = 48) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for i in range(count):
            label = LABELS[i % 3]
            words = WORDS[label].split()
            text = " ".join([words[i % 2], "and", words[(i // 2) % 2]] * (1 + i // 24))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


def settings(folder: Path, base: Path, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "base": {"path": str(base), "dtype": "float32"},
        "adapter": {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1},
        "data": {"path": str(labelled(folder)), "max_length": 64, "eval": 0.25},
        "objective": "classify",
        "train": {"max_steps": 30, "batch_size": 12, "lr": 2e-2},
        "output": str(folder / "run"),
    }
    return RunConfig(**{**sections, **changes})


@pytest.fixture(scope="module", params=ARCHITECTURES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A classifier on each architecture that has a head for it."""
    folder = tmp_path_factory.mktemp(request.param)
    done = train(settings(folder, zoo.save(request.param, folder / "base")))
    assert done is not None
    return done


def test_it_learns_and_says_how_well(run: RunResult) -> None:
    """Fails when the head is not trained, or scores are those of other rows."""
    assert run.scores["eval_accuracy"] >= 0.9
    assert run.scores["eval_macro_f1"] >= 0.85
    written = json.loads((run.run / "info.json").read_text())["result"]
    assert written["eval_accuracy"] == run.scores["eval_accuracy"]


def test_head_and_class_names_come_back(run: RunResult) -> None:
    """Fails when the head is not in the adapter, or the labels change their order."""
    adapter = Adapter.from_pretrained(run.weights)
    assert adapter.task_type == "SEQ_CLS"
    assert any(name.split(".")[0] in ("score", "classifier") for name in adapter.full)
    model, tokenizer = load(run.run)
    texts = ["snow and ice", "sun and fire", "rain and wind"]
    assert [label for label, _ in classify(model, tokenizer, texts)] == list(LABELS)


def test_the_merged_model_is_the_same_classifier(run: RunResult, tmp_path: Path) -> None:
    """Fails when the head is left out, or config.json lacks the class names."""
    merge(None, run.run, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    model, tokenizer = load(run.run)
    ids = torch.tensor([tokenizer("sun and rain")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(
            plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5, check_dtype=False
        )
    assert [plain.config.id2label[i] for i in range(3)] == list(LABELS)
    merged, _ = load(tmp_path / "merged")
    assert type(merged) is type(plain)


def test_training_goes_on_with_the_same_head(run: RunResult, tmp_path: Path) -> None:
    """Fails when the head starts anew, or classes get other numbers."""
    base = run.session.config.base.path
    again = train(
        settings(
            tmp_path,
            Path(base),
            adapter={"from": str(run.run)},
            train={"max_steps": 1, "batch_size": 12, "lr": 1e-9, "warmup": 0.0},
        )
    )
    assert again is not None
    assert again.scores == run.scores


def test_quantized_classifier(tmp_path: Path) -> None:
    """Fails when the head is quantized, or rows are not padded with the model's own token."""
    base = zoo.save("llama", tmp_path / "base")
    done = train(settings(tmp_path, base, quant="nf4"))
    assert done is not None
    assert done.session.flat is False
    assert done.scores["eval_accuracy"] >= 0.9
    model, tokenizer = load(done.run)
    assert classify(model, tokenizer, ["snow and snow"])[0][0] == "cold"


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    """Fails when chats are classified by nothing."""
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    config = settings(tmp_path, zoo.save("llama", tmp_path / "base"), data=str(rows))
    with pytest.raises(DataError, match="label"):
        train(config)
