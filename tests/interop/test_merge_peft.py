"""The merged files hold to the bit what peft's merge_and_unload computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from decal.adapters.base import LowRank
from decal.store.base import open_base
from decal.store.peft import read_adapter
from decal.weights.changes import Changes
from decal.weights.delta import FileDelta
from decal.weights.merge import merge_files

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

ODD = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**ODD),
    "qwen2": Qwen2Config(**ODD, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=61, n_embd=36, n_layer=2, n_head=3, n_positions=64),
}


def _base(folder: Path, family: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).to(dtype)
    model.save_pretrained(folder, max_shard_size="30kB")


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def _adapter(folder: Path, base: Path, targets: str | list[str], **settings: object) -> None:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **settings,
    )
    peft.get_peft_model(_load(base), config).save_pretrained(folder)


def _deltas(adapter: Path, *, transposed: bool = False, prefix: str = "") -> Changes:
    read = read_adapter(adapter)
    found = {
        f"{prefix}{module}.weight": FileDelta(
            LowRank(pair.A, pair.B, read.config.scaling, 0.0), transposed, module
        )
        for module, pair in read.tensors.items()
    }
    return Changes(deltas=found, name=str(adapter))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bit_identical_to_merge_and_unload(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Fails if the scaling is dropped, if the delta is rounded before the sum (bf16, fp16), or if
    one delta is left out."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    _base(base, family, dtype)
    _adapter(adapter, base, "all-linear")
    report = merge_files(open_base(base), out, _deltas(adapter))

    merged = peft.PeftModel.from_pretrained(_load(base), adapter).merge_and_unload()
    theirs = merged.state_dict()
    ours, before = _tensors(out), _tensors(base)
    assert ours.keys() == before.keys()
    moved = 0
    for key, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, theirs[key]), key
        moved += not torch.equal(tensor, before[key])
    assert moved == report.targeted == 14
    assert report.untouched == len(before) - 14
    assert report.survival == pytest.approx(1, abs=0.02)

    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(_load(out)(ids).logits, merged(ids).logits, rtol=0, atol=0)


def test_conv1d_is_merged_transposed(tmp_path: Path) -> None:
    """Fails if the delta of GPT-2's [in, out] weights is not transposed (c_proj of the attention
    is square, so the shape alone would not show it)."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    _base(base, "gpt2", torch.float32)
    _adapter(adapter, base, ["attn.c_attn", "attn.c_proj", "mlp.c_fc"], fan_in_fan_out=True)
    merge_files(open_base(base), out, _deltas(adapter, transposed=True))
    theirs = peft.PeftModel.from_pretrained(_load(base), adapter).merge_and_unload().state_dict()
    for key, tensor in _tensors(out).items():
        assert torch.equal(tensor, theirs[key]), key


def test_rank_stabilized_scaling(tmp_path: Path) -> None:
    """Fails if use_rslora is read as the usual scaling (a factor of sqrt(r))."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    _base(base, "llama", torch.bfloat16)
    _adapter(adapter, base, ["q_proj", "down_proj"], use_rslora=True)
    merge_files(open_base(base), out, _deltas(adapter))
    theirs = peft.PeftModel.from_pretrained(_load(base), adapter).merge_and_unload().state_dict()
    for key, tensor in _tensors(out).items():
        assert torch.equal(tensor, theirs[key]), key


def test_delta_on_a_tied_head_unties_it(tmp_path: Path) -> None:
    """A head that shares the embedding gets its own tensor, and the reloaded model computes what
    the adapter computed. Fails if the delta goes into the shared matrix, or if the config stays
    tied (the logits then differ by more than 0.01)."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    _base(base, "qwen2", torch.float32)
    _adapter(adapter, base, ["lm_head", "q_proj"])
    model = peft.PeftModel.from_pretrained(_load(base), adapter).eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = model(ids).logits
        plain = _load(base)(ids).logits
    found = {
        f"{name.removeprefix('base_model.model.')}.weight": FileDelta(
            LowRank(
                module.lora_A["default"].weight.data,
                module.lora_B["default"].weight.data,
                module.scaling["default"],
                0.0,
            )
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    report = merge_files(
        open_base(base),
        out,
        Changes(deltas=found, tied={"lm_head.weight": "model.embed_tokens.weight"}),
    )
    assert report.untied == ("lm_head.weight",)
    merged = _load(out)
    assert merged.config.tie_word_embeddings is False
    with torch.no_grad():
        logits = merged(ids).logits
    assert (expected - plain).abs().max() > 0.1
    # float32 sums in another order: 1e-5 of the logits' size, far below the adapter's effect
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
