"""The same adapter folder in peft and in decal, architecture by format; writes docs/interop.md.

For every architecture one base is written to disk in bfloat16 and one adapter with random factors
beside it. peft loads both on transformers and bitsandbytes, decal loads both on its own; both
compute in bfloat16. The reference is plain transformers in float32 with the weights that
bitsandbytes itself dequantizes, in float32, and the adapter's product added. Not timed, seeded.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import peft
import torch
import transformers as tf
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from decal.config import LoraConfig
from decal.model.adapter import Adapter
from decal.model.inject import attach
from decal.model.state import adapter_state
from decal.verbs.load import load_base, save_adapter

OUT = Path(__file__).resolve().parents[1] / "docs" / "interop.md"
FORMATS = ("none", "nf4", "fp4", "int8")
VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 32}
GPT2: dict[str, Any] = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 256}
"""Widths are multiples of 64: bitsandbytes 0.50 on a CPU begins a block with every row."""

BASES: dict[str, Any] = {
    "Llama": tf.LlamaConfig(**GROUPED),
    "Qwen2": tf.Qwen2Config(**SIZES, num_key_value_heads=2),
    "Qwen3": tf.Qwen3Config(**GROUPED),
    "Mistral, window 16": tf.MistralConfig(**GROUPED, sliding_window=16),
    "Gemma 2, soft caps": tf.Gemma2Config(
        **GROUPED, sliding_window=16, attn_implementation="eager"
    ),
    "Gemma 3": tf.Gemma3TextConfig(**GROUPED, sliding_window=16),
    "Phi-3, fused": tf.Phi3Config(**SIZES, num_key_value_heads=2),
    "GPT-2, Conv1D": tf.GPT2Config(vocab_size=VOCABULARY, **GPT2),
    "GPT-NeoX, fused": tf.GPTNeoXConfig(**SIZES),
    "OPT": tf.OPTConfig(**SIZES, ffn_dim=512, word_embed_proj_dim=192),
}
IDS = torch.randint(3, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(7))


def write_base(config: Any, folder: Path) -> None:
    """Normal weights of a deviation that keeps activations' size from layer to layer."""
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=min(parameter.shape) ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)


def write_adapter(base: Path, folder: Path) -> None:
    """All linear layers but the head, rank 8, alpha 12; B of A's size, as after long training."""
    model, _ = load_plain(base, "none", "float32")
    attach(model, LoraConfig(r=8, lora_alpha=12, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parts in adapter_state(model).values():
            parts.B.copy_(0.02 * torch.randn(parts.B.shape, generator=generator))
    save_adapter(model, folder)


def load_plain(base: Path, fmt: str, dtype: str) -> tuple[Any, Any]:
    return load_base(base, quant=fmt, dtype=dtype, device="cpu")


def load_peers_base(base: Path, fmt: str) -> Any:
    """The base as transformers and bitsandbytes load it."""
    quantization = None
    if fmt == "int8":
        quantization = tf.BitsAndBytesConfig(load_in_8bit=True)
    elif fmt != "none":
        quantization = tf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=fmt,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return tf.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )


def dequantized(layer: Any) -> Tensor | None:
    """[out, in] in float32 by bitsandbytes' own formulas; None for what it left 16-bit."""
    if isinstance(layer, bnb.nn.Linear4bit):
        state = layer.weight.quant_state
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(layer.weight.data, state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.data.float() * (layer.weight.SCB[:, None].float() / 127)
    return None


def reference(base: Path, adapter: Adapter, fmt: str) -> Any:
    """Plain float32 layers with bitsandbytes' weights and the adapter's product."""
    model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in load_peers_base(base, fmt).named_modules():
        weight = dequantized(layer)
        if weight is not None:
            put(model.get_submodule(name), weight)
    for name, parts in adapter.tensors.items():
        delta = adapter.config.scaling_of(name) * (parts.B @ parts.A)
        layer = model.get_submodule(name)
        stored = layer.weight.data
        put(layer, (stored.T if isinstance(layer, Conv1D) else stored) + delta)
    return model


def put(layer: Any, weight: Tensor) -> None:
    layer.weight.data = weight.T.contiguous() if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


class Found(NamedTuple):
    """One architecture in one format."""

    size: float
    """The reference's largest logit."""
    largest: tuple[float, float]
    """Largest difference from the reference, of peft and of decal."""
    mean: tuple[float, float]
    """Root mean square of the differences."""


def measure(base: Path, folder: Path, fmt: str) -> Found:
    adapter = Adapter.from_pretrained(folder)
    exact = logits(reference(base, adapter, fmt))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(load_peers_base(base, fmt), str(folder)))
    model, _ = load_plain(base, fmt, "bfloat16")
    attach(model, adapter)
    peer, ours = theirs - exact, logits(model) - exact
    return Found(
        size=float(exact.abs().max()),
        largest=(float(peer.abs().max()), float(ours.abs().max())),
        mean=(float(peer.square().mean().sqrt()), float(ours.square().mean().sqrt())),
    )


def tokenizer(folder: Path) -> None:
    """The smallest tokenizer that decal can load beside a base."""
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tf.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def results() -> dict[str, list[Found]]:
    """Architecture -> what was found in each of FORMATS."""
    found = {}
    for name, config in BASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            base, folder = Path(scratch) / "base", Path(scratch) / "adapter"
            write_base(config, base)
            tokenizer(base)
            write_adapter(base, folder)
            found[name] = [measure(base, folder, fmt) for fmt in FORMATS]
        print(name, *found[name], sep="\n  ", flush=True)
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def document(found: dict[str, list[Found]]) -> str:
    tools = [f"{fmt}: {tool}" for fmt in FORMATS for tool in ("peft", "decal")]
    largest = [
        [name, f"{row[0].size:.1f}", *(f"{x:.3f}" for cell in row for x in cell.largest)]
        for name, row in found.items()
    ]
    mean = [[name, *(f"{x:.4f}" for cell in row for x in cell.mean)] for name, row in found.items()]
    ratios = [cell.mean[1] / cell.mean[0] for row in found.values() for cell in row]
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return TEXT.format(
        versions=", ".join(f"{name} {version(name)}" for name in names),
        largest=table(["architecture", "largest logit", *tools], largest),
        mean=table(["architecture", *tools], mean),
        low=min(ratios),
        high=max(ratios),
    )


TEXT = """\
# The same adapter in peft and in decal

Written by `python bench/interop.py`: {versions}.

Largest difference of a logit from a float32 reference, over 4 x 64 random tokens:

{largest}

Root mean square of the same differences, which a single unlucky logit does not decide; decal's is
{low:.2f} to {high:.2f} times peft's:

{mean}

## How it is measured

One base per architecture (4 layers, width 192, random weights) is written in bfloat16, and one PEFT
folder (r 8, lora_alpha 12, all linear layers but the head, random factors). peft loads both with
transformers and bitsandbytes, decal loads the same two folders; both compute in bfloat16, on a CPU.

The reference is transformers in float32, without an adapter library: the weights are those that
bitsandbytes dequantizes, in float32, plus lora_alpha / r times B A. What the columns show is
therefore rounding in bfloat16 and, for int8, the rounding of activations that LLM.int8 does at
inference; the error of quantization itself is in the reference too and shows in neither column.
A misplaced scale, a transposed layer or a forgotten soft cap would show as differences of the size
of the logits.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    out.write_text(document(results()))


if __name__ == "__main__":
    main()
