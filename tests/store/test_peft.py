"""PEFT folders: strict in both directions; what is refused is refused by name, in one error."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal.config import LoraConfig
from decal.errors import (
    AdapterError,
    DecalError,
    DecalWarning,
    OutputError,
    StorageError,
    VerificationError,
)
from decal.store import peft as module
from decal.store.peft import (
    LoraTensors,
    ModuleHeader,
    PeftAdapter,
    peek_adapter,
    read_adapter,
    write_adapter,
)
from decal.store.peft_config import DEFAULTS

Q = "model.layers.0.self_attn.q_proj"
D = "model.layers.1.mlp.down_proj"


def _adapter(**changes: Any) -> PeftAdapter:
    tensors = {
        Q: LoraTensors(torch.randn(3, 10), torch.randn(7, 3)),
        D: LoraTensors(torch.randn(3, 13), torch.randn(5, 3)),
    }
    fields = {
        "config": LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj", "down_proj")),
        "tensors": tensors,
        "metadata": {"decal.base": "abc"},
        "base_model_name_or_path": "org/base",
        "revision": "main",
    }
    return PeftAdapter(**{**fields, **changes})


def _written(folder: Path, **changes: Any) -> Path:
    write_adapter(folder, _adapter(**changes))
    return folder


def _edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    raw = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def _retensor(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, file, {"format": "pt"})


def _refused(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    return caught.value


def test_round_trip(tmp_path: Path) -> None:
    """Fails if A and B are swapped, or if a factor is stored with fewer bits."""
    meant = _adapter()
    write_adapter(tmp_path / "a", meant)
    found = read_adapter(tmp_path / "a")
    assert found.config == meant.config.model_copy(
        update={"target_modules": ("down_proj", "q_proj")}
    )
    assert found.config.scaling == 7 / 3
    assert found.tensors.keys() == meant.tensors.keys()
    for name, (A, B, _) in meant.tensors.items():
        assert torch.equal(found.tensors[name].A, A)
        assert torch.equal(found.tensors[name].B, B)
    assert found.metadata == {"decal.base": "abc"}
    assert (found.base_model_name_or_path, found.revision) == ("org/base", "main")
    assert found.task_type == "CAUSAL_LM"


def test_the_files_follow_peft(tmp_path: Path) -> None:
    folder = _written(tmp_path / "a")
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert list(raw) == sorted(DEFAULTS)
    assert len(raw) == 41
    assert raw["inference_mode"] is True
    assert raw["target_modules"] == ["down_proj", "q_proj"]
    assert isinstance(raw["lora_alpha"], int)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {
        f"base_model.model.{m}.lora_{x}.weight": (torch.float32, shape)
        for m, x, shape in [
            (Q, "A", (3, 10)),
            (Q, "B", (7, 3)),
            (D, "A", (3, 13)),
            (D, "B", (5, 3)),
        ]
    }
    assert sorted(f.name for f in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["all-linear", "attention"])
def test_decals_words_become_the_modules_that_were_chosen(tmp_path: Path, word: str) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=word)
    found = read_adapter(_written(tmp_path / "a", config=config))
    assert found.config.target_modules == (Q, D)


def test_a_regular_expression_stays_one(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7.5, target_modules=r".*\.(q|down)_proj", use_rslora=True)
    found = read_adapter(_written(tmp_path / "a", config=config))
    assert found.config.target_modules == r".*\.(q|down)_proj"
    assert found.config.scaling == 7.5 / 3**0.5
    _edit(tmp_path / "a", target_modules="(")
    assert "no regular expression" in str(_refused(tmp_path / "a"))


def test_missing_keys_have_pefts_defaults(tmp_path: Path) -> None:
    """r 8 and lora_alpha 8, not decal's 16 and 2 r. Fails if LoraConfig's own defaults are used."""
    tensors = {Q: LoraTensors(torch.randn(8, 10), torch.randn(7, 8))}
    config = LoraConfig(r=8, lora_alpha=99)
    folder = _written(tmp_path / "a", tensors=tensors, config=config)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    found = read_adapter(folder).config
    assert (found.r, found.lora_alpha, found.lora_dropout, found.scaling) == (8, 8, 0.0, 1.0)
    assert found.target_modules == (Q,)
    assert found.init_lora_weights is True


def test_narrowing_settings_are_kept(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=("q_proj", "down_proj", "up_proj"),
        exclude_modules=("up_proj",), layers_to_transform=(0, 1), layers_pattern="layers",
    )  # fmt: skip
    found = read_adapter(_written(tmp_path / "a", config=config)).config
    assert found.layers_to_transform == (0, 1)
    assert found.model_copy(update={"target_modules": config.target_modules}) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _written(tmp_path / "a")
    _retensor(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    A = _stored(folder, Q)
    assert read_adapter(folder).tensors[Q].A.dtype == torch.float32
    assert torch.equal(read_adapter(folder).tensors[Q].A, A.float())


def _stored(folder: Path, name: str) -> torch.Tensor:
    file = folder / "adapter_model.safetensors"
    return load_file(file)[f"base_model.model.{name}.lora_A.weight"]


VARIANTS: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"x": 1},
    "corda_config": {"x": 1},
    "from_the_future": 0.5,
    "init_lora_weights": "pissa",
    "kasa_config": {"x": 1},
    "layer_replication": [[0, 2]],
    "lora_ga_config": {"x": 1},
    "megatron_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [5],
    "use_bdlora": {"x": 1},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"x": 1},
}


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_are_refused_by_name(tmp_path: Path, key: str) -> None:
    folder = _written(tmp_path / "a")
    _edit(folder, **{key: VARIANTS[key]})
    error = _refused(folder)
    assert "1 setting does not fit" in error.message
    assert error.details[0].startswith(f"{key}: ")
    assert "merge_and_unload" in str(error.hint)


def test_all_problems_are_collected(tmp_path: Path) -> None:
    folder = _written(tmp_path / "a")
    _edit(folder, use_dora=True, kasa_config={"x": 1}, r=4)
    _retensor(folder, lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector": t[_a(Q)]}))
    error = _refused(folder)
    assert "2 settings and 3 tensors do not fit" in error.message
    assert [d.split(":")[0] for d in error.details[:2]] == ["kasa_config", "use_dora"]
    assert "DoRA magnitude" in error.details[2]
    assert error.details[3].startswith(f"{Q}: A has rank 3")
    assert error.details[3].endswith("  (and 1 more)")


def _of(name: str, ending: str) -> str:
    return f"base_model.model.{name}.{ending}"


def _a(name: str) -> str:
    return _of(name, "lora_A.weight")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"r": 4}, "A has rank 3, B has 3, the config has r=4"),
        ({"r": None}, "r: null"),
        ({"r": "3"}, "r: "),
        ({"lora_alpha": None}, "lora_alpha: null"),
        ({"lora_alpha": -1}, "lora_alpha: "),
        ({"lora_dropout": 1.5}, "lora_dropout: "),
        ({"target_modules": ["q_proj"]}, f"{D}: is not named by target_modules"),
        ({"target_modules": 3}, "neither a string nor a list"),
        ({"target_modules": [1]}, "neither a string nor a list"),
        ({"exclude_modules": ["down_proj"]}, f"{D}: is named by exclude_modules"),
        ({"exclude_modules": 7}, "exclude_modules: 7 (neither"),
        ({"layers_to_transform": [1]}, f"{Q}: is in no layer of layers_to_transform"),
        ({"layers_to_transform": 0}, f"{D}: is in no layer of layers_to_transform"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, f"{Q}: is in no layer"),
        ({"rank_pattern": {"q_proj": 4}}, f"{Q}: A has rank 3, B has 3, the config has r=4"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: "),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": {"q_proj": "7"}}, "alpha_pattern.q_proj: "),
        ({"bias": "some"}, "bias: "),
        ({"lora_bias": True}, f"{Q}: has no lora_B.bias although lora_bias is on"),
        ({"modules_to_save": ["lm_head"]}, "lm_head: is in modules_to_save, no tensor is of it"),
        ({"modules_to_save": ["classifier"]}, "classifier: is in modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head' (neither"),
        ({"modules_to_save": ["mlp"]}, f"{D}: is named by modules_to_save"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    folder = _written(tmp_path / "a")
    _edit(folder, **settings)
    assert word in str(_refused(folder))


def test_harmless_settings_are_accepted(tmp_path: Path) -> None:
    folder = _written(tmp_path / "a")
    _edit(
        folder, from_the_future=None, eva_config={"rho": 2.0}, init_lora_weights="eva",
        peft_version="0.99", auto_mapping={"base_model_class": "X"}, runtime_config={"a": 1},
        bias=..., fan_in_fan_out=True,
    )  # fmt: skip
    found = read_adapter(folder)
    assert found.config.init_lora_weights is True
    assert found.fan_in_fan_out is True
    assert found.auto_mapping == {"base_model_class": "X"}


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "no B": (lambda t: t.pop(_a(Q)), f"{Q}: has lora_B but no lora_A"),
    "no prefix": (
        lambda t: t.update({_a(Q).removeprefix("base_model.model."): t.pop(_a(Q))}),
        "does not have the prefix",
    ),
    "prefix twice": (
        lambda t: t.update({"base_model.model." + _a(Q): t.pop(_a(Q))}), "does not have the prefix",
    ),
    "unknown suffix": (lambda t: t.update({_a(Q) + "2": t[_a(Q)]}), "neither a part of LoRA"),
    "adapter name kept": (
        lambda t: t.update({_a(Q).replace("weight", "default.weight"): t.pop(_a(Q))}),
        "neither a part of LoRA",
    ),
    "half an embedding": (
        lambda t: t.update({"base_model.model.m.lora_embedding_A": t[_a(Q)]}),
        "m: has lora_A but no lora_B",
    ),
    "layer and embedding": (
        lambda t: t.update({_of(Q, "lora_embedding_A"): t[_a(Q)]}),
        f"{Q}: has factors of a layer and of an embedding",
    ),
    "trained tokens": (
        lambda t: t.update({_of(Q, "token_adapter.trainable_tokens_delta"): t[_a(Q)]}),
        "trained token embeddings",
    ),
    "base without factors": (
        lambda t: t.update({_of("lm_head", "base_layer.weight"): t[_a(Q)]}),
        "base of a module that has no factors",
    ),
    "base of another shape": (
        lambda t: t.update({_of(Q, "base_layer.weight"): torch.ones(8, 10)}),
        f"{Q}: the copy of the base has shape [8, 10], the factors [7, 10]",
    ),
    "bias without lora_bias": (
        lambda t: t.update({_of(Q, "lora_B.bias"): torch.ones(7)}),
        f"{Q}: has a lora_B.bias but lora_bias is off",
    ),
    "bias of another size": (
        lambda t: t.update({_of(Q, "lora_B.bias"): torch.ones(8)}), "lora_B.bias has shape [8]",
    ),
    "untrained bias": (
        lambda t: t.update({_of("model.norm", "bias"): torch.ones(8)}),
        "nor a parameter that the settings train",
    ),
    "a twin alone": (
        lambda t: t.update({_of("model.norm", "modules_to_save.bias"): torch.ones(8)}),
        "nor a parameter that the settings train",
    ),
    "different twins": (
        lambda t: t.update({
            _of("lm_head", "weight"): torch.ones(8, 2),
            _of("lm_head", "modules_to_save.weight"): torch.zeros(8, 2),
        }),
        "holds 1 parameters twice",
    ),
    "ranks differ": (lambda t: t.update({_a(Q): torch.ones(2, 10)}), "A has rank 2, B has 3"),
    "not a matrix": (lambda t: t.update({_a(Q): torch.ones(30)}), "F32 [30] is no factor"),
    "integers": (lambda t: t.update({_a(Q): t[_a(Q)].int()}), "I32 [3, 10] is no factor"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
    "NaN": (lambda t: t[_a(Q)].view(-1)[3].fill_(torch.nan), "NaN or infinity in 1 of 4 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(tmp_path: Path, case: str) -> None:
    change, word = BAD_TENSORS[case]
    folder = _written(tmp_path / "a")
    _retensor(folder, change)
    assert word in str(_refused(folder))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert "does not exist" in _refused(folder).message
    _written(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    assert "adapter_model.safetensors` is damaged" in _refused(folder).message
    weights.write_bytes(b"")
    assert "it is empty" in _refused(folder).message
    weights.unlink()
    assert "has no adapter_model.safetensors" in _refused(folder).message
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert "is damaged" in _refused(folder).message
    weights.write_bytes(whole)
    config.write_text("{")
    assert "adapter_config.json` cannot be read" in _refused(folder).message
    config.write_text('{"peft_type": "IA3"}')
    assert "peft_type 'IA3'" in _refused(folder).message
    config.unlink()
    (folder / "config.json").write_text("{}")
    assert "full model" in str(_refused(folder).hint)
    _written(tmp_path / "outer" / "inner")
    assert "inner" in str(_refused(tmp_path / "outer").hint)
    assert "is a file" in _refused(weights).message


def test_where_it_may_be_written(tmp_path: Path) -> None:
    folder = _written(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    changed = _adapter(metadata={"decal.base": "other"})
    with pytest.raises(OutputError, match="not empty"):
        write_adapter(folder, changed)
    write_adapter(folder, changed, exist="into")
    assert sorted(f.name for f in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert read_adapter(folder).metadata == {"decal.base": "other"}
    write_adapter(folder, _adapter(), exist="replace")
    assert not (folder / "tokenizer.json").exists()
    assert read_adapter(folder).metadata == {"decal.base": "abc"}
    write_adapter(tmp_path / "new", _adapter(), exist="into")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="would remove something else"):
        write_adapter(tmp_path / "other", _adapter(), exist="replace")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "new", "other"]


def test_nothing_useless_is_written(tmp_path: Path) -> None:
    """An adapter without tensors, of another rank, or of another module than its config names."""
    one = {Q: LoraTensors(torch.randn(2, 10), torch.randn(7, 2))}
    other = {"model.x": LoraTensors(torch.randn(3, 10), torch.randn(7, 3))}
    for tensors in ({}, one, other):
        with pytest.raises(AdapterError):
            write_adapter(tmp_path / "a", _adapter(tensors=tensors))
    assert not list(tmp_path.iterdir())


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that returns other bits is noticed before the folder is in place."""
    real = module.load_tensors

    def flipped(file: Any) -> dict[str, torch.Tensor]:
        tensors = real(file)
        tensors[_a(Q)][1, 2] += 1e-6
        return tensors

    monkeypatch.setattr(module, "load_tensors", flipped)
    with pytest.raises(VerificationError, match="1 of 4 tensors read back differ"):
        write_adapter(tmp_path / "a", _adapter())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exist", ["replace", "into"])
def test_a_full_disk_keeps_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exist: Any
) -> None:
    folder = _written(tmp_path / "a")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="disk is full"):
            write_adapter(folder, _adapter(metadata={"decal.base": "new"}), exist=exist)
    assert read_adapter(folder).metadata == {"decal.base": "abc"}
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert len(list(folder.iterdir())) == 2


def test_every_truncation_of_the_weights_is_a_decal_error(tmp_path: Path) -> None:
    folder = _written(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 41):
        file.write_bytes(whole[:size])
        with pytest.raises(DecalError):
            read_adapter(folder)


def _every_option() -> PeftAdapter:
    """An adapter that uses all there is, the embedding's factors included."""
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=("q_proj", "down_proj", "embed_tokens"),
        rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 5.5}, bias="all",
        modules_to_save=("lm_head", "norm"), exclude_modules=r".*v_proj", layers_to_transform=None,
    )  # fmt: skip
    return _adapter(
        config=config,
        tensors={
            Q: LoraTensors(torch.randn(3, 10), torch.randn(7, 3)),
            D: LoraTensors(torch.randn(2, 13), torch.randn(5, 2)),
            "model.embed_tokens": LoraTensors(torch.randn(3, 19), torch.randn(10, 3)),
        },
        embeddings=frozenset({"model.embed_tokens"}),
        full={
            f"{Q}.bias": torch.randn(7),
            "model.layers.0.self_attn.v_proj.bias": torch.randn(7),
            "lm_head.weight": torch.randn(19, 10),
            "model.norm.weight": torch.randn(10),
        },
        other_settings={"eva_config": {"rho": 2.0}, "init_lora_weights": "eva", "newer": None},
        auto_mapping={"base_model_class": "X"},
    )


def test_every_option_comes_back(tmp_path: Path) -> None:
    """Fails if a bias of an adapted layer is stored under the layer's own name, where peft looks
    for none, or if a key of the config is lost on the way."""
    meant = _every_option()
    write_adapter(tmp_path / "a", meant)
    found = read_adapter(tmp_path / "a")
    assert found.embeddings == meant.embeddings
    assert found.full.keys() == meant.full.keys()
    assert all(torch.equal(found.full[name], t) for name, t in meant.full.items())
    assert found.other_settings == meant.other_settings
    assert found.auto_mapping == meant.auto_mapping
    assert found.config.rank_of(D) == 2
    assert found.config.scaling_of(Q) == 5.5 / 3
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert {k.removeprefix("base_model.model.") for k in keys} >= {
        f"{Q}.base_layer.bias", "model.layers.0.self_attn.v_proj.bias", "lm_head.weight",
        "model.norm.weight", "model.embed_tokens.lora_embedding_A",
    }  # fmt: skip
    write_adapter(tmp_path / "b", found)
    first, second = ((tmp_path / name / "adapter_config.json").read_text() for name in ("a", "b"))
    assert first == second


def test_a_bias_of_b_comes_back(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj",), lora_bias=True)
    parts = LoraTensors(torch.randn(3, 10), torch.randn(7, 3), torch.randn(7))
    folder = _written(tmp_path / "a", config=config, tensors={Q: parts})
    found = read_adapter(folder).tensors[Q]
    assert found.bias is not None
    assert torch.equal(found.bias, torch.as_tensor(parts.bias))
    with pytest.raises(AdapterError, match=r"no lora_B.bias although lora_bias is on"):
        write_adapter(tmp_path / "b", _adapter(config=config))


def test_copies_of_the_base_are_read_and_never_written(tmp_path: Path) -> None:
    """Beside the factors of an embedding, and where the vocabulary was resized."""
    folder = _written(tmp_path / "a", **_plain(_every_option()))
    embedding, other = torch.randn(19, 10), torch.randn(23, 10)
    _retensor(
        folder,
        lambda t: t.update(
            {
                _of("model.embed_tokens", "base_layer.weight"): embedding,
                _of("model.wte", "weight"): other,
            }
        ),
    )
    found = read_adapter(folder)
    assert found.base_copies.keys() == {"model.embed_tokens.weight", "model.wte.weight"}
    assert torch.equal(found.base_copies["model.embed_tokens.weight"], embedding)
    write_adapter(tmp_path / "b", found)
    assert not read_adapter(tmp_path / "b").base_copies


def _plain(adapter: PeftAdapter) -> dict[str, Any]:
    names = ("config", "tensors", "embeddings", "full")
    return {name: getattr(adapter, name) for name in names}


def test_peeking_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the parameters leave out what is trained whole."""
    meant = _every_option()
    write_adapter(tmp_path / "a", meant)

    def read(_: Any) -> dict[str, torch.Tensor]:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(module, "load_tensors", read)
    header = peek_adapter(tmp_path / "a")
    assert header.modules["model.embed_tokens"] == ModuleHeader(3, (10, 19), True)
    assert header.modules[D] == ModuleHeader(2, (5, 13), False)
    assert header.full["lm_head.weight"] == (19, 10)
    assert header.parameters == 3 * 17 + 2 * 18 + 3 * 29 + 7 + 7 + 190 + 10
    assert header.metadata == {"decal.base": "abc"}


def test_a_pickle_is_read_with_a_warning(tmp_path: Path) -> None:
    folder = _written(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    assert read_adapter(folder).metadata  # safetensors goes first
    expected = read_adapter(folder)
    weights.unlink()
    with pytest.warns(DecalWarning, match=r"stored as a pickle \(adapter_model.bin\)"):
        found = read_adapter(folder)
    assert torch.equal(found.tensors[Q].A, expected.tensors[Q].A)
    with pytest.warns(DecalWarning):
        assert peek_adapter(folder).modules.keys() == found.tensors.keys()
