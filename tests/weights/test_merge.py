"""Merging files: three classes, nothing else changed, nothing half done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal.adapters.base import LowRank
from decal.errors import (
    AdapterError,
    BaseModelError,
    OutputError,
    QuantError,
    StorageError,
    VerificationError,
)
from decal.store import tensorfile
from decal.store.base import open_base
from decal.store.fingerprint import fingerprint
from decal.store.tensorfile import hash_entry
from decal.weights import merge as module
from decal.weights.changes import Changes, Dequantized
from decal.weights.delta import FileDelta
from decal.weights.merge import MergeDtype, merge_files

SCALE = 7 / 3
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


def _tensors() -> dict[str, Tensor]:
    return {
        "embed.weight": torch.randn(17, 9).bfloat16(),
        "a.weight": torch.randn(5, 9).bfloat16(),
        "a.bias": torch.randn(5).bfloat16(),
        "b.weight": torch.randn(9, 5).bfloat16(),
        "c.weight": torch.randn(9, 9),
        "norm.weight": torch.randn(9),
        "ids": torch.arange(3),
    }


def _base(folder: Path, **config: Any) -> dict[str, Tensor]:
    folder.mkdir()
    tensors = _tensors()
    parts = list(tensors.items())
    weight_map = {}
    for name, part in zip(SHARDS, (dict(parts[:4]), dict(parts[4:])), strict=True):
        save_file(part, folder / name, {"format": "pt", "note": name})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {"model_type": "x", "dtype": "float16", **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    return tensors


def _delta(out: int, inner: int, size: float = 0.1) -> FileDelta:
    return FileDelta(LowRank(size * torch.randn(3, inner), torch.randn(out, 3), SCALE, 0.5))


def _deltas(deltas: dict[str, FileDelta] | None = None, **more: Any) -> Changes:
    chosen = {"a.weight": _delta(5, 9), "b.weight": _delta(9, 5)} if deltas is None else deltas
    return Changes(**{"deltas": chosen, "name": "runs/x", "trained_on": "org/base", **more})


def _out(folder: Path) -> dict[str, Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def _update(delta: FileDelta) -> Tensor:
    A, B, scale, *_ = delta.low_rank
    return (B @ A) * scale


def test_targeted_change_and_nothing_else_does(tmp_path: Path) -> None:
    """Fails if the scaling is dropped, if a delta is used twice, or if anything untouched is
    rewritten through another dtype."""
    before, deltas = _base(tmp_path / "base"), _deltas()
    report = merge_files(open_base(tmp_path / "base"), tmp_path / "out", deltas)
    after = _out(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        expected = before[key]
        if key in deltas.deltas:
            expected = (before[key].float() + _update(deltas.deltas[key])).bfloat16()
            assert not torch.equal(tensor, before[key])
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, expected), key
    assert (report.targeted, report.dequantized, report.untouched) == (2, 0, 5)
    assert report.untied == ()
    assert report.survival == pytest.approx(1, abs=0.05)
    assert report.nbytes == sum(t.nbytes for t in before.values())
    ours, theirs = open_base(tmp_path / "out"), open_base(tmp_path / "base")
    for key in set(before) - set(deltas.deltas):
        assert hash_entry(ours.tensors[key]) == hash_entry(theirs.tensors[key])
    assert report.fingerprint == fingerprint(ours) != fingerprint(theirs)


def test_the_folder_is_a_model_folder(tmp_path: Path) -> None:
    _base(
        tmp_path / "base",
        torch_dtype="float16",
        text_config={"dtype": "float16", "n": 1},
        tie_word_embeddings=True,
    )
    report = merge_files(open_base(tmp_path / "base"), tmp_path / "out", _deltas())
    out = tmp_path / "out"
    assert sorted(f.name for f in out.iterdir()) == sorted(
        [*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json",
         "chat_template.jinja", "decal_record.json"]
    )  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.nbytes
    assert index["weight_map"]["a.weight"] == SHARDS[0]
    assert index["weight_map"]["ids"] == SHARDS[1]
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "x",
        "dtype": "bfloat16",  # what most weights have, whatever the base's config said
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "n": 1},
        "tie_word_embeddings": True,
    }
    assert (out / "chat_template.jinja").read_text() == "{{ x }}"
    with safe_open(out / SHARDS[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": SHARDS[0]}
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".out")] == []


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_dtypes(tmp_path: Path, name: MergeDtype, dtype: torch.dtype) -> None:
    """Every floating tensor is converted, integers are not; the sum is rounded once, to the new
    dtype. Fails if the sum goes through the stored dtype first."""
    before, deltas = _base(tmp_path / "base"), _deltas()
    report = merge_files(open_base(tmp_path / "base"), tmp_path / "out", deltas, dtype=name)
    for key, tensor in _out(tmp_path / "out").items():
        expected = before[key]
        if key in deltas.deltas:
            expected = expected.float() + _update(deltas.deltas[key])
        if key != "ids":
            expected = expected.to(dtype)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), key
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == report.dtype


def test_dequantized_layers_without_a_delta_are_replaced_too(tmp_path: Path) -> None:
    """W_trained for every quantized layer, and the delta on top of it where there is one. Fails if
    the delta is added to the stored weight, or if a layer without a delta keeps its own."""
    before, deltas = _base(tmp_path / "base"), _deltas()

    def coarse(weight: Tensor) -> Tensor:
        return (weight.float() * 4).round() / 4

    report = merge_files(
        open_base(tmp_path / "base"),
        tmp_path / "out",
        replace(deltas, dequantized=dict.fromkeys(["a.weight", "c.weight"], Dequantized(coarse))),
    )
    after = _out(tmp_path / "out")
    update = {key: _update(delta) for key, delta in deltas.deltas.items()}
    a = (coarse(before["a.weight"]) + update["a.weight"]).bfloat16()
    b = (before["b.weight"].float() + update["b.weight"]).bfloat16()
    assert torch.equal(after["a.weight"], a)
    assert torch.equal(after["b.weight"], b)
    assert torch.equal(after["c.weight"], coarse(before["c.weight"]))
    assert (report.targeted, report.dequantized, report.untouched) == (2, 1, 4)
    with pytest.raises(QuantError, match="1 of 2 quantized weights are not in base"):
        merge_files(
            open_base(tmp_path / "base"),
            tmp_path / "out2",
            replace(
                deltas, dequantized=dict.fromkeys(["a.weight", "q.weight"], Dequantized(coarse))
            ),
        )


def test_a_tied_head_is_untied_only_if_it_must(tmp_path: Path) -> None:
    """Fails if the delta of the head goes into the shared matrix, or if an adapter elsewhere
    unties the pair."""
    before = _base(tmp_path / "base", tie_word_embeddings=True)
    base, tied = open_base(tmp_path / "base"), {"head.weight": "embed.weight"}
    report = merge_files(base, tmp_path / "plain", _deltas(tied=tied))
    assert report.untied == ()
    assert "head.weight" not in _out(tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text())["tie_word_embeddings"] is True

    head = _delta(17, 9)
    report = merge_files(base, tmp_path / "out", _deltas({"head.weight": head}, tied=tied))
    after = _out(tmp_path / "out")
    assert report.untied == ("head.weight",)
    assert (report.targeted, report.untouched) == (1, 7)
    assert torch.equal(after["embed.weight"], before["embed.weight"])
    expected = (before["embed.weight"].float() + _update(head)).bfloat16()
    assert torch.equal(after["head.weight"], expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"]["head.weight"] == SHARDS[0]

    report = merge_files(base, tmp_path / "emb", _deltas({"embed.weight": head}, tied=tied))
    after = _out(tmp_path / "emb")
    assert torch.equal(after["embed.weight"], expected)
    assert torch.equal(after["head.weight"], before["embed.weight"])
    with pytest.raises(BaseModelError, match="no tensor `gone` to tie to"):
        merge_files(base, tmp_path / "x", _deltas(tied={"head.weight": "gone"}))


def test_a_stale_copy_of_a_tied_head_is_not_what_the_delta_goes_onto(tmp_path: Path) -> None:
    """A tied model computes with the embedding, whatever its file holds for the head. Fails if the
    delta is added to the head's own stored tensor."""
    before = _base(tmp_path / "base", tie_word_embeddings=True)
    file = tmp_path / "base" / SHARDS[1]
    save_file({**load_file(file), "head.weight": torch.zeros(17, 9).bfloat16()}, file)
    base, head = open_base(tmp_path / "base"), _delta(17, 9)
    merge_files(
        base,
        tmp_path / "out",
        _deltas({"head.weight": head}, tied={"head.weight": "embed.weight"}),
    )
    expected = (before["embed.weight"].float() + _update(head)).bfloat16()
    assert torch.equal(load_file(tmp_path / "out" / SHARDS[1])["head.weight"], expected)


def test_deltas_that_do_not_fit(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    deltas = _deltas(
        {
            "a.weight": _delta(5, 8)._replace(module="layers.a"),
            "b.weight": _delta(8, 5),
            "bb.weight": _delta(9, 5),
            "c.weight": _delta(9, 9),
            "norm.weight": _delta(9, 9),
        },
        trained_on="org/small",
    )
    with pytest.raises(AdapterError) as caught:
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", deltas)
    assert str(caught.value).splitlines() == [
        f"adapter `runs/x` does not fit base `{tmp_path / 'base'}`: 1 of 5 tensors are not in the "
        "base, 3 of 5 tensors have the wrong shape",
        "  layers.a: adapter expects in=8, base has in=9  (and 3 more)",
        "hint: the adapter was trained on `org/small` (adapter_config.json)",
    ]
    assert not (tmp_path / "out").exists()


def test_orientation_in_messages(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    turned = {"b.weight": _delta(5, 8)._replace(transposed=True)}
    with pytest.raises(AdapterError, match="adapter expects in=8, base has in=9"):
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", _deltas(turned))


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    _base(tmp_path / "base", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(BaseModelError, match=r"stored quantized \(bitsandbytes\)"):
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", _deltas())


def test_outputs_that_are_taken(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    base, out = open_base(tmp_path / "base"), tmp_path / "out"
    for wrong in (tmp_path / "base", tmp_path):
        with pytest.raises(OutputError, match="holds the base"):
            merge_files(base, wrong, _deltas(), force=True)
    merge_files(base, out, _deltas())
    with pytest.raises(OutputError, match="not empty"):
        merge_files(base, out, _deltas())
    merge_files(base, out, _deltas(), force=True)
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match="would remove something else"):
        merge_files(base, out, _deltas(), force=True)


def test_space_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _base(tmp_path / "base")
    asked = []

    def refuse(out: Path, needed: int) -> None:
        asked.append(needed)
        raise StorageError("no room")

    monkeypatch.setattr(module, "require_space", refuse)
    with pytest.raises(StorageError):
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", _deltas(), dtype="fp32")
    numbers = sum(t.numel() for t in _tensors().values() if t.is_floating_point())
    assert asked[0] >= 4 * numbers
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


def test_a_vanished_delta_fails_the_merge(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    deltas = _deltas({**_deltas().deltas, "b.weight": _delta(9, 5, size=1e-12)})
    with pytest.raises(VerificationError, match="whole delta of 1 of 2 tensors") as caught:
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", deltas)
    assert caught.value.details == ("b.weight",)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


def test_bytes_that_read_back_otherwise_fail_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _base(tmp_path / "base")
    real = tensorfile.hash_entry
    monkeypatch.setattr(
        tensorfile, "hash_entry", lambda e: "0" if e.key == "norm.weight" else real(e)
    )
    with pytest.raises(VerificationError, match="1 of 3 tensors in model-00002"):
        merge_files(open_base(tmp_path / "base"), tmp_path / "out", _deltas())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("shard", SHARDS)
def test_a_base_that_is_cut_off_meanwhile(tmp_path: Path, shard: str) -> None:
    """The first shard is read as tensors (it is targeted), the second as bytes."""
    _base(tmp_path / "base")
    base = open_base(tmp_path / "base")
    file = tmp_path / "base" / shard
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=f"{shard}` cannot be read"):
        merge_files(base, tmp_path / "out", _deltas())
    assert not (tmp_path / "out").exists()
    with pytest.raises(BaseModelError, match=f"{shard}` cannot be read"):
        base.read("a.weight" if shard == SHARDS[0] else "c.weight")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    before, seen = _base(tmp_path / "base"), []
    deltas = _deltas()
    merge_files(
        open_base(tmp_path / "base"),
        tmp_path / "out",
        deltas,
        observe=lambda done, total: seen.append((done, total)),
    )
    total = 2 * sum(t.nbytes for t in before.values())
    total += sum(before[key].nbytes for key in deltas.deltas)
    assert [t for _, t in seen] == [total] * 16
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == total


KILLED = """
import signal, sys, time
from pathlib import Path
from decal.store.base import open_base
from decal.weights.changes import Changes
from decal.weights.merge import merge_files
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
def observe(done, total):
    if done > total / 3:
        print("half", flush=True)
        time.sleep(60)
merge_files(open_base(sys.argv[1]), sys.argv[2], Changes(deltas={}), dtype="fp32", observe=observe)
"""


@pytest.fixture
def merging(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    _base(tmp_path / "base")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "base"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_killed_in_the_middle_there_is_no_output(
    tmp_path: Path, merging: subprocess.Popen[str]
) -> None:
    merging.kill()
    merging.wait()
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left[0].startswith(".out.decal-")
    assert left[1:] == ["base"]
    merge_files(open_base(tmp_path / "base"), tmp_path / "out", _deltas())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "out"]


def test_interrupted_in_the_middle_nothing_is_left(
    tmp_path: Path, merging: subprocess.Popen[str]
) -> None:
    merging.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 20
    while merging.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert merging.returncode not in (None, 0)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]
