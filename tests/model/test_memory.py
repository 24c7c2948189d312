"""Loading a quantized base costs its packed weights and a constant, never the 16-bit model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decal import demo

MEASURE = """
import sys, torch
torch.set_num_threads(1)
from decal.model import hf
from decal.model.size import weight_bytes
from decal.quant.base import Recipe
from decal.train.memory import STATUS, PeakMemory, parse_status
hf.load_model(sys.argv[1], device="cpu")
before, _ = parse_status(STATUS.read_text())
with PeakMemory(torch.device("cpu"), interval=0.005) as peak:
    model = hf.load_model(sys.argv[2], recipe=Recipe(format="nf4"), device="cpu")
    print(peak.peak().anonymous - before, weight_bytes(model))
"""
ROOM = 60_000_000
"""Bytes for one conversion group and the quantizer's chunks, whatever the model's size."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_never_holds_the_16_bit_model(tmp_path: Path) -> None:
    """Mutation: let transformers load in 16 bits first and quantize afterwards."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    in_16_bits = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(demo.base_path()), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, stored = map(int, done.stdout.split())
    assert stored + ROOM < in_16_bits
    assert peak < stored + ROOM
