"""PEFT's own files are read by us, ours are read by PEFT: the same tensors, the same logits.

Each adapter of the table (tests/peft_adapters.py) is made by the real peft. It is read, written
again, and loaded by peft from both folders.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from decal.config import LoraConfig
from decal.errors import AdapterError, DecalWarning
from decal.model.adapter import Adapter
from decal.model.inject import attach
from decal.store.peft import (
    LoraTensors,
    PeftAdapter,
    peek_adapter,
    read_adapter,
    write_adapter,
)
from tests.peft_adapters import OPTIONS, QV, TIED, base, logits, theirs
from tests.zoo import ZOO

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

PREFIX = "base_model.model."
HARMLESS = (
    "is_gradient_checkpointing", "tie_word_embeddings=True", "low_cpu_mem_usage=False",
    "merging LoRA weights won't be possible",
)  # fmt: skip
"""Warnings of peft about the base and itself; none about an adapter's files."""


def _loaded(name: str, folder: Path) -> Any:
    """The adapter as peft loads it; any warning about its files is an error."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(name), folder).eval()
    serious = [str(w.message) for w in told if not any(h in str(w.message) for h in HARMLESS)]
    assert not serious
    return model


def _same(model: Any, adapter: PeftAdapter) -> None:
    """Every tensor of `adapter` is the one in peft's model, and there are no others."""
    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and (len(module.lora_A) or len(module.lora_embedding_A))
    }
    assert layers.keys() == adapter.tensors.keys()
    for name, layer in layers.items():
        A, B, bias = adapter.tensors[name]
        if name in adapter.embeddings:
            assert torch.equal(layer.lora_embedding_A["default"], A)
            assert torch.equal(layer.lora_embedding_B["default"], B)
        else:
            assert torch.equal(layer.lora_A["default"].weight, A)
            assert torch.equal(layer.lora_B["default"].weight, B)
            own = layer.lora_B["default"].bias
            assert (own is None) == (bias is None)
            assert bias is None or torch.equal(own, bias)
        assert layer.scaling["default"] == adapter.config.scaling_of(name)
        assert layer.r["default"] == adapter.config.rank_of(name)
    state = {
        key.removeprefix(PREFIX)
        .replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", "."): value
        for key, value in model.state_dict().items()
        if ".original_module." not in key
    }
    for name, value in {**adapter.full, **adapter.base_copies}.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("option", OPTIONS)
def test_there_and_back_again(tmp_path: Path, option: str) -> None:
    """theirs -> ours -> theirs: equal tensors, and logits that are equal to the bit.

    Fails if the scaling ignores a pattern or use_rslora, if A and B are swapped, if a bias or a
    whole module is left out, or if any setting is lost that changes what is computed.
    """
    name, settings = OPTIONS[option]
    model = theirs(tmp_path / "a", name, **settings)
    adapter = read_adapter(tmp_path / "a")
    _same(model, adapter)
    write_adapter(tmp_path / "b", adapter)
    again = _loaded(name, tmp_path / "b")
    _same(again, adapter)
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(base(name))).abs().max() > 0.05
    _equal(adapter, read_adapter(tmp_path / "b"))
    read, ours = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in "ab")
    assert _comparable(ours, adapter) == _comparable(read, adapter)


def _equal(one: PeftAdapter, other: PeftAdapter) -> None:
    saved = {"modules_to_save": ()}  # other names for the same modules, see full
    assert one.config.model_copy(update=saved) == other.config.model_copy(update=saved)
    for field in ("embeddings", "metadata", "task_type", "auto_mapping", "fan_in_fan_out",
                  "other_settings"):  # fmt: skip
        assert getattr(one, field) == getattr(other, field), field
    assert one.tensors.keys() == other.tensors.keys()
    for module, parts in one.tensors.items():
        for mine, yours in zip(parts, other.tensors[module], strict=True):
            assert (mine is None) == (yours is None)
            assert mine is None or torch.equal(mine, yours)
    assert one.full.keys() == other.full.keys()
    assert all(torch.equal(value, other.full[name]) for name, value in one.full.items())
    assert not other.base_copies


def _comparable(raw: dict[str, Any], adapter: PeftAdapter) -> dict[str, Any]:
    """A config without what may differ: the order of names, and how modules_to_save are named."""
    saved = set(raw.pop("modules_to_save") or ()) - {"classifier", "score"}
    whole = {m for m in saved for name in adapter.full if f"{m}." in name}
    lists = {key: sorted(v) for key, v in raw.items() if isinstance(v, list)}
    return {**raw, **lists, "saves": bool(whole)}


@pytest.mark.parametrize("option", [*OPTIONS, *TIED])
def test_attached_it_computes_the_same(tmp_path: Path, option: str) -> None:
    """Every option on a model of ours, and saved from it again. Fails if attaching leaves out what
    the file holds, or saving what is attached."""
    name, settings = OPTIONS.get(option) or ("llama", TIED[option])
    expected = logits(theirs(tmp_path / "a", name, **settings))
    model = base(name)
    attach(model, Adapter.from_pretrained(tmp_path / "a"))
    # float32 sums in another order
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=atol)
    Adapter.from_model(model).save_pretrained(tmp_path / "b")
    before, after = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    assert before.tensors.keys() == after.tensors.keys()
    assert before.full.keys() == after.full.keys()


@pytest.mark.parametrize("option", TIED)
def test_a_head_tied_by_peft_becomes_a_module_of_its_own(tmp_path: Path, option: str) -> None:
    """With ensure_weight_tying peft writes the head's tensors, but not its name. Fails if they are
    dropped: the head then keeps the old weight."""
    model = theirs(tmp_path / "a", "llama", **TIED[option])
    adapter = read_adapter(tmp_path / "a")
    _same(model, adapter)
    assert "lm_head" in (
        adapter.config.modules_to_save if option == "saved" else adapter.config.target_modules
    )
    write_adapter(tmp_path / "b", adapter)
    again = _loaded("llama", tmp_path / "b")
    # float32 sums in another order: the head's factors are views of the embedding's in peft
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}],
                         ids=str)  # fmt: skip
def test_a_resized_vocabulary_is_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    """peft stores the resized matrices, beside modules_to_save even three times. They are copies of
    the base where they were not trained. Fails if a copy is taken for a trained parameter."""
    base("qwen2").save_pretrained(tmp_path / "base")
    model = base("qwen2")
    model.resize_token_embeddings(270)
    model.name_or_path = str(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=QV, task_type="CAUSAL_LM", **settings
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    trained, copied = (set(), names) if not settings else (names, set())
    assert (set(adapter.full), set(adapter.base_copies)) == (trained, copied)
    for value in (*adapter.full.values(), *adapter.base_copies.values()):
        assert value.shape == (270, 60)


def test_peeking_sees_what_reading_reads(tmp_path: Path) -> None:
    """Fails if the parameters count a copy of the base, or leave the biases out."""
    settings = {"modules_to_save": ["lm_head"], "bias": "all", "rank_pattern": {"q_proj": 5}}
    theirs(tmp_path / "a", "qwen2", target_modules=[*QV, "embed_tokens"], **settings)
    adapter, header = read_adapter(tmp_path / "a"), peek_adapter(tmp_path / "a")
    assert header.config == adapter.config
    assert header.full == {name: tuple(t.shape) for name, t in adapter.full.items()}
    assert {m: h.shape for m, h in header.modules.items()} == {
        m: (t.B.shape[0], t.A.shape[1]) for m, t in adapter.tensors.items()
    }
    assert {m: h.r for m, h in header.modules.items()} == {
        m: len(t.A) for m, t in adapter.tensors.items()
    }
    assert {m for m, h in header.modules.items() if h.embedding} == adapter.embeddings
    values = [*adapter.full.values(), *(t for p in adapter.tensors.values() for t in p[:2])]
    assert header.parameters == sum(t.numel() for t in values)
    assert adapter.base_copies


def test_a_pickle_of_theirs_is_read_with_a_warning(tmp_path: Path) -> None:
    model = theirs(tmp_path / "a", "llama", bias="all")
    model.save_pretrained(tmp_path / "b", safe_serialization=False)
    assert not (tmp_path / "b" / "adapter_model.safetensors").exists()
    with pytest.warns(DecalWarning, match="stored as a pickle"):
        adapter = read_adapter(tmp_path / "b")
    _equal(read_adapter(tmp_path / "a"), adapter)
    _same(model, adapter)


def _ours(**changes: Any) -> PeftAdapter:
    """An adapter that was never peft's."""
    settings = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": ("q_proj",)}
    config = LoraConfig(**{**settings, **changes})
    tensors = {}
    for i in range(2):
        module = f"model.layers.{i}.self_attn.q_proj"
        r = config.rank_of(module)
        bias = torch.randn(60) if config.lora_bias else None
        tensors[module] = LoraTensors(torch.randn(r, 54), torch.randn(60, r), bias)
    full = {"model.norm.weight": torch.randn(54)} if config.modules_to_save else {}
    if config.bias != "none":
        full |= {f"{module}.bias": torch.randn(60) for module in tensors}
    return PeftAdapter(
        config=config,
        tensors=tensors,
        full=full,
        metadata={"decal.base": "abc"},
        base_model_name_or_path="org/base",
    )


OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.q_proj"},
    "expression and layers": {"target_modules": r".*\.q_proj", "layers_to_transform": (0, 1)},
    "half an alpha": {"lora_alpha": 7.5},
    "patterns": {"rank_pattern": {r"0\..*q_proj": 5}, "alpha_pattern": {"q_proj": 4.5}},
    "gaussian with a bias of B": {"init_lora_weights": "gaussian", "lora_bias": True},
    "biases": {"bias": "lora_only"},
    "end after a dot": {"modules_to_save": ("norm",)},
    "pattern of no layers": {"layers_pattern": "layers"},
}


@pytest.mark.parametrize("option", OURS)
def test_ours_is_read_by_peft(tmp_path: Path, option: str) -> None:
    """Fails if the prefix is left out (peft then loads nothing and only warns), or if `norm` is
    written as it stands, which peft takes for every name that ends so."""
    adapter = _ours(**OURS[option])
    write_adapter(tmp_path / "a", adapter)
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert config.base_model_name_or_path == "org/base"
    assert (config.r, config.lora_alpha) == (3, adapter.config.lora_alpha)
    _same(_loaded("llama", tmp_path / "a"), adapter)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
    ids=str,
)
def test_variants_of_theirs_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    theirs(tmp_path / "a", "llama", **settings)
    with pytest.raises(AdapterError, match=word):
        read_adapter(tmp_path / "a")


def test_their_other_methods_are_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM")
    peft.get_peft_model(base("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="peft_type 'IA3'"):
        read_adapter(tmp_path / "a")


def test_a_named_adapter_lies_in_a_folder_below(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base("llama"), config, adapter_name="sql").save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "a")
    assert "sql" in str(caught.value.hint)
    assert len(read_adapter(tmp_path / "a" / "sql").tensors) == 2


def test_the_options_cover_the_architectures() -> None:
    assert {name for name, _ in OPTIONS.values()} <= ZOO.keys()
