"""Every option of LoRA: the same tensors give the same logits in decal and in the real peft."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decal.config import LoraConfig
from decal.model.adapter import Adapter
from decal.model.inject import attach, detach, disabled, trainable_parameters
from tests.zoo import VOCABULARY, build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

IDS = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))
IDS[0, 7:] = 0  # padding tokens, whose embedding is trained by neither
BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 5, "v_proj": 2}}),
    "alphas": ("llama", {"alpha_pattern": {r"layers\.0\..*": 11, "v_proj": 2.5}}),
    "both, rank stabilized": (
        "qwen2",
        {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ),
    "excluded": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded by expression": ("llama", {"exclude_modules": r".*\.1\..*v_proj"}),
    "layer": ("llama", {"layers_to_transform": 1}),
    "layers of a list": ("llama", {"layers_to_transform": [1], "layers_pattern": ["layers"]}),
    "embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embeddings of gpt2": ("gpt2", {"target_modules": ["c_attn", "wte", "wpe"]}),
    "head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "head saved": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "tied head saved": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding saved": ("gemma3", {"modules_to_save": ["embed_tokens"]}),
    "norms saved": ("llama", {"modules_to_save": ["model.norm", "post_attention_layernorm"]}),
    "block saved": ("llama", {"modules_to_save": ["mlp"], "target_modules": "all-linear"}),
    "classifier": ("llama_classify", {"task_type": "SEQ_CLS"}),
    "classifier of bert": ("bert", BERT),
    "classifier of several layers": ("roberta", BERT),
    "pooler saved": ("bert", {**BERT, "modules_to_save": ["pooler", "classifier"]}),
    "biases": ("llama", {"bias": "all"}),
    "biases of norms": ("bert", {**BERT, "bias": "all"}),
    "biases of conv1d": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of targets": ("llama", {"bias": "lora_only"}),
    "biases of B": ("llama", {"lora_bias": True, "alpha_pattern": {"v_proj": 2}}),
    "every bias": ("qwen2", {"lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"]}),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def settings(options: dict[str, Any]) -> dict[str, Any]:
    shared = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "init_lora_weights": False}
    defaults = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return copy.deepcopy({**shared, **defaults, **options})  # peft adds to the lists it is given


def disturb(model: Any) -> None:
    """What is trained moves, biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def theirs(name: str, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(build(name), peft.LoraConfig(**settings(options))).eval()


def assert_same(got: Tensor, want: Tensor, base: Tensor) -> None:
    """1e-5 of the logits' size, and the adapter's effect far above that."""
    size = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * size
    assert (want - base).abs().max() > 1e-2 * size


@pytest.mark.parametrize("option", OPTIONS)
def test_their_adapter_gives_their_logits(option: str, tmp_path: Path) -> None:
    """float32, 1e-5. Mutations: one scaling for all modules; no gain of the embedding; train the
    tied embedding with its head; add the bias instead of its difference."""
    name, options = OPTIONS[option]
    model = theirs(name, options)
    disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    ours = build(name)
    base = logits(ours)
    attach(ours, Adapter.from_pretrained(tmp_path))
    assert_same(logits(ours), logits(model), base)
    with disabled(ours):
        assert torch.equal(logits(ours), base)
    detach(ours)
    assert torch.equal(logits(ours), base)


@pytest.mark.parametrize("option", OPTIONS)
def test_our_adapter_gives_our_logits_in_peft(option: str, tmp_path: Path) -> None:
    """float32, 1e-5, and the same number of trained parameters. Mutation: adapt one module more."""
    name, options = OPTIONS[option]
    given = settings(options)
    task = given.pop("task_type")
    if task == "SEQ_CLS":
        heads = [n for n in ("score", "classifier") if hasattr(build(name), n)]
        given["modules_to_save"] = [*given.get("modules_to_save", ()), *heads]
    ours = build(name)
    base = logits(ours)
    found = attach(ours, LoraConfig(**given), seed=3)
    assert trainable_parameters(ours)[0] == found.parameters
    if "bias" not in given:  # peft makes the bias of a module that it saves trainable twice
        assert theirs(name, options).get_nb_trainable_parameters()[0] == found.parameters
    disturb(ours)
    Adapter.from_model(ours, task_type=task).save_pretrained(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(build(name), tmp_path / "out").eval()
    assert_same(logits(ours), logits(model), base)


@pytest.mark.parametrize("option", ["embedding", "scaled embedding", "every bias", "biases"])
def test_gradients_are_theirs(option: str, tmp_path: Path) -> None:
    """rtol 1e-4 of the largest; the padding token's column of A gets none.

    Mutations: no scaling of B's bias; forget padding_idx.
    """
    name, options = OPTIONS[option]
    model = theirs(name, {**options, "lora_dropout": 0.0}).train()
    disturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    ours = build(name).train()
    attach(ours, Adapter.from_pretrained(tmp_path))
    for each in (ours, model):
        each(input_ids=IDS, labels=IDS).loss.backward()
    want = [p.grad for p in model.parameters() if p.requires_grad]
    got = [p.grad for p in ours.parameters() if p.requires_grad]
    assert got
    assert sum(g.numel() for g in got) == sum(w.numel() for w in want)
    for left, right in ((got, want), (want, got)):
        for gradient in left:
            alike = [g for g in right if g.shape == gradient.shape]
            assert any(
                float((gradient - g).abs().max()) <= 1e-4 * float(g.abs().max()) for g in alike
            )


@pytest.mark.parametrize(
    "change",
    [
        {"exclude_modules": ["self_attn.q_proj", "mlp"]},
        {"exclude_modules": r".*\.(0|2)\..*"},
        {"modules_to_save": ["mlp"]},
        {"modules_to_save": ["up_proj"], "exclude_modules": ["down_proj"]},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ("model.layers.1.mlp.up_proj", "k_proj")},
        {"target_modules": r".*layers\.\d\.(mlp|self_attn)\.[qu].*proj"},
    ],
    ids=str,
)
def test_modules_are_chosen_as_peft_chooses(change: dict[str, Any]) -> None:
    """Mutations: match layers_to_transform before exclusion; let endings match without a dot."""
    from peft.tuners.tuners_utils import check_target_module_exists

    from decal.model.survey import module_infos
    from decal.model.targets import select

    infos = module_infos(build("gemma3"))
    fields = {"target_modules": ("q_proj", "up_proj", "down_proj"), **change}
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    reference = peft.LoraConfig(**given)
    verdicts = {name: check_target_module_exists(reference, name) for name in infos if name}
    wanted = [name for name, said in verdicts.items() if said is True or isinstance(said, re.Match)]
    assert wanted
    assert select(infos, LoraConfig(**fields), new=False)[0] == wanted
