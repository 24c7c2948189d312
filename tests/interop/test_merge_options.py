"""`decal merge` of every option of LoRA: the merged folder is the adapter on its base.

The adapters are peft's own (tests/peft_adapters.py), so peft is the judge twice: what its model
computes with the adapter on, and what its merge_and_unload makes of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from decal.errors import AdapterError, DecalWarning
from decal.verbs.merge import Merged, merge
from tests import zoo
from tests.peft_adapters import OPTIONS, QV, TIED, logits, theirs

pytest.importorskip("peft")
pytestmark = pytest.mark.interop

BY_PEFT_TOO = {
    "plain", "rslora", "conv1d", "ranks", "ranks and rslora", "layers", "biases", "bias of B",
    "all biases", "head", "head and embedding", "norms", "embedding", "classifier of bert",
    "experts beside",
}  # fmt: skip
"""Options whose merged weights are compared with peft's. Its merged models of tied bases cannot be
saved and read as they are."""


def _merged(folder: Path, name: str, **more: Any) -> Merged:
    zoo.save(name, folder / "base")
    return merge(str(folder / "base"), folder / "a", folder / "m", **more)


def _plain(name: str, folder: Path) -> Any:
    auto = AutoModelForCausalLM if zoo.ZOO[name].causal else AutoModelForSequenceClassification
    model, told = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("option", [*OPTIONS, *(f"tied by peft, {o}" for o in TIED)])
def test_the_merged_folder_is_the_adapter_on_its_base(tmp_path: Path, option: str) -> None:
    """Fails if one scaling is the wrong one, if a bias, a whole module or an embedding is left out,
    if an embedding's delta is not transposed, or if a tied pair stays tied that must not."""
    tied = TIED.get(option.removeprefix("tied by peft, "))
    name, settings = ("llama", tied) if tied else OPTIONS[option]
    model = theirs(tmp_path / "a", name, **settings)
    report = _merged(tmp_path, name).report
    found, expected, before = (
        logits(m) for m in (_plain(name, tmp_path / "m"), model, zoo.build(name))
    )
    size = float(expected.abs().max())
    # float32 sums in another order through two layers with large random weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)
    assert (expected - before).abs().max() > 1e-2 * size
    assert report.targeted == sum(hasattr(m, "lora_A") and m.r != {} for m in model.modules())
    if option in BY_PEFT_TOO:
        state = model.merge_and_unload().state_dict()
        for key, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
            if ".experts." not in key:
                torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-5)


def test_a_head_that_follows_its_embedding_stays_tied(tmp_path: Path) -> None:
    """Both were trained as one, and are one in the output. Fails if both are written apart."""
    theirs(tmp_path / "a", "llama", **TIED["saved"])
    merged = _merged(tmp_path, "llama")
    assert merged.report.untied == ()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")


def test_only_what_was_adapted_of_a_tied_pair_changes(tmp_path: Path) -> None:
    theirs(tmp_path / "a", "llama", target_modules=["q_proj", "embed_tokens"])
    assert _merged(tmp_path, "llama").report.untied == ("lm_head.weight",)
    before = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before)
    assert not torch.equal(after["model.embed_tokens.weight"], before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_whole_parameters_are_rounded_once(tmp_path: Path, dtype: Any) -> None:
    """Fails if a replaced tensor keeps its own dtype, or a bias is rounded before B's is added."""
    model = theirs(tmp_path / "a", "qwen2", modules_to_save=["lm_head"], lora_bias=True)
    _merged(tmp_path, "qwen2", dtype=dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {kind}
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(after["lm_head.weight"], head.to(kind))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    bias = layer.base_layer.bias + layer.lora_B["default"].bias * (7 / 3)
    assert torch.equal(after["model.layers.0.self_attn.q_proj.bias"], bias.to(kind))


def test_a_per_expert_file_keeps_its_experts(tmp_path: Path) -> None:
    """transformers fuses experts on loading; the files hold each for itself, and keep them to the
    byte. Fails if such keys stop a merge that does not touch them."""
    theirs(tmp_path / "a", "qwen3_moe", target_modules=QV)
    _merged(tmp_path, "qwen3_moe")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert before.keys() == after.keys()
    experts = [key for key in before if ".experts.3." in key]
    assert len(experts) == 3
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{i}.self_attn.{p}.weight" for i in range(2) for p in QV}


def test_experts_trained_whole_are_refused(tmp_path: Path) -> None:
    theirs(tmp_path / "a", "qwen3_moe", modules_to_save=["1.mlp.experts"])
    with pytest.raises(
        AdapterError, match=r"changes 2 tensors that the base's files hold in parts"
    ):
        _merged(tmp_path, "qwen3_moe")


def test_a_bias_needs_a_bias(tmp_path: Path) -> None:
    """gemma's layers have none, and a plain model of it has no place for one."""
    theirs(tmp_path / "a", "gemma", lora_bias=True)
    with pytest.raises(AdapterError, match="on 4 of 4 modules whose layers have no bias"):
        _merged(tmp_path, "gemma")


def test_another_base_is_told_by_the_copies(tmp_path: Path) -> None:
    theirs(tmp_path / "a", "qwen2", target_modules=["q_proj", "lm_head"])
    zoo.save("qwen2", tmp_path / "base", seed=5)
    with pytest.raises(AdapterError, match="1 of 1 base weights stored in it differ"):
        merge(str(tmp_path / "base"), tmp_path / "a", tmp_path / "m")
    with pytest.warns(DecalWarning, match="holds 1 base weights that differ"):
        merge(str(tmp_path / "base"), tmp_path / "a", tmp_path / "m", allow_other_base=True)


def test_a_resized_vocabulary_is_told_by_the_copies(tmp_path: Path) -> None:
    theirs(tmp_path / "a", "qwen2", target_modules=["q_proj", "lm_head"])
    small = zoo.build("qwen2")
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="resized"):
        merge(str(tmp_path / "base"), tmp_path / "a", tmp_path / "m")


def test_a_classifier_of_a_language_model(tmp_path: Path) -> None:
    """A causal base and a head from the adapter: the folder is a classifier, its language head is
    gone, and its config names the classes. Fails if the head is not added, or labels are lost."""
    model = theirs(tmp_path / "a", "llama_classify", task_type="SEQ_CLS")
    tensors: dict[str, Tensor] = {
        key: value
        for key, value in zoo.build("llama_classify").state_dict().items()
        if not key.startswith("score")
    }
    config = zoo.ZOO["llama_classify"].config()
    config.pad_token_id = None
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    causal = AutoModelForCausalLM.from_config(config)
    causal.load_state_dict(tensors, strict=False)
    causal.save_pretrained(tmp_path / "base")
    zoo.tokenizer().save_pretrained(tmp_path / "base")
    report = merge(str(tmp_path / "base"), tmp_path / "a", tmp_path / "m").report
    assert report.replaced == 1
    merged = _plain("llama_classify", tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-3)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)}
    assert written["label2id"] == {f"LABEL_{i}": i for i in range(3)}
    assert written["problem_type"] == "single_label_classification"
    assert written["pad_token_id"] == 0
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")


def test_a_head_needs_a_classifier(tmp_path: Path) -> None:
    """Without task_type SEQ_CLS the score of an adapter is no part of a language model."""
    theirs(tmp_path / "a", "llama_classify", modules_to_save=["score"], task_type=None)
    zoo.save("llama", tmp_path / "base")
    with pytest.raises(AdapterError, match="are not in the base"):
        merge(str(tmp_path / "base"), tmp_path / "a", tmp_path / "m")


def test_an_incomplete_head_is_refused(tmp_path: Path) -> None:
    """BERT's pooler is part of the head, and peft does not save it. A base that lacks it would get
    a random one."""
    theirs(tmp_path / "a", "bert", task_type="SEQ_CLS", target_modules=["query"])
    zoo.save("bert", tmp_path / "base")
    zoo.rewrite(tmp_path / "base", lambda t: {k: v for k, v in t.items() if "pooler" not in k})
    with pytest.raises(AdapterError, match=r"2 of .* parameters of the classifier are neither"):
        merge(str(tmp_path / "base"), tmp_path / "a", tmp_path / "m")
