"""transformers' Trainer and trl's SFTTrainer drive a model with adapters: save, resume, best."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from decal import demo
from decal.config import LoraConfig
from decal.model.adapter import Adapter
from decal.model.inject import adapter_state, attach, detach
from decal.verbs.load import load_base

pytestmark = pytest.mark.interop

BASE = str(demo.base_path())
LORA = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def chats() -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.queue}]
        for row in demo.rows("train")[:16]
    ]


def tokenized(tokenizer: Any) -> datasets.Dataset:
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats()]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"][:32] for t in texts]
    same = [(i + [0] * 32)[:32] for i in ids]
    return datasets.Dataset.from_dict({"input_ids": same, "labels": same})


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def trainer(folder: Path, *, seed: int = 0, quant: Any = "none", **arguments: Any) -> Trainer:
    model, tokenizer = load_base(BASE, quant=quant, dtype="float32")
    attach(model, LORA, seed=seed)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    args = TrainingArguments(**{**settings, **arguments})
    data = tokenized(tokenizer)
    return Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Four steps without a stop, a checkpoint after two."""
    folder = tmp_path_factory.mktemp("straight")
    run = trainer(folder)
    run.train()
    run.save_model(str(folder / "final"))
    return folder, trainable(run.model)


def test_checkpoints_are_peft_folders(straight: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Fails when the wrapped model is written, with `base_layer` in its names."""
    folder, trained = straight
    for place in (folder / "checkpoint-4", folder / "final"):
        assert (place / "adapter_config.json").exists()
        adapter = Adapter.from_pretrained(place)
        assert adapter.config.r == 3
        assert sum(t.numel() for p in adapter.tensors.values() for t in p[:2]) == sum(
            t.numel() for t in trained.values()
        )
    assert not (folder / "final/model.safetensors").exists()
    second_name = folder / "checkpoint-4/model.safetensors"  # Trainer looks for this one
    assert second_name.samefile(folder / "checkpoint-4/adapter_model.safetensors")


def test_peft_reads_what_trainer_saved(straight: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Fails when the scaling is not 5/3, or A and B are swapped."""
    folder, _ = straight
    ids = torch.arange(12)[None]
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, str(folder / "final"))
    model, _tokenizer = load_base(BASE, dtype="float32")
    attach(model, Adapter.from_pretrained(folder / "final"))
    with torch.no_grad():
        theirs, ours = peft.eval()(ids).logits, model.eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_resumed_trainer_ends_where_the_straight_one_did(
    straight: tuple[Path, dict[str, torch.Tensor]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails when the checkpoint's adapter is not loaded: the new one starts from another seed."""
    folder, expected = straight
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    again = trainer(folder, seed=9)
    assert not torch.equal(
        next(iter(trainable(again.model).values())), next(iter(expected.values()))
    )
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found = trainable(again.model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert "keys in the checkpoint" not in caplog.text


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Fails when the last weights stay although an earlier evaluation was better."""
    run = trainer(
        tmp_path,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    best = Adapter.from_pretrained(run.state.best_model_checkpoint)
    state = adapter_state(run.model)
    assert all(torch.equal(state[m].B.cpu(), pair[1]) for m, pair in best.tensors.items())


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_autocast(tmp_path: Path, quant: str) -> None:
    """Fails when a quantized base is refused, or masters are cast to bf16."""
    run = trainer(tmp_path, quant=quant, bf16=True, max_steps=2)
    before = trainable(run.model)
    run.train()
    after = trainable(run.model)
    assert all(t.dtype == torch.float32 for t in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in after)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_sft_trainer(tmp_path: Path, quant: str) -> None:
    """Fails when trl refuses the model, or its save writes anything but the adapter."""
    model, tokenizer = load_base(BASE, quant=quant)
    attach(model, LORA)
    before = trainable(model)
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-2, gradient_checkpointing=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"messages": chat} for chat in chats()])
    run = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    run.save_model(str(tmp_path / "out"))
    assert any(not torch.equal(before[n], t) for n, t in trainable(model).items())
    assert Adapter.from_pretrained(tmp_path / "out").config.r == 3
    assert not (tmp_path / "out/model.safetensors").exists()
    detach(model)


def test_whole_parameters_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    """Fails when the head or the biases of a checkpoint are left out on loading."""
    options = LORA.model_copy(update={"modules_to_save": ("lm_head",), "lora_bias": True})
    models = []
    for seed in (0, 1):
        model, _ = load_base(BASE, dtype="float32")
        attach(model, options, seed=seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        models.append(model)
    models[0].save_pretrained(tmp_path / "checkpoint-1")
    missing = models[1].load_state_dict(
        load_file(tmp_path / "checkpoint-1/model.safetensors"), False
    )
    assert not missing.missing_keys
    first, second = (trainable(model) for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
