"""`compare`: the numbers are those of each model alone, and what cannot be compared is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from decal import demo
from decal.config import LoraConfig
from decal.errors import AdapterError, DecalError
from decal.model.inject import attach
from decal.runfile import dump_run, load_run
from decal.verbs.compare import compare
from decal.verbs.generate import generate
from decal.verbs.load import load_base, save_adapter
from decal.verbs.train import RunResult


def test_base_and_adapters_are_measured_apart(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: leave the adapter on for the base, or use the first for all."""
    data = tmp_path / "test rows ü.jsonl"
    demo.write_jsonl(data, "test", limit=12)
    run = str(finished.run)
    found = compare(
        None, {"one": run, "two": run}, prompts=["Hi"], data=str(data), limit=8, max_new_tokens=4
    )
    results = found["results"]
    assert list(results) == ["base", "one", "two"]
    assert all(r["rows"] == 8 and len(r["outputs"]) == 1 for r in results.values())
    assert results["one"] == results["two"]
    assert results["one"]["loss"] < results["base"]["loss"]


def test_adapters_of_other_bases_are_refused(
    finished: RunResult, finished_plain: RunResult
) -> None:
    with pytest.raises(
        AdapterError, match=r"different quantizations\n  quant.format: nf4 and none"
    ):
        compare(None, {"q": str(finished.run), "p": str(finished_plain.run)}, prompts=["Hi"])


def with_data(run: Path, folder: Path, **changes: Any) -> str:
    """A copy of a finished run whose rows were read with other settings."""
    copy = shutil.copytree(run, folder)
    config = load_run(copy / "run.yaml")
    data = config.data.model_copy(update=changes)
    (copy / "run.yaml").write_text(dump_run(config.model_copy(update={"data": data})))
    return str(copy)


def test_rows_are_read_as_the_run_read_its_own(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: detect the layout again, without columns and system message."""
    columns = {"prompt": "Sort: {ticket}\n", "completion": "{queue}"}
    run = with_data(finished.run, tmp_path / "run", columns=columns, layout="prompt-completion")
    rows = [{"ticket": "The lamp is broken.", "queue": "lamp"}, {"ticket": "x", "queue": "y"}]
    data, plain = tmp_path / "d.jsonl", tmp_path / "plain.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [{"prompt": f"Sort: {r['ticket']}\n", "completion": r["queue"]} for r in rows]
    plain.write_text("".join(json.dumps(row) + "\n" for row in made))
    found = compare(None, {"a": run}, data=str(data), max_new_tokens=2)
    wanted = compare(None, {"a": str(finished.weights)}, data=str(plain), max_new_tokens=2)
    assert found["results"] == wanted["results"]


def test_prompts_get_the_system_message_of_the_run(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: ask without it, as no row of the training was."""
    system = "Answer with the name of a queue."
    run = with_data(finished.run, tmp_path / "run", system=system)
    asked = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    seen: list[tuple[str, int, int]] = []
    found = compare(
        None,
        {"a": run},
        prompts=["Hi", asked],
        max_new_tokens=6,
        observe=lambda *step: seen.append(step),
    )
    assert found["prompts"] == ["Hi", "Hi"]
    for values in found["results"].values():
        assert values["outputs"][0] == values["outputs"][1]
    assert seen == [("base", 2, 2), ("a", 2, 2)]
    assert generate(run, "Hi", max_new_tokens=6) == found["results"]["a"]["outputs"][0]
    assert generate(run, "Hi", max_new_tokens=6, system="x") == generate(
        str(finished.weights), "Hi", max_new_tokens=6, system="x"
    )


def test_runs_that_read_rows_differently_are_refused(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: take the settings of the first run for all."""
    run = with_data(finished.run, tmp_path / "run", system="s")
    with pytest.raises(AdapterError, match=r"differently\n  data.system: None and s"):
        compare(None, {"a": str(finished.run), "b": run}, prompts=["Hi"])


def test_plain_text_has_a_loss_and_no_answers(finished: RunResult, tmp_path: Path) -> None:
    """Mutation: ask for the whole text as an answer to nothing."""
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"text": "The lamp of the customer is broken."}) + "\n")
    found = compare(None, {"a": str(finished.weights)}, data=str(data))["results"]
    assert set(found["a"]) == {"rows", "loss", "perplexity"}


CLASSES = ("billing", "lamp", "other")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a head of three classes, on the embedded base."""
    model, _ = load_base(demo.base_path(), dtype="float32", labels=CLASSES)
    settings = LoraConfig(r=3, lora_alpha=7, target_modules="attention", modules_to_save=("score",))
    attach(model, settings, "default", seed=1)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("classifier") / "a"
    save_adapter(model, folder)
    return folder


def test_classifiers_are_scored_by_their_labels(classifier: Path, tmp_path: Path) -> None:
    """Mutation: show the base's untrained head, or score by another order of the labels."""
    texts = ["The invoice is wrong.", "My lamp is broken.", "Hello there", "lamp lamp"]
    truth = ["billing", "lamp", "other", "lamp"]
    data = tmp_path / "d.jsonl"
    rows = [{"text": t, "label": y} for t, y in zip(texts, truth, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(None, {"a": str(classifier)}, prompts=texts, data=str(data))
    assert list(found["results"]) == ["a"]
    values = found["results"]["a"]
    said = [generate(str(classifier), text) for text in texts]
    assert values["outputs"] == [f"{label} ({label.probability:.1%})" for label in said]
    assert set(said) <= set(CLASSES)
    hits = [s == y for s, y in zip(said, truth, strict=True)]
    assert values["accuracy"] == sum(hits) / 4
    assert values["rows"] == 4
    likely = [label.probability or 0 for label, hit in zip(said, hits, strict=True) if hit]
    assert values["loss"] >= -sum(map(math.log, likely)) / 4
    assert 0 <= values["macro_f1"] <= 1


def test_nothing_to_compare_is_refused(finished: RunResult) -> None:
    run = str(finished.run)
    with pytest.raises(DecalError, match="nothing to compare on"):
        compare(None, {"a": run})
    with pytest.raises(DecalError, match="no adapter"):
        compare(None, {}, prompts=["Hi"])
    with pytest.raises(DecalError, match="`base` is what the base is called"):
        compare(None, {"base": run}, prompts=["Hi"])
    with pytest.raises(AdapterError, match="is a model, not an adapter"):
        compare(None, {"m": str(demo.base_path())}, prompts=["Hi"])
