"""What is stored is checked again: each kind of damage is named, and so is what was not checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decal import demo
from decal.config import QuantConfig
from decal.errors import DecalError
from decal.verbs.merge import merge
from decal.verbs.quantize import quantize
from decal.verbs.train import RunResult
from decal.verbs.verify import verify


def _results(found: dict[str, Any]) -> dict[str, str]:
    return {row["check"]: row["result"] for row in found["checks"]}


def _flip(path: Path, at: int = -1) -> None:
    """Another byte, of the same file size."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def merged(finished: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "m"
    merge(None, finished.run, out)
    return out


@pytest.fixture
def run(finished: RunResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.run, tmp_path / "run"))


@pytest.fixture
def model(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "m"))


def test_a_sound_run(finished: RunResult) -> None:
    found = verify(finished.run, full=True)
    assert found["problems"] == []
    assert (found["kind"], found["path"]) == ("run", str(finished.run))
    assert set(_results(found).values()) == {"ok"}
    assert list(_results(found)) == [
        "settings", "info", "metrics", "checkpoints", "files", "numbers", "weights", "base",
        "fits the base", "quantized base", "same run", "kept checkpoint",
    ]  # fmt: skip
    assert _results(verify(finished.run))["quantized base"] == "not checked"


def _drop_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))


def _other_base(run: Path) -> None:
    info = json.loads((run / "info.json").read_text())
    (run / "info.json").write_text(json.dumps({**info, "base_fingerprint": "0" * 64}))


def _later(run: Path) -> None:
    """The adapter of another moment, whole in itself."""
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    del facts["decal.run"]  # with the hash of its weights
    key = sorted(tensors)[0]
    save_file({**tensors, key: tensors[key] + 1e-6}, path, facts)


def _nan(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})


RUNS: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "settings": (lambda run: (run / "run.yaml").write_text("base: [\n"), {"settings": ""}),
    "a line of the metrics": (
        _drop_line, {"metrics": "1 of 8 steps are missing, the first is step 3"}),
    "a checkpoint": (
        lambda run: _flip(next(run.glob("checkpoints/*/optimizer.safetensors"))),
        {"checkpoints": "is not what was written"}),
    "another base": (_other_base, {"same run": "base_fingerprint is 0000000000000000…"}),
    "another adapter": (_later, {"kept checkpoint": "1 of 56 tensors"}),
    "NaN": (_nan, {"files": "NaN"}),
    "a cut adapter": (
        lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 50),
        {"files": "damaged"}),
    "no adapter": (
        lambda run: shutil.rmtree(run / "adapter"), {"result": "its weights are gone"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", RUNS)
def test_a_damaged_run(damage: str, run: Path) -> None:
    """Fails if the check of its name is dropped, or ends the others."""
    harm, wanted = RUNS[damage]
    harm(run)
    found = verify(run)
    wrong = {row["check"]: row["detail"] for row in found["checks"] if row["result"] == "PROBLEM"}
    assert wrong.keys() == wanted.keys()
    for check, text in wanted.items():
        assert text in wrong[check]
    assert len(found["problems"]) >= len(wanted)


def test_a_changed_adapter_is_told_by_its_own_hash(run: Path) -> None:
    """The recorded hash stays in the metadata. Fails if it is not compared."""
    path = run / "adapter" / "adapter_model.safetensors"
    _flip(path)
    found = verify(run / "adapter")
    assert _results(found)["weights"] == "PROBLEM"
    assert found["kind"] == "adapter"


def test_the_base_of_an_adapter(run: Path, tmp_path: Path) -> None:
    """Fails if another base passes, or one that is not here is a problem."""
    other = Path(shutil.copytree(demo.base_path(), tmp_path / "other"))
    _flip(other / "model.safetensors", -3)
    assert _results(verify(run / "adapter", base=str(other)))["base"] == "PROBLEM"
    config = run / "adapter" / "adapter_config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "base_model_name_or_path": "some/where"}))
    found = verify(run / "adapter")
    assert _results(found)["base"] == "not checked"
    assert found["problems"] == []
    assert _results(verify(run / "adapter", base=str(demo.base_path())))["base"] == "ok"


def test_a_sound_merge(merged: Path) -> None:
    found = verify(merged)
    assert found["problems"] == []
    assert _results(found) == dict.fromkeys(("files", "record", "numbers", "base + adapter"), "ok")
    (detail,) = (r["detail"] for r in found["checks"] if r["check"] == "base + adapter")
    assert detail.startswith("28 weights are the sum, rounded once; worst layer off by")


def test_a_changed_byte_of_a_merge_is_found(model: Path) -> None:
    """In a weight the number itself is wrong too. Fails if the record's hashes are not compared."""
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    key = "model.layers.2.mlp.up_proj.weight"
    tensors[key][3, 5] *= 1.25
    save_file(tensors, weights, {"format": "pt"})
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    (model / "tokenizer.json").unlink()
    found = verify(model)
    assert found["problems"][:3] == [
        "record: file `tokenizer.json` is missing",
        "record: file `config.json` was changed since it was written",
        f"record: tensor `{key}` was changed since it was written",
    ]
    assert len(found["problems"]) == 4
    assert "1 of 196,608 numbers are further than one rounding" in found["problems"][3]


def test_a_merge_whose_parts_are_elsewhere(
    model: Path, finished: RunResult, run: Path, tmp_path: Path
) -> None:
    """Fails if --base and --adapter do not reach the check, or another adapter passes."""
    record = json.loads((model / "decal_record.json").read_text())
    record["adapter"]["path"] = "gone/adapter"
    (model / "decal_record.json").write_text(json.dumps(record))
    assert _results(verify(model))["base + adapter"] == "not checked"
    assert _results(verify(model, adapter=finished.run))["base + adapter"] == "ok"
    _later(run)
    found = verify(model, adapter=run / "adapter")
    assert "is not the adapter that was merged" in found["problems"][0]
    other = Path(shutil.copytree(demo.base_path(), tmp_path / "other"))
    _flip(other / "model.safetensors", -3)
    found = verify(model, adapter=finished.run, base=str(other))
    assert "is not the base that was merged" in found["problems"][0]


def test_a_wrong_merge_with_a_right_record(model: Path) -> None:
    """Whoever changes the folder can change the record; base and adapter tell. Fails if the hashes
    alone are asked."""
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = load_file(demo.base_path() / "model.safetensors")[key]
    save_file(tensors, weights, {"format": "pt"})
    path = model / "decal_record.json"
    record = json.loads(path.read_text())
    from decal.store.base import open_base
    from decal.store.tensorfile import hash_entry

    record["tensors"][key] = hash_entry(open_base(model).tensors[key])
    path.write_text(json.dumps(record))
    found = verify(model)
    assert _results(found)["record"] == "ok"
    assert [p for p in found["problems"] if "q_proj: " in p]


def test_quantized_folders_are_recorded_too(tmp_path: Path) -> None:
    quantize(demo.base_path(), tmp_path / "q", QuantConfig(format="nf4"))
    assert verify(tmp_path / "q")["problems"] == []
    _flip(tmp_path / "q" / "model.safetensors", -100)
    assert len(verify(tmp_path / "q")["problems"]) == 1


def test_a_model_of_another_tool(tmp_path: Path) -> None:
    """Only its numbers can be looked at. Fails if a missing record is a problem."""
    other = Path(shutil.copytree(demo.base_path(), tmp_path / "other"))
    found = verify(other)
    assert found["problems"] == []
    assert _results(found) == {"files": "ok", "record": "not checked", "numbers": "ok"}


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(DecalError, match="neither a run, an adapter nor a model"):
        verify(tmp_path)


def test_settings_alone_are_no_run(tmp_path: Path) -> None:
    """Fails when a folder with a run.yaml and nothing else passes as a sound run."""
    (tmp_path / "run.yaml").write_text("base: b\ndata: d.jsonl\noutput: o\n")
    with pytest.raises(DecalError, match="nothing to verify"):
        verify(tmp_path)
