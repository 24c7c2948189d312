"""The same folder gives the same logits in decal, in peft and in transformers, both ways."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from decal.config import LoraConfig
from decal.model.adapter import Adapter
from decal.model.inject import adapter_state, attach

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

SIZES: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "pad_token_id": 0,
}
BASES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gpt2": GPT2Config(n_embd=60, n_layer=2, n_head=6, vocab_size=131),
}
LIST, REGEX = ("q_proj", "down_proj"), r"model\.layers\.1\..*(k|up)_proj"
CASES = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": LIST, "use_rslora": True}),
    ("qwen2", {"target_modules": "all-linear", "use_rslora": True}),
    ("qwen2", {"target_modules": REGEX}),
    ("gpt2", {"target_modules": ("c_attn", "mlp.c_proj")}),
]
IDS = torch.randint(1, 131, (3, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=CASES, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    name, options = request.param
    return name, {"r": 5, "lora_alpha": 7, "lora_dropout": 0.1, **options}


def base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights each time, biases too."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(BASES[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(dtype).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found.float()


def peft_folder(name: str, options: dict[str, Any], out: Path) -> Tensor:
    """Trains a step with peft so that B is not zero, saves, and returns its logits."""
    targets = options["target_modules"]
    options = {
        **options,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sets fan_in_fan_out for gpt2, and says so
        model = peft.get_peft_model(base(name), peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=3.0)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(out)
    return logits(model)


def decal_folder(name: str, options: dict[str, Any], out: Path) -> Tensor:
    """The same with decal."""
    model = base(name)
    attach(model, LoraConfig(**options), seed=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=3.0)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    Adapter.from_model(model).save_pretrained(out)
    return logits(model.eval())


def load_peft(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base(name, dtype), folder).eval()


def load_decal(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = base(name, dtype)
    attach(model, Adapter.from_pretrained(folder))
    return model


def assert_same(got: Tensor, want: Tensor, name: str) -> None:
    """1e-5 of the logits' size, and the adapter's effect far above that."""
    size = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * size
    assert (want - logits(base(name))).abs().max() > 1e-2 * size


def test_from_peft_to_decal(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """float32, 1e-5 relative. Mutations: alpha / r for rslora; do not scale."""
    name, options = case
    want = peft_folder(name, options, tmp_path / "adapter")
    assert_same(logits(load_decal(name, tmp_path / "adapter")), want, name)


def test_from_decal_to_peft(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """float32, 1e-5 relative. Mutation: write r for lora_alpha."""
    name, options = case
    want = decal_folder(name, options, tmp_path / "adapter")
    assert_same(logits(load_peft(name, tmp_path / "adapter")), want, name)


def test_from_decal_to_transformers(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """transformers' own load_adapter. Mutation: leave the prefix out of the keys."""
    name, options = case
    want = decal_folder(name, options, tmp_path / "adapter")
    model = base(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(str(tmp_path / "adapter"))
    assert_same(logits(model.eval()), want, name)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_bf16_is_as_near_to_float32_as_peft(name: str, tmp_path: Path) -> None:
    """Error against float32 with the same rounded base at most 1.2 times peft's.

    Mutation: leave the adapter out.
    """
    options = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"}
    peft_folder(name, options, tmp_path / "adapter")
    exact = load_decal(name, tmp_path / "adapter", torch.bfloat16).float()
    reference = logits(exact)
    ours, theirs = (
        (logits(load(name, tmp_path / "adapter", torch.bfloat16)) - reference).norm()
        for load in (load_decal, load_peft)
    )
    assert ours <= 1.2 * theirs
    assert theirs < 0.1 * reference.norm()


def test_one_training_step_is_pefts(tmp_path: Path) -> None:
    """Gradients of A and B from the same start, rtol 1e-4 of the largest.

    Mutation: no scaling in dA.
    """
    options = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "lora_dropout": 0.0}
    peft_folder("qwen2", options, tmp_path / "adapter")
    ours = load_decal("qwen2", tmp_path / "adapter").train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(
            base("qwen2"), tmp_path / "adapter", is_trainable=True
        ).train()
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parts in adapter_state(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        for own, other in ((parts.A, layer.lora_A), (parts.B, layer.lora_B)):
            want = other["default"].weight.grad
            assert own.grad is not None
            assert (own.grad - want).abs().max() <= 1e-4 * want.abs().max()
