"""F15: preparing a quantized model casts all that is not quantized to float32, and evaluation
keeps every logit: both cost more memory than quantization saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from decal.config import LoraConfig
from decal.data.batch import Batch
from decal.data.pack import make_batches
from decal.data.sample import Sample
from decal.model import attention
from decal.model.inject import attach
from decal.objectives import sft
from decal.train import loop
from decal.train.checkpoint import Progress
from decal.train.passes import alone
from decal.verbs.load import load_base
from tests import zoo
from tests.failures.memory import peak, stored
from tests.train.tiny_run import MemoryRun, job

WORDS = 3072


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the loss as small against the logits as they are where there are many words."""
    monkeypatch.setitem(sft.CHUNK_ELEMENTS, "cpu", 2**15)


def save_base(folder: Path) -> Path:
    """A 16-bit model in which words weigh about as much as they do in small real ones."""
    config = tf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def model_of(base: Path, quant: Any = "nf4") -> Any:
    model, _ = load_base(base, quant=quant, dtype="bfloat16", device="cpu")
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0))
    return model.train()


def batches(rows: int, length: int = 128) -> list[Batch]:
    """One row each."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in range(1, rows + 1):
        ids = torch.randint(0, WORDS, (length,), generator=generator).int().numpy()
        made.append(Sample(row=row, input_ids=ids, trained=torch.arange(length).numpy() > 0))
    return make_batches(made, length)


def loss_of(model: Any, batch: Batch) -> Tensor:
    keep = sft.trained_positions(batch)
    with attention.flat_attention(model):
        logits = attention.forward(model, batch, keep)
    return sft.losses(logits, batch.targets.flatten()[keep]).sum()


def upcast(model: Any) -> Any:
    """By hand what preparing for k-bit training does: every 16-bit parameter to float32."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return model


def step(model: Any) -> int:
    (batch,) = batches(1, 512)
    loss_of(model, batch).backward()  # gradients are there before and after, as in a run
    return peak(lambda: loss_of(model, batch).backward())


def test_a_step_takes_much_less_than_with_upcasts(base: Path) -> None:
    """Measured both ways in one test. Fails when attaching or training casts the base."""
    ours = model_of(base)
    theirs = upcast(model_of(base))
    assert stored(theirs) > 1.5 * stored(ours)
    assert step(theirs) > 1.5 * step(ours)


def test_quantized_is_never_more_than_16_bit(base: Path) -> None:
    """The point of quantizing; with upcasts it is more. Fails when it costs what it saves."""
    plain, ours = model_of(base, "none"), model_of(base)
    sixteen = stored(plain) + step(plain)
    theirs = upcast(model_of(base))
    assert stored(ours) + step(ours) < sixteen
    assert stored(theirs) + step(theirs) > sixteen


def test_nothing_of_the_base_changes_its_dtype(base: Path) -> None:
    """Factors are float32 masters, the base is as it was loaded; logits come in its dtype."""
    before, _ = load_base(base, quant="nf4", dtype="bfloat16", device="cpu")
    wanted = sorted((str(p.dtype), p.numel()) for p in before.parameters())
    model = model_of(base)
    found = sorted((str(p.dtype), p.numel()) for p in model.parameters() if not p.requires_grad)
    assert found == wanted
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(input_ids=batches(1)[0].input_ids).logits.dtype == torch.bfloat16


def evaluation(model: Any, rows: int) -> int:
    """Peak of one evaluation of this many rows, by the real loop."""
    found = batches(rows)

    def loss(batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        return loss_of(model, batch), batch.trained

    task = job(MemoryRun(), loss=loss, eval_batches=found)
    return peak(lambda: alone(loop._evaluate(task, Progress(), lambda: None)))  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_rows_of_an_evaluation(base: Path) -> None:
    """6 rows take what 2 take, within a tenth of one row's logits.

    Fails when anything per row or per token is kept.
    """
    model = model_of(base)
    logits = 128 * WORDS * 2
    evaluation(model, 1)  # what is made once and kept
    assert evaluation(model, 6) - evaluation(model, 2) < logits / 10


def test_kept_logits_grow_with_the_rows(base: Path) -> None:
    """By hand what collecting predictions does: every row costs its logits."""
    model = model_of(base)

    def kept(rows: int) -> int:
        with torch.no_grad():
            found = batches(rows)
            return peak(lambda: [model(input_ids=batch.input_ids).logits for batch in found])

    kept(1)
    assert kept(6) - kept(2) > 3.9 * 128 * WORDS * 2
