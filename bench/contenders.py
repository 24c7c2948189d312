"""The contenders of the bench of steps: decal, peft + bitsandbytes in several settings, trl.

Each is a generator that loads the base it is given, yields once when it is ready and once after
every optimizer step. What a step trains on is said by its `Task`, the same for both sides.

    decal        a run's own session: its loss, its attention, its optimizer
    peft         the loop of the tutorials. On a quantized base prepare_model_for_kbit_training,
                 which makes what is not quantized float32; LoRA weights float32
    peft-best    the fastest that we know how to make it: bf16 throughout, or float32 throughout
                 where the processor has no products of bf16; no upcasts (nothing is prepared,
                 LoRA weights are cast, which `autocast_adapter_dtype=False` alone does not do on a
                 4-bit base), dropout 0, fused AdamW, no cache
    trl          SFTTrainer with its defaults

Knows no clock and no other process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from bench.shapes import KNOWN, PADDED_ROWS, RANK, ROWS, Row, chat_rows, even_rows
from decal.kernels.precision import multiplies_bf16

LR = 2e-4


@dataclass(frozen=True)
class Task:
    """What is trained, on what."""

    shape: str
    folder: str
    quant: str = "nf4"
    dropout: float = 0.05
    chat: bool = False
    """Rows of a chat's lengths; else rows that are equally long."""

    def batches(self) -> list[list[Row]]:
        """The batches of the first steps; then they begin again."""
        vocabulary = KNOWN[self.shape]["vocab_size"]
        return chat_rows(vocabulary) if self.chat else [even_rows(vocabulary)]


def decal_steps(task: Task, timed: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """`timed` is given what the optimizer does."""
    from decal.config import BaseConfig, DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
    from decal.data.pack import Batches
    from decal.data.sample import Sample
    from decal.model.attention import Flattening
    from decal.model.inject import attach
    from decal.objectives import sft
    from decal.train.optim import Optimizer
    from decal.verbs.load import load_base
    from decal.verbs.loss import head_of
    from decal.verbs.session import Session

    config = RunConfig(
        base=BaseConfig(path=task.folder),
        quant=QuantConfig(format=task.quant),
        adapter=LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=task.dropout),
        data=DataConfig(path="generated"),
        train=TrainConfig(lr=LR),
        output=f"{task.folder}/run",
    )
    model, tokenizer = load_base(task.folder, quant=config.quant)
    attach(model, config.adapter)
    steps = [
        Batches(
            samples=[Sample(row=i, input_ids=x, trained=y) for i, (x, y) in enumerate(rows)],
            batch_size=len(rows),
            micro_batch_tokens=config.train.micro_batch_tokens,
        )
        for rows in task.batches()
    ]
    session = Session(
        config=config,
        model=model,
        tokenizer=tokenizer,
        samples=[],
        batches=steps[0],
        eval_batches=[],
        flattening=Flattening(True),
        head=head_of(model, sft),
        rates={},
        table=None,
        bits_per_weight=0.0,
    )
    optimizer = Optimizer(session.parameters, config.train)
    with session.training():
        for epoch, batches in enumerate(cycle(steps)):
            yield
            step = next(batches.steps())
            for batch in step.micro:
                loss, _ = session.loss(batch, epoch)
                optimizer.backward(loss / step.trained)
            timed("optimizer", lambda: optimizer.update(LR, optimizer.gradient_norm()))


def peft_steps(task: Task, way: str) -> Iterator[None]:
    """The hand-written loop of the tutorials (`peft`), or with what is slow left out.

    `peft-autocast` is `peft-best` with LoRA weights in float32 and autocast to bf16.
    """
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if way != "peft-best" or multiplies_bf16() else torch.float32
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        task.folder,
        quantization_config=quant if task.quant == "nf4" else None,
        dtype=dtype,
    )
    best = way != "peft"
    if not best and task.quant == "nf4":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=task.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=not best)
    trained = [p for p in model.parameters() if p.requires_grad]
    if way == "peft-best":
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True if best else None)
    options = {"use_cache": False} if best else {}
    model.train()
    rows_of = PADDED_ROWS[task.shape]
    for rows in cycle(task.batches()):
        yield
        parts = [rows[i : i + rows_of] for i in range(0, len(rows), rows_of)]
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "peft-autocast"):
                loss = model(**_padded(part, masked=task.chat), **options).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _padded(rows: list[Row], masked: bool) -> dict[str, Tensor]:
    """input_ids, labels and, where rows differ in length, the attention mask: [n, longest]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (tokens, trained) in enumerate(rows):
        n = len(tokens)
        ids[i, :n] = torch.from_numpy(tokens)
        labels[i, :n] = ids[i, :n].where(torch.from_numpy(trained), labels[i, :n])
        mask[i, :n] = 1
    found = {"input_ids": ids, "labels": labels}
    return {**found, "attention_mask": mask} if masked else found


def trl_steps(task: Task, wait: Callable[[], None]) -> None:
    """SFTTrainer as it comes; `wait` is called before every step."""
    import datasets
    import peft
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()

    quant = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        task.folder, quantization_config=quant, dtype=torch.bfloat16
    )
    ids = [tokens.tolist() for tokens, _ in task.batches()[0]]
    with tempfile.TemporaryDirectory() as out:
        args = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=ROWS,
            max_steps=10**6,
            learning_rate=LR,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        SFTTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids * 8}),
            processing_class=AutoTokenizer.from_pretrained(task.folder),
            peft_config=peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear"
            ),
            callbacks=[Turns()],
        ).train()
