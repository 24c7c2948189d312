"""Pickles: tensors and nothing else, and never more memory than the file is long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from decal.errors import AdapterError
from decal.store.pickled import load_pickled


class _Code:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _refused(file: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        load_pickled(file, AdapterError, hint="again")
    return caught.value


def test_tensors_are_read(tmp_path: Path) -> None:
    shared = torch.randn(5, 7)
    meant = {"a": shared, "b": shared.T, "c": torch.randn(3).bfloat16()}
    torch.save(meant, tmp_path / "x.bin")
    found = load_pickled(tmp_path / "x.bin", AdapterError)
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in meant.items())


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    """Fails if the pickle is loaded with weights_only=False."""
    file, marker = tmp_path / "x.bin", tmp_path / "was-here"
    torch.save({"a": torch.ones(2), "b": _Code(marker)}, file)
    error = _refused(file)
    assert "could run code: not read" in error.message
    assert "safetensors" in str(error.hint)
    assert not marker.exists()


def test_a_tensor_cannot_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    """Four bytes, stretched to four terabytes by a stride of zero. Fails if the sizes go unasked:
    widening it would need them."""
    file = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(1).expand(10**12)}, file)
    assert "its tensors claim 4000000000000 bytes" in _refused(file).message


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, {"a": torch.ones(2, dtype=torch.complex64)}],
    ids=str,
)
def test_anything_but_named_plain_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.bin")
    assert "something else than named" in _refused(tmp_path / "x.bin").message


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    assert "cannot be read" in _refused(file).message
    torch.save({"a": torch.randn(300)}, file)
    whole = file.read_bytes()
    for size in range(0, len(whole), 97):
        file.write_bytes(whole[:size])
        assert _refused(file).hint == "again"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert "is damaged or no file of torch.save" in _refused(file).message
