"""The same rows in every file type and layout train the same tokens, through the run's settings."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from decal import demo
from decal.config import DataConfig, RunConfig
from decal.errors import DataError
from decal.verbs.rows import EncodedRows, encode, read_run_rows

PAIRS = [("Where is it?", "On its way."), ('Say "no",\ntwice', "no, no"), ("And now?", "Done.")] * 4
CHATS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in PAIRS
]
ALPACA = [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]


def table(path: Path, rows: list[dict[str, str]], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write(folder: Path, kind: str) -> dict[str, Any]:
    """The rows in one way, and the settings that read them."""
    path = folder / f"rows.{kind.split()[-1]}"
    if kind == "messages jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    elif kind == "sharegpt json":
        turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in PAIRS]
        path.write_text(json.dumps({"data": [{"conversations": turn} for turn in turns]}))
    elif kind == "alpaca csv":
        table(path, ALPACA, ",")
    elif kind == "alpaca tsv":
        table(path, ALPACA, "\t")
    elif kind == "alpaca parquet":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ALPACA).to_parquet(path)
    elif kind == "made csv":
        table(path, [{"question": q, "answer": a} for q, a in PAIRS], ",")
        return {"path": path, "columns": {"instruction": "{question}", "output": "{answer}"}}
    elif kind == "saved folder":
        datasets.Dataset.from_list(CHATS).save_to_disk(path)
    return {"path": path}


def encoded(settings: dict[str, Any]) -> EncodedRows:
    data = DataConfig(**{"eval": 0.25, **settings})
    config = RunConfig(base=str(demo.base_path()), data=data, output="run")
    tokenizer = AutoTokenizer.from_pretrained(demo.base_path())
    return encode(read_run_rows(config), tokenizer, config)


KINDS = (
    "sharegpt json",
    "alpaca csv",
    "alpaca tsv",
    "alpaca parquet",
    "made csv",
    "saved folder",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_write_rows_trains_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Row numbers differ, tokens and what is held out do not. Mutations: another prompt for
    alpaca; keep CSV's quotes; split by row numbers."""
    expected = encoded(write(tmp_path, "messages jsonl"))
    found = encoded(write(tmp_path, kind))
    for part in ("train", "eval"):
        samples, others = getattr(found, part), getattr(expected, part)
        assert [s.input_ids.tolist() for s in samples] == [o.input_ids.tolist() for o in others]
        assert [s.trained.tolist() for s in samples] == [o.trained.tolist() for o in others]
    assert len(found.eval) == 3


def test_errors_of_evaluation_rows_name_their_file(tmp_path: Path) -> None:
    """In encoding too. Mutation: name the training file."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x" * 4000, "completion": "y"}) + "\n")
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"prompt": "x", "completion": " yes"}) + "\n")
    with pytest.raises(DataError, match=r"1 of 1 row of `.*bad\.jsonl`"):
        encoded({"path": good, "eval": str(bad), "max_length": 64})
