"""The record of a written folder: what changed since is named, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal.errors import VerificationError
from decal.store.record import (
    RECORD_NAME,
    amend_record,
    changed_since,
    read_record,
    write_record,
)
from decal.store.tensorfile import hash_entry, read_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.randn(3, 5), "b": torch.arange(7)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "additional").mkdir()
    (tmp_path / "additional" / "x.jinja").write_text("{{ x }}")
    entries = read_header(tmp_path / "model.safetensors", VerificationError).entries
    hashes = {key: hash_entry(entry) for key, entry in entries.items()}
    write_record(tmp_path, {"made_by": "merge"}, "f" * 64, hashes)
    return tmp_path


def _changed(folder: Path) -> list[str]:
    record = read_record(folder)
    assert record is not None
    return changed_since(folder, record)


def test_as_written(folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    assert (record["made_by"], record["fingerprint"]) == ("merge", "f" * 64)
    assert set(record["files"]) == {"config.json", "additional/x.jinja"}
    assert _changed(folder) == []
    (folder / "README.md").write_text("a file that came later")
    assert _changed(folder) == []


def test_every_change_is_named(folder: Path) -> None:
    """Fails if a lost tensor, a new one or a changed file passes."""
    weights = load_file(folder / "model.safetensors")
    weights["a"][2, 3] += 1
    del weights["b"]
    save_file({**weights, "c": torch.ones(2)}, folder / "model.safetensors")
    (folder / "additional" / "x.jinja").write_text("{{ y }}")
    (folder / "config.json").unlink()
    assert _changed(folder) == [
        "file `config.json` is missing",
        "file `additional/x.jinja` was changed since it was written",
        "tensor `b` is missing",
        "tensor `c` was not there when the model was written",
        "tensor `a` was changed since it was written",
    ]


def test_how_tensors_are_spread_does_not_matter(folder: Path) -> None:
    """Fails if files of weights are hashed as files."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for key, tensor in weights.items():
        save_file({key: tensor}, folder / f"{key}.safetensors")
    assert _changed(folder) == []


def test_facts_are_amended(folder: Path) -> None:
    amend_record(folder, {"made_by": "quantize", "stored": "nf4"})
    record = read_record(folder)
    assert record is not None
    assert (record["made_by"], record["stored"]) == ("quantize", "nf4")
    assert _changed(folder) == []


@pytest.mark.parametrize("part", ["files", "tensors"])
def test_a_damaged_record(folder: Path, part: str) -> None:
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps({**record, part: {"a": 3}}))
    with pytest.raises(VerificationError, match=f"it lists no {part}"):
        read_record(folder)
    (folder / RECORD_NAME).unlink()
    assert read_record(folder) is None
