"""Base folders: single and sharded, and everything a broken download can look like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from decal.errors import BaseModelError
from decal.store.base import copy_side_files, open_base, side_files

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _single(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = {"a.weight": torch.randn(3, 5).bfloat16(), "b": torch.randn(7)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return tensors


def _sharded(folder: Path, **weight_map: str) -> dict[str, torch.Tensor]:
    tensors = _single(folder)
    (folder / "model.safetensors").unlink()
    for name, key in zip(SHARDS, tensors, strict=True):
        save_file({key: tensors[key]}, folder / name)
    found = {"a.weight": SHARDS[0], "b": SHARDS[1], **weight_map}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return tensors


@pytest.mark.parametrize("make", [_single, _sharded])
def test_tensors_are_found(tmp_path: Path, make: Any) -> None:
    tensors = make(tmp_path / "base")
    base = open_base(tmp_path / "base")
    assert base.config == {"model_type": "llama"}
    assert base.sharded == (make is _sharded)
    assert base.nbytes == 3 * 5 * 2 + 7 * 4
    assert base.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert base.tensors[key].spec.shape == tuple(tensor.shape)
        assert torch.equal(base.read(key), tensor)
    with pytest.raises(BaseModelError, match="no tensor `c`"):
        base.read("c")


def test_links_are_followed_as_in_the_hubs_cache(tmp_path: Path) -> None:
    tensors = _single(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(tmp_path / "blobs" / name)
    assert torch.equal(open_base(snapshot).read("b"), tensors["b"])


def _refused(folder: Path) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        open_base(folder)
    return caught.value


def test_no_folder_no_config_no_weights(tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert "does not exist" in _refused(base).message
    base.mkdir()
    assert "no config.json" in _refused(base).message
    (base / "adapter_config.json").write_text("{}")
    assert "an adapter" in str(_refused(base).hint)
    (base / "config.json").write_text("{}")
    assert "no safetensors" in _refused(base).message
    (base / "pytorch_model.bin").write_bytes(b"x")
    error = _refused(base)
    assert "only `pytorch_model.bin`" in error.message
    assert "save_pretrained" in str(error.hint)
    (base / "config.json").write_text("{")
    assert "config.json" in _refused(base).message
    assert "is a file" in _refused(base / "config.json").message


def test_truncated_and_missing_shards(tmp_path: Path) -> None:
    base = tmp_path / "base"
    _sharded(base)
    whole = (base / SHARDS[1]).read_bytes()
    (base / SHARDS[1]).write_bytes(whole[:-4])
    assert f"{SHARDS[1]}` is damaged" in _refused(base).message
    (base / SHARDS[1]).unlink()
    error = _refused(base)
    assert "lacks 1 of 2 weight files" in error.message
    assert error.details == (SHARDS[1],)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..", 3]
)
def test_shard_names_stay_in_the_folder(tmp_path: Path, name: Any) -> None:
    _sharded(tmp_path / "base", b=name)
    _single(tmp_path / "x")
    shutil.copy(tmp_path / "x" / "model.safetensors", tmp_path / "x.safetensors")
    assert "no file of this folder" in _refused(tmp_path / "base").message


def test_an_index_that_contradicts_its_shards(tmp_path: Path) -> None:
    _sharded(tmp_path / "gone", c=SHARDS[0])
    error = _refused(tmp_path / "gone")
    assert "1 of 3 tensors are not where its index says" in error.message
    _sharded(tmp_path / "swapped", b=SHARDS[0], c=SHARDS[1])
    assert "2 of 3 tensors" in _refused(tmp_path / "swapped").message
    _sharded(tmp_path / "twice")
    tensors = {"b": torch.zeros(7), "a.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "twice" / SHARDS[1])
    assert "tensor `a.weight` twice" in _refused(tmp_path / "twice").message
    _sharded(tmp_path / "empty")
    (tmp_path / "empty" / INDEX).write_text("{}")
    assert "no weight_map" in _refused(tmp_path / "empty").message


def test_side_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    _single(base)
    wanted = [
        "LICENSE", "added_tokens.json", "chat_template.jinja", "generation_config.json",
        "merges.txt", "modeling_x.py", "special_tokens_map.json", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    for name in [*wanted, "README.md", "pytorch_model.bin", "tokenizer.safetensors", "x.gguf"]:
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("r")
    found = [str(p) for p in side_files(base)]
    assert found == sorted([*wanted, "additional_chat_templates/rag.jinja"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("stays")
    copy_side_files(base, out)
    assert (out / "tokenizer.json").read_text() == "tokenizer.json"
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "r"
    assert (out / "mine").exists()
