"""The fingerprint depends on the weights and on nothing else; the cache never lies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decal.store import fingerprint as module
from decal.store.base import open_base
from decal.store.fingerprint import cache_folder, fingerprint
from tests import zoo


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(15.0).view(3, 5), "b": torch.arange(7).bfloat16(), "c": torch.ones(2)}


def _write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i, key in enumerate(tensors):
        name = f"s{i % shards}.safetensors"
        weight_map[key] = name
    for name in set(weight_map.values()):
        part = {k: t for k, t in tensors.items() if weight_map[k] == name}
        save_file(part, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_independent_of_sharding(tmp_path: Path) -> None:
    """Fails if file names or the order in the files enter the hash."""
    marks = {fingerprint(open_base(_write(tmp_path / str(n), _tensors(), n))) for n in (1, 2, 3)}
    assert len(marks) == 1
    assert len(marks.pop()) == 64


def test_every_change_counts(tmp_path: Path) -> None:
    """Fails if the layer, the shape, the dtype or the bytes are left out."""
    base = _tensors() | {"layers.0.w": torch.arange(2.0), "layers.1.w": -torch.arange(2.0)}
    changed = [
        base,
        {**base, "a": base["a"].nextafter(torch.tensor(99.0))},
        {**base, "a": base["a"].view(5, 3)},
        {**base, "b": base["b"].view(torch.float16)},
        {**base, "layers.0.w": base["layers.1.w"], "layers.1.w": base["layers.0.w"]},
        {k: t for k, t in base.items() if k != "c"},
    ]
    marks = [fingerprint(open_base(_write(tmp_path / str(i), t))) for i, t in enumerate(changed)]
    assert len(set(marks)) == len(changed)


@pytest.mark.parametrize("name", zoo.HISTORIC)
def test_old_files_have_the_fingerprint_of_new_ones(name: str, tmp_path: Path) -> None:
    """Fails if names, masks or tied copies enter the hash."""
    new = zoo.save(name, tmp_path / "new")
    old = zoo.save_historic(name, tmp_path / "old")
    assert fingerprint(open_base(old)) == fingerprint(open_base(new))
    other = zoo.save(name, tmp_path / "other", seed=1)
    assert fingerprint(open_base(other)) != fingerprint(open_base(new))


def test_a_bias_of_a_layer_called_attention_counts(tmp_path: Path) -> None:
    """Fails if leftovers are told by their names alone."""
    biased = [_tensors() | {"attention.bias": torch.full((3,), value)} for value in (1.0, 2.0)]
    marks = [fingerprint(open_base(_write(tmp_path / str(i), t))) for i, t in enumerate(biased)]
    assert marks[0] != marks[1]


def test_the_cache_is_used_and_follows_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the cache's key leaves out the times: the second file has the first one's size and,
    set by hand, its time of writing."""
    folder = _write(tmp_path / "base", _tensors())
    file = folder / "model.safetensors"
    first = fingerprint(open_base(folder))
    assert list((cache_folder() / "fingerprints").iterdir())

    hashed = []
    real = module.hash_entry
    monkeypatch.setattr(module, "hash_entry", lambda e: hashed.append(e.key) or real(e))
    assert fingerprint(open_base(folder)) == first
    assert not hashed

    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(open_base(folder)) != first
    assert sorted(hashed) == ["a", "b", "c"]
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "00"}', '{"a": 1, "b": 2, "c": 3}'])
def test_a_damaged_cache_is_ignored(tmp_path: Path, content: str) -> None:
    folder = _write(tmp_path / "base", _tensors())
    first = fingerprint(open_base(folder))
    for entry in (cache_folder() / "fingerprints").iterdir():
        entry.write_text(content)
    assert fingerprint(open_base(folder)) == first


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path / "base", _tensors())
    first = fingerprint(open_base(folder))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprint(open_base(folder)) == first


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder() == Path.home() / ".cache" / "decal"


def test_progress(tmp_path: Path) -> None:
    base = open_base(_write(tmp_path / "base", _tensors(), 2))
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        fingerprint(base, lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (base.nbytes, base.nbytes)
        assert len(seen) == 3
