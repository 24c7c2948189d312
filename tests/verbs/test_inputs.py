"""What keeps a run from starting is found without weights, all of it at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from decal.errors import DataError, DecalError, TargetError
from decal.verbs.inputs import Inputs, look
from decal.verbs.session import prepare
from tests import zoo
from tests.verbs.conftest import settings
from tests.verbs.test_classify import settings as classifier


def areas(found: Inputs) -> list[str]:
    return [problem.area for problem in found.problems]


def bad_rows(folder: Path) -> dict[str, Any]:
    path = folder / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "usr", "content": "x"}]}) + "\n")
    return {"path": str(path), "max_length": 128, "eval": None}


def test_a_sound_run_has_all_of_it_and_no_weights(tmp_path: Path) -> None:
    """Mutation: load the model to resolve targets."""
    found = look(settings(tmp_path))
    assert found.problems == []
    assert found.table is not None
    assert len(found.table.names) == 28
    assert {p.device.type for p in found.skeleton.parameters()} == {"meta"}
    assert found.encoded is not None
    assert found.encoded.lines()[0].endswith("(messages), 72 to train, 8 to evaluate")


def test_problems_of_one_area_hide_no_others(tmp_path: Path) -> None:
    """Mutations: stop at the first; raise the last only; drop details or hints."""
    config = settings(
        tmp_path,
        data=bad_rows(tmp_path),
        adapter={"target_modules": ["q_pro"]},
        train={"early_stopping": 3, "lr_pattern": {"nowhere": 2.0}},
    )
    assert areas(look(config)) == ["settings", "data", "targets"]
    with pytest.raises(DecalError, match="3 problems keep the run from starting") as caught:
        prepare(config, lambda line: None)
    text = str(caught.value)
    for part in ("data: 1 of 1 row", "targets: 1 of 1 target_modules", "`q_proj`?", "data.eval"):
        assert part in text


def test_a_single_problem_is_raised_as_itself(tmp_path: Path) -> None:
    """Mutation: wrap it."""
    with pytest.raises(TargetError, match=r"1 of 1 target_modules match no module"):
        prepare(settings(tmp_path, adapter={"target_modules": ["q_pro"]}), lambda line: None)


def test_a_base_that_is_not_there_is_one_problem(tmp_path: Path) -> None:
    """The rows are looked at all the same. Mutations: say it for the tokenizer too; skip the
    rows."""
    base = str(tmp_path / "none")
    found = look(settings(tmp_path, base=base, data=bad_rows(tmp_path), train={}))
    assert areas(found) == ["data", "model"]
    assert found.skeleton is None


def test_rates_are_looked_at_on_the_skeleton(tmp_path: Path) -> None:
    """Mutation: wait for the weights."""
    train = {"lr_pattern": {"nowhere": 2.0}}
    assert areas(look(settings(tmp_path, train=train))) == ["settings"]


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Mutation: leave the vocabulary to the forward pass."""
    base = zoo.save("llama", tmp_path / "base")
    other = Path(settings(tmp_path).base.path)
    for file in (*other.glob("*token*"), *other.glob("chat_template*")):
        shutil.copy(file, base)
    found = look(settings(tmp_path, base=str(base), quant="none"))
    assert areas(found) == ["model"]
    assert isinstance(found.problems[0].error, DataError)
    assert "the embedding has 263 rows" in found.problems[0].error.message


@pytest.mark.parametrize("name", ["bert", "llama_classify"])
def test_a_classifier_has_a_new_head_on_the_skeleton(name: str, tmp_path: Path) -> None:
    """Its rates can be set, so it must count as trained. Mutation: forget the head."""
    base = zoo.save(name, tmp_path / "base")
    head = "classifier" if name == "bert" else "score"
    found = look(classifier(tmp_path, base, train={"lr_pattern": {head: 5.0}}))
    assert found.problems == []
    assert found.table is not None
    assert f"{head} (whole)" in [row.pattern for row in found.table.rows]


def test_a_classifier_whose_rows_are_unreadable(tmp_path: Path) -> None:
    """Targets are still resolved. Mutation: ask the rows for the classes."""
    base = zoo.save("bert", tmp_path / "base")
    config = classifier(
        tmp_path, base, data=bad_rows(tmp_path), adapter={"target_modules": ["quer"]}
    )
    assert areas(look(config)) == ["data", "targets"]
