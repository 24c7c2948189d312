"""`compare`: the numbers are those of each model alone, and what cannot be compared is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from decal import demo
from decal.errors import AdapterError, DecalError
from decal.verbs.compare import compare
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
    with pytest.raises(AdapterError, match=r"different quantizations\n  quant.format: nf4 and none"):
        compare(None, {"q": str(finished.run), "p": str(finished_plain.run)}, prompts=["Hi"])


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
