"""Rows of docs/failures.md on training and what it leaves: resuming, memory, heads, the network."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import datasets
import peft
import torch
import transformers as tf
from huggingface_hub import constants
from torch import Tensor
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from bench.failures_row import Case, MakeRow, Row, Seen, Verdict, watched
from decal import demo
from decal.config import LoraConfig
from decal.model.hf import quantizer_identity
from decal.model.inject import attach
from decal.train import loop
from decal.verbs.load import load, load_base, save_adapter
from tests import zoo
from tests.failures import test_f13_partial_resume as resuming
from tests.failures import test_f14_repacked_weights as repacking
from tests.failures import test_f15_hidden_upcasts as upcasts
from tests.failures.memory import peak, stored
from tests.failures.situations import draw, logits
from tests.failures.test_f20_network import COMMIT
from tests.train.tiny_run import MemoryRun, job

IDS = torch.arange(5, 30)[None]
PLAIN = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1}


def lora(**settings: Any) -> peft.LoraConfig:
    plain = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**plain, **settings})


def trainable(model: Any) -> Tensor:
    """Everything that has `lora_` in its name, as one vector."""
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_" in n])


def rows() -> datasets.Dataset:
    ids = [list(range(5 + i, 17 + i)) for i in range(16)]
    return datasets.Dataset.from_list([{"input_ids": x, "labels": x} for x in ids])


def f13(folder: Path) -> Row:
    """Frozen adapters, and resuming."""
    peft.get_peft_model(zoo.build("llama"), lora()).save_pretrained(folder / "a")
    cases = []
    for what, inputs in (
        ("an adapter loaded with peft's defaults, then trained", False),
        ("the same, and enable_input_require_grads() before", True),
    ):
        seen = [_frozen(folder, who, inputs) for who in ("transformers", "trl")]
        with watched() as heard:
            _, parameters = resuming.gpt2()
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            loop.train(job(MemoryRun(), parameters=parameters))
        seen.append(Seen(who="decal", verdict=heard.verdict(False), text=heard.words()))
        cases.append(Case(what=what, seen=seen))
    return Row(
        title="Resumed in part, or training nothing",
        failure="A resumed run has lost its optimizer, its place or its random numbers; an adapter "
        "is loaded frozen, and the run trains no number.",
        cases=[*cases, _resumed(folder)],
        threads=("peft#574", "trl#6700", "trl#2418", "trl#3252"),
    )


def _frozen(folder: Path, who: str, inputs: bool) -> Seen:
    moved, loss = False, 0.0
    with watched() as heard:
        model = peft.PeftModel.from_pretrained(zoo.build("llama"), folder / "a")
        if inputs:
            model.enable_input_require_grads()
        before = trainable(model)
        settings = {**PLAIN, "output_dir": str(folder / who), "max_steps": 2}
        if who == "trl":
            args = SFTConfig(**settings, bf16=False, gradient_checkpointing=inputs)
            tokenizer = zoo.tokenizer()
            trainer: Trainer = SFTTrainer(
                model=model, args=args, train_dataset=rows(), processing_class=tokenizer
            )
        else:
            args = TrainingArguments(**settings)
            trainer = Trainer(model=model, args=args, train_dataset=rows())
        loss = trainer.train().training_loss
        moved = not torch.equal(before, trainable(model))
    text = heard.words()
    if heard.error is None:
        text = f"trains 2 steps (loss {loss:.2f}), and not one number has changed; {text}"
    return Seen(who=who, verdict=heard.verdict(moved, "trainable|require"), text=text)


def _resumed(folder: Path) -> Case:
    """Four steps, and two steps and two more in a new trainer, with dropout."""
    ends = []
    with watched() as heard:
        for name, resume in (("straight", False), ("again", True)):
            torch.manual_seed(3 if resume else 0)
            model = peft.get_peft_model(
                zoo.build("llama"), lora(lora_dropout=0.1, init_lora_weights=False)
            )
            args = TrainingArguments(
                **PLAIN, output_dir=str(folder / "run"), max_steps=4, save_steps=2, seed=1
            )
            trainer = Trainer(model=model, args=args, train_dataset=rows())
            trainer.train(str(folder / "run/checkpoint-2") if resume else None)
            ends.append(trainable(trainer.model))
            assert name
    off = float((ends[0] - ends[1]).norm() / ends[0].norm()) if len(ends) == 2 else 1.0
    straight = MemoryRun()
    wanted = resuming.sitting(straight, lambda event: None)
    found, losses = resuming.killed_and_resumed()
    same = all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    same = same and losses == straight.column("loss")
    return Case(
        what="stopped after a checkpoint and resumed in a new process's state, with dropout",
        seen=[
            Seen(
                who="transformers",
                verdict=heard.verdict(off == 0),
                text=f"Trainer with an adapter of peft: the factors end {off:.0e} apart; "
                f"{heard.words()}",
            ),
            Seen(
                who="decal",
                verdict="right" if same else "silent",
                text="the same to the bit, losses too" if same else "not the same",
            ),
        ],
    )


def four_bit(base: Path, dtype: torch.dtype) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return tf.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=dtype, device_map="cpu"
    )


def f14(folder: Path) -> Row:
    """An evaluation between two steps."""
    off, changed, layers = 0.0, 0, []
    with watched() as heard:
        plain = lora(target_modules="all-linear")
        model = peft.get_peft_model(four_bit(demo.base_path(), torch.float32), plain)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape)
        layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        before = [layer.weight.data.clone() for layer in layers]
        wanted = repacking.gradient(model)
        model.eval()
        with torch.no_grad():
            model(input_ids=repacking.IDS)
        pairs = zip(layers, before, strict=True)
        changed = sum(not torch.equal(layer.weight.data, old) for layer, old in pairs)
        off = float((repacking.gradient(model) - wanted).norm() / wanted.norm())
    fast = bool(layers) and bool(layers[0].support_avx512bf16_for_cpu)
    ours = repacking.model_of("nf4")
    identity, gradient = quantizer_identity(ours), repacking.gradient(ours)
    repacking.evaluated(ours)
    kept = identity == quantizer_identity(ours)
    error = float((repacking.gradient(ours) - gradient).norm() / gradient.norm())
    return Row(
        title="Quantized weights that an evaluation changes",
        failure="On CPUs with AVX-512 BF16 bitsandbytes packs the weights anew when a model in "
        "evaluation mode first computes; the product with them has no gradient.",
        cases=[
            Case(
                what="training, one evaluation, training again, on a CPU "
                + ("with AVX-512 BF16" if fast else "without AVX-512 BF16"),
                seen=[
                    Seen(
                        who="bitsandbytes",
                        verdict=heard.verdict(off < 1e-3, "autograd"),
                        text=f"{changed} of {len(layers)} packed weights were rewritten; the first "
                        f"layer's gradient is off by {off:.1%}; {heard.words('autograd')}",
                    ),
                    Seen(
                        who="decal",
                        verdict="right" if kept and error < 1e-3 else "silent",
                        text=f"checksum of the packed bytes {'un' * kept}changed, the gradient is "
                        f"off by {error:.1%}",
                    ),
                ],
            )
        ],
    )


def f15(folder: Path) -> Row:
    """Memory of a step and of an evaluation."""
    base = upcasts.save_base(folder / "base")
    sizes = {f"decal {quant}": _memory(base, quant) for quant in ("none", "nf4")}
    ours = [upcasts.evaluation(upcasts.model_of(base), n) for n in (2, 6)]
    with watched() as heard:
        for way in ("bf16", "NF4", "prepared"):
            if way == "bf16":
                model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            else:
                model = four_bit(base, torch.bfloat16)
            if way == "prepared":
                options = {"use_gradient_checkpointing": False}
                model = peft.prepare_model_for_kbit_training(model, **options)
            adapted = peft.get_peft_model(model, lora(target_modules="all-linear")).train()
            sizes[way] = (stored(adapted), _step(adapted))
    mb = {
        k: f"{(a + b) / 2**20:.1f} MiB ({a / 2**20:.1f} for weights)" for k, (a, b) in sizes.items()
    }
    theirs = sum(sizes["prepared"]) < sum(sizes["bf16"])
    better = sum(sizes["decal nf4"]) < sum(sizes["decal none"])
    return Row(
        title="Hidden casts to float32; evaluations that keep everything",
        failure="Preparing a quantized model casts all that is not quantized to float32, so that "
        "it can need more memory than without quantization; an evaluation keeps all logits.",
        cases=[
            Case(
                what="weights and the peak of one step: rank 3 on all layers, 512 tokens, 3,072 "
                "words",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(theirs),
                        text=f"bf16: {mb['bf16']}; bitsandbytes NF4: {mb['NF4']}; NF4 after "
                        f"prepare_model_for_kbit_training, no checkpointing: {mb['prepared']}; "
                        f"{heard.words()}",
                    ),
                    Seen(
                        who="decal",
                        verdict="right" if better else "silent",
                        text=f"bf16: {mb['decal none']}; NF4: {mb['decal nf4']}",
                    ),
                ],
            ),
            _evaluations(folder, base, ours),
        ],
        threads=("bitsandbytes#1569", "peft#816", "transformers#8476"),
    )


def _memory(base: Path, quant: str) -> tuple[int, int]:
    model = upcasts.model_of(base, quant)
    return stored(model), upcasts.step(model)


def _step(model: Any) -> int:
    """Peak of a step as transformers' own loss takes it."""
    (batch,) = upcasts.batches(1, 512)

    def work() -> None:
        model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()

    work()
    return peak(work)


def _evaluations(folder: Path, base: Path, ours: list[int]) -> Case:
    grown = {}
    with watched() as heard:
        for what, metrics in (("plain", None), ("compute_metrics", lambda _: {})):
            found = []
            for count in (1, 2, 6):
                model = tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
                ids = [batch.input_ids[0].tolist() for batch in upcasts.batches(count)]
                data = datasets.Dataset.from_list([{"input_ids": x, "labels": x} for x in ids])
                args = TrainingArguments(
                    **PLAIN, output_dir=str(folder / "eval"), per_device_eval_batch_size=1
                )
                trainer = Trainer(model=model, args=args, compute_metrics=metrics)
                found.append(peak(lambda t=trainer, d=data: t.evaluate(d)))
            grown[what] = (found[2] - found[1]) / 4
    logits_of_row = 128 * upcasts.WORDS * 2
    our_growth = (ours[1] - ours[0]) / 4
    right: Verdict = "right" if our_growth < logits_of_row / 10 else "silent"
    return Case(
        what="what one more row of an evaluation costs; its logits are "
        f"{logits_of_row / 2**20:.2f} MiB in bf16",
        seen=[
            *(
                Seen(
                    who=f"transformers, {what}",
                    verdict=heard.verdict(size < logits_of_row / 10),
                    text=f"Trainer.evaluate: {size / 2**20:.2f} MiB; {heard.words()}",
                )
                for what, size in grown.items()
            ),
            Seen(who="decal", verdict=right, text=f"{our_growth / 2**20:.2f} MiB"),
        ],
    )


def f19(folder: Path) -> Row:
    """Heads of classifiers."""
    base = zoo.save("llama", folder / "base")
    labels = ("cold", "hot", "mild")
    cases, about = [], "modules_to_save|task_type|not saved"
    for what, task, free in (
        ("peft's settings with task_type SEQ_CLS", "SEQ_CLS", False),
        ("peft's settings without task_type", None, False),
        ("the same, the head made trainable by hand", None, True),
    ):
        wanted = found = torch.zeros(1)
        out = folder / what.replace(" ", "-").replace("'", "")
        with watched() as heard:
            model = peft.get_peft_model(_classifier(base, 1), lora(task_type=task))
            if free:
                model.base_model.model.score.weight.requires_grad_(True)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.2 * torch.randn(parameter.shape)
            wanted = logits(model, IDS)
            model.save_pretrained(out)
            found = logits(peft.PeftModel.from_pretrained(_classifier(base, 2), out), IDS)
        off = float((found - wanted).norm() / wanted.norm())
        seen = Seen(
            who="peft",
            verdict=heard.verdict(off < 1e-5, about),
            text=f"logits after loading differ by {off:.0%}; {heard.said(about) or 'no warning'} "
            "(that the base has no head is reported in all three cases)",
        )
        cases.append(Case(what=what, seen=[seen, *_our_head(folder, base, labels, task, free)]))
    return Row(
        title="A classification head that is trained and not saved",
        failure="What is trained and what is saved are two lists; a head on one of them only is "
        "random after loading.",
        cases=cases,
        threads=("peft#577", "peft#876", "sentence-transformers#3980"),
    )


def _classifier(base: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    kind = tf.AutoModelForSequenceClassification
    return kind.from_pretrained(base, num_labels=3, dtype=torch.float32).eval()


def _our_head(
    folder: Path, base: Path, labels: tuple[str, ...], task: str | None, free: bool
) -> Iterator[Seen]:
    out, wanted, found = folder / f"classifier-{task or free}", torch.zeros(1), torch.zeros(1)
    with watched() as heard:
        model, _ = load_base(base, dtype="float32", device="cpu", labels=labels)
        whole = ("score",) if task else ()
        attach(
            model, LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj",), modules_to_save=whole)
        )
        if free:
            model.score.weight.requires_grad_(True)
        draw(model)
        if free:
            with torch.no_grad():
                model.score.weight += 0.2
        wanted = logits(model, IDS)
        save_adapter(model, out)
        found = logits(load(out)[0], IDS)
    off = float((found - wanted).norm() / wanted.norm()) if heard.error is None else 0.0
    text = heard.words() if heard.error else f"logits after loading differ by {off:.0%}"
    yield Seen(who="decal", verdict=heard.verdict(off < 1e-5), text=text)


@contextmanager
def no_network(cache: Path) -> Iterator[list[str]]:
    """Everything that is looked up or connected to fails, and is listed."""
    tried: list[str] = []

    def refuse(*where: Any, **_: Any) -> Any:
        tried.append(repr(where))
        raise OSError(101, "Network is unreachable")

    with (
        mock.patch.object(socket, "getaddrinfo", refuse),
        mock.patch.object(socket, "create_connection", refuse),
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.dict(os.environ, HF_HUB_OFFLINE="0"),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch.object(constants, "HF_HUB_CACHE", str(cache)),
    ):
        yield tried


def f20(folder: Path) -> Row:
    """Saving when the network has gone."""
    hub = folder / "hub" / "models--tiny--base"
    shutil.copytree(demo.base_path(), hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(COMMIT)
    with mock.patch.object(constants, "HF_HUB_CACHE", str(folder / "hub")):
        plain = tf.AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
        plain.name_or_path = plain.config._name_or_path = "tiny/base"
        theirs = peft.get_peft_model(plain, lora())
        ours, _ = load_base("tiny/base", dtype="float32", device="cpu")
        attach(ours, LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj",)))
    seen = [
        _saved("peft", folder, lambda: theirs.save_pretrained(folder / "peft")),
        _saved("decal", folder, lambda: save_adapter(ours, folder / "decal")),
    ]
    return Row(
        title="Saving asks the hub",
        failure="Writing an adapter sends a request for the base's files; without a network that "
        "has ended runs.",
        cases=[Case(what="saving an adapter on a base of the hub, the network gone", seen=seen)],
        threads=("peft#1452",),
    )


def _saved(who: str, folder: Path, save: Callable[[], object]) -> Seen:
    began = time.perf_counter()
    with watched() as heard, no_network(folder / "hub") as tried:
        save()
    seconds = time.perf_counter() - began
    there = (folder / who / "adapter_model.safetensors").exists()
    wait = f" in {seconds:.0f} s" if seconds >= 1 else ""
    text = f"{'saved' if there else 'not saved'}{wait}, requests to the hub: {len(tried)}; "
    return Seen(who=who, verdict=heard.verdict(there), text=text + heard.words())


ROWS: dict[str, MakeRow] = {"F13": f13, "F14": f14, "F15": f15, "F19": f19, "F20": f20}
