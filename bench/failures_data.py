"""Rows of docs/failures.md on data and settings: what is trained, packing, YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import yaml
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer, TrlParser

from bench.failures_row import Case, MakeRow, Row, Seen, Verdict, watched
from decal.data.pack import flat_batch, padded_batch
from decal.data.stats import summarize
from decal.model import attention
from decal.objectives import sft
from decal.runfile import parse_run
from tests import zoo
from tests.data.chats import chat, encoder
from tests.data.conftest import build
from tests.failures.test_f09_nothing_trained import LONG, SHORT
from tests.failures.test_f10_never_stops import learned_to_stop, padded_with_eos, rows
from tests.failures.test_f12_packing_accumulation import samples
from tests.failures.test_f22_settings import RUN

LIMIT = 40
PLAIN = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


def trl(folder: Path, data: Sequence[dict[str, Any]], tokenizer: Any, **changes: Any) -> SFTTrainer:
    """trl's trainer on a tiny llama, in its own settings but for `changes`."""
    settings = {**PLAIN, "output_dir": str(folder / "trl"), "bf16": False, **changes}
    return SFTTrainer(
        model=zoo.build("llama"),
        args=SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(list(data)),
        processing_class=tokenizer,
    )


def labels(trainer: SFTTrainer, row: int = 0) -> torch.Tensor:
    """What the trainer's collator makes of one row, ignored ones apart."""
    found = trainer.data_collator([trainer.train_dataset[row]])["labels"]
    return found[found != -100]


def turns(example: Any) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in example.messages]


def f9(folder: Path) -> Row:
    """Rows of which nothing is trained, and rows that are cut."""
    tokenizer = zoo.tokenizer()
    data = [{"prompt": turns(r)[:1], "completion": turns(r)[1:]} for r in (LONG, SHORT)]
    kept = 0
    with watched() as heard:
        kept = len(trl(folder, data, tokenizer, max_length=LIMIT).train_dataset)
    with watched() as ours:
        encoder(tokenizer, LIMIT).encode_all([LONG, SHORT])
    nothing = Case(
        what=f"prompts and completions, max_length {LIMIT}, one of two prompts longer",
        seen=[
            Seen(
                who="trl",
                verdict=heard.verdict(kept == 2),
                text=f"the data set that is trained has {kept} of 2 rows; {heard.words()}",
            ),
            Seen(who="decal", verdict=ours.verdict(False), text=ours.words()),
        ],
    )
    long = chat("why? " * 198, "because of the rain that fell")
    with watched() as heard:
        cut = labels(trl(folder, [{"messages": turns(long)}], tokenizer))
    end = int((cut == tokenizer.eos_token_id).sum())
    sample = encoder(tokenizer, 1024).encode(long)
    whole = len(encoder(tokenizer, 10_000).encode(long))
    return Row(
        title="Labels all masked, answers cut off",
        failure="Truncation comes after masking, so that a long prompt leaves nothing to train; a "
        "default length cuts the end of long rows.",
        cases=[
            nothing,
            Case(
                what=f"a chat of {whole:,} tokens and a max_length of 1024 (trl's default)",
                seen=[
                    Seen(
                        who="trl",
                        verdict=heard.verdict(False),
                        text=f"{len(cut):,} labels, the ends of {end} of 2 turns among them; "
                        f"{heard.words()}",
                    ),
                    Seen(
                        who="decal",
                        verdict="told",
                        text="prints before step 1: " + "; ".join(summarize([sample]).lines()),
                    ),
                ],
            ),
        ],
        threads=("unsloth#2900", "trl#6025", "trl#4879", "LLaMA-Factory#8088"),
    )


def f10(folder: Path) -> Row:
    """The end of a turn, and the beginning of a sequence."""
    tokenizer = padded_with_eos()
    found = rows(tokenizer)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with watched() as heard:
        theirs = collator([{"input_ids": sample.input_ids.tolist()} for sample in found])["labels"]
    shifted = torch.cat([theirs[:, 1:], torch.full((2, 1), -100)], 1)
    batch = padded_batch(found, tokenizer.pad_token_id)
    stops = {"transformers": learned_to_stop(shifted, tokenizer)}
    stops["decal"] = learned_to_stop(batch.targets, tokenizer)
    eos = Case(
        what="padding with the eos token; the probability of stopping after 40 steps on two rows",
        seen=[
            Seen(
                who="transformers",
                verdict=heard.verdict(stops["transformers"] > 0.5),
                text=f"{stops['transformers']:.3f}; DataCollatorForLanguageModeling ignores every "
                f"eos, those that end a turn too; {heard.words()}",
            ),
            Seen(who="decal", verdict="right", text=f"{stops['decal']:.3f}"),
        ],
    )
    return Row(
        title="A model that never learns to stop; two beginnings",
        failure="Padding is masked by its id, which is that of the eos token; the end of a turn "
        "lies outside what is trained; the beginning of a sequence is there twice.",
        cases=[eos, *_beginnings(folder), _end_outside(folder)],
        threads=("trl#1623", "trl#3091", "transformers#26620", "unsloth#416"),
    )


def _beginnings(folder: Path) -> list[Case]:
    tokenizer = build("headers", adds_bos=True)
    row = chat("Say yes?", "yes")
    text = tokenizer.apply_chat_template(turns(row), tokenize=False)
    ours = int((encoder(tokenizer).encode(row).input_ids == tokenizer.bos_token_id).sum())
    cases = []
    for what, data in (("rendered text", {"text": text}), ("messages", {"messages": turns(row)})):
        count = 0
        with watched() as heard:
            ids = trl(folder, [data], tokenizer).train_dataset[0]["input_ids"]
            count = ids.count(tokenizer.bos_token_id)
        seen = [
            Seen(
                who="trl",
                verdict=heard.verdict(count == 1),
                text=f"{count} of them; {heard.words()}",
            )
        ]
        if what == "messages":
            right: Verdict = "right" if ours == 1 else "silent"
            seen.append(Seen(who="decal", verdict=right, text=f"{ours} of them"))
        else:
            with watched() as refused:
                twice = build("headers", adds_bos=True)
                twice.chat_template = twice.bos_token + twice.chat_template
                encoder(twice).encode(row)
            text = f"rendered by decal, once; a template that writes two: {refused.words()}"
            seen.append(Seen(who="decal", verdict=refused.verdict(False), text=text))
        cases.append(
            Case(what=f"beginnings where tokenizer and template both write one, {what}", seen=seen)
        )
    return cases


def _end_outside(folder: Path) -> Case:
    tokenizer, row = build("chatml-marked"), chat("Say yes?", "yes")
    with watched() as heard:
        data = [{"messages": turns(row)}]
        theirs = labels(trl(folder, data, tokenizer, assistant_only_loss=True))
    sample = encoder(tokenizer).encode(row)
    ours = torch.from_numpy(sample.input_ids[sample.trained])
    return Case(
        what="a template that closes its generation markers before the end of the turn",
        seen=[
            Seen(
                who="trl",
                verdict=heard.verdict(tokenizer.eos_token_id in theirs, "end-of-turn"),
                text=f"trains {tokenizer.decode(theirs)!r}; {heard.words('end-of-turn')}",
            ),
            Seen(
                who="decal",
                verdict="right" if tokenizer.eos_token_id in ours else "silent",
                text=f"trains {tokenizer.decode(ours)!r}",
            ),
        ],
    )


def f11(folder: Path) -> Row:
    """Templates without generation markers."""
    tokenizer, row = build("headers"), chat("Say yes?", "yes", "And now?", "no")
    with watched() as heard:
        encoded = tokenizer.apply_chat_template(
            turns(row), return_dict=True, return_assistant_tokens_mask=True
        )
    masked = sum(encoded["assistant_masks"])
    with watched() as refused:
        trl(folder, [{"messages": turns(row)}], tokenizer, assistant_only_loss=True)
    sample = encoder(tokenizer).encode(row)
    ours = tokenizer.decode(sample.input_ids[sample.trained])
    return Row(
        title="Chat templates without generation markers",
        failure="Which tokens are the assistant's is asked of markers that few templates have.",
        cases=[
            Case(
                what="a chat of two answers, a template with headers and no markers",
                seen=[
                    Seen(
                        who="transformers",
                        verdict=heard.verdict(masked > 0, "generation"),
                        text=f"return_assistant_tokens_mask marks {masked} tokens; "
                        f"{heard.words('generation')}",
                    ),
                    Seen(who="trl", verdict=refused.verdict(False), text=refused.words()),
                    Seen(
                        who="decal",
                        verdict="right" if ours.count("<|eot_id|>") == 2 else "silent",
                        text=f"trains {ours!r}",
                    ),
                ],
            )
        ],
        threads=("trl#5471",),
    )


def f12(folder: Path) -> Row:
    """Packed samples, and steps cut into micro-batches."""
    model = zoo.build("llama")
    found = [replace(s, trained=np.arange(len(s)) > 0) for s in samples()]
    data = [{"input_ids": s.input_ids.tolist(), "labels": s.input_ids.tolist()} for s in found]
    with torch.no_grad():
        apart = sum(_summed(model, padded_batch([s])) for s in found)
        flat = flat_batch(found)
        with attention.flat_attention(model):
            ours = _summed(model, flat)
    single = _evaluated(folder, data, None)
    flattening, each = DataCollatorWithFlattening(return_tensors="pt"), 0.0
    cases = []
    for who, what, measure in (
        (
            "transformers, own loop",
            "batches of DataCollatorWithFlattening",
            lambda: float(model(**flattening(data)).loss),
        ),
        (
            "transformers, Trainer",
            "batches of DataCollatorWithFlattening",
            lambda: _evaluated(folder, data, flattening),
        ),
        ("trl", "packing", lambda: _trl_loss(folder, data, packing=True)),
        (
            "trl, wrapped",
            "packing with packing_strategy wrapped, which is not the default",
            lambda: _trl_loss(folder, data, packing=True, packing_strategy="wrapped"),
        ),
    ):
        with watched() as heard, torch.no_grad():
            each = measure()
        verdict = heard.verdict(abs(each - single) < 1e-4 * single)
        text = f"{what}: loss {each:.5f} packed, {single:.5f} apart; {heard.words()}"
        cases.append(Seen(who=who, verdict=verdict, text=text))
    cases.append(
        Seen(
            who="decal",
            verdict="right" if abs(ours - apart) < 1e-5 * apart else "silent",
            text=f"loss {ours / flat.trained:.5f} packed, {apart / flat.trained:.5f} apart",
        )
    )
    return Row(
        title="Samples that see each other; micro-batches that weigh unequally",
        failure="Samples of one row attend to each other where nothing but their positions tells "
        "them apart; the mean over micro-batches of means weighs a token by its neighbours.",
        cases=[
            Case(what="eight samples in one row", seen=cases),
            _accumulated(folder, data),
        ],
        threads=("transformers#34191", "unsloth-zoo#1023", "trl#1230", "axolotl#3796"),
    )


def _summed(model: Any, batch: Any) -> float:
    keep = sft.trained_positions(batch)
    logits = attention.forward(model, batch, keep)
    return float(sft.losses(logits, batch.targets.flatten()[keep]).sum())


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**{**PLAIN, "output_dir": str(folder / "trainer"), **changes})


def _padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(f["input_ids"]) for f in features)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**f, "attention_mask": [1] * len(f["input_ids"])} for f in features]
    return {
        k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in rows]) for k, v in fill.items()
    }


def _evaluated(folder: Path, data: list[dict[str, Any]], collator: Any) -> float:
    trainer = Trainer(
        model=zoo.build("llama"),
        args=_arguments(folder, per_device_eval_batch_size=8),
        eval_dataset=datasets.Dataset.from_list(data),
        data_collator=collator or _padded,
    )
    return float(trainer.evaluate()["eval_loss"])


def _trl_loss(folder: Path, data: list[dict[str, Any]], **options: Any) -> float:
    """Of the first step of a training, in which all rows are."""
    trainer = trl(
        folder,
        data,
        zoo.tokenizer(),
        per_device_train_batch_size=8,
        max_length=64,
        max_steps=1,
        logging_steps=1,
        **options,
    )
    with torch.enable_grad():
        trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def _accumulated(folder: Path, data: list[dict[str, Any]]) -> Case:
    """Losses and gradient norms of one step, cut two ways."""
    uneven = [{**d, "labels": [-100] * (len(d["labels"]) - i) + d["labels"][-i:]}
              for i, d in enumerate(data, 1)]  # fmt: skip
    found = {}
    with watched() as heard:
        for size, times in ((8, 1), (1, 8)):
            trainer = Trainer(
                model=zoo.build("llama"),
                args=_arguments(
                    folder,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=times,
                    max_steps=1,
                    logging_steps=1,
                ),
                train_dataset=datasets.Dataset.from_list(uneven),
                data_collator=_padded,
            )
            trainer.train()
            found[times] = trainer.state.log_history[0]
    names = ("loss", "grad_norm")
    same = all(abs(found[1][n] - found[8][n]) < 1e-4 * found[1][n] for n in names)
    whole, cut = (" and ".join(f"{n} {found[t][n]:.4f}" for n in names) for t in (1, 8))
    ours = _ours_accumulated()
    return Case(
        what="one step of eight rows, as one micro-batch and as eight",
        seen=[
            Seen(
                who="transformers",
                verdict=heard.verdict(same),
                text=f"Trainer: {whole} as one, {cut} as eight",
            ),
            Seen(
                who="decal",
                verdict="right" if ours < 1e-5 else "silent",
                text=f"the gradients differ by {ours:.0e} of their norm",
            ),
        ],
    )


def _ours_accumulated() -> float:
    model, found = zoo.build("llama"), samples()
    total = flat_batch(found).trained
    gradients = []
    for micro in ([flat_batch(found)], [flat_batch([s]) for s in found]):
        model.zero_grad()
        with attention.flat_attention(model):
            for batch in micro:
                keep = sft.trained_positions(batch)
                logits = attention.forward(model, batch, keep)
                (sft.losses(logits, batch.targets.flatten()[keep]).sum() / total).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def f22(folder: Path) -> Row:
    """Numbers and keys in YAML."""
    config = folder / "run.yaml"
    plain = f"output_dir: {folder}/out\nuse_cpu: true\nbf16: false\nreport_to: none\n"
    cases = []
    for what, line, wanted in (
        ("`learning_rate: 1e-5`", "learning_rate: 1e-5\n", 1e-5),
        ("an unknown key, `learnign_rate`", "learnign_rate: 1.0e-3\n", None),
    ):
        config.write_text(plain + line)
        seen = []
        for who, read in (("transformers", _hf), ("trl", _trl), ("peft", _peft)):
            got = None
            with watched() as heard:
                got = read(config, line)
            right = wanted is not None and got == wanted
            said = f"the value is {got!r}; " if heard.error is None else ""
            seen.append(Seen(who=who, verdict=heard.verdict(right), text=said + heard.words()))
        ours = RUN if wanted else RUN.replace("lr: 1e-5", "lrr: 1e-5")
        with watched() as heard:
            number = parse_run(ours).train.lr
        text = heard.words() if heard.error else f"the value is {number!r}"
        seen.append(Seen(who="decal", verdict=heard.verdict(wanted == 1e-5), text=text))
        cases.append(Case(what=f"{what} in a YAML file", seen=seen))
    return Row(
        title="Settings that do not arrive",
        failure="YAML readers of version 1.1 take `1e-5` for text; unknown keys are ignored.",
        cases=cases,
    )


def _hf(config: Path, line: str) -> object:
    """The settings, and one step with them: what is wrong may come out late."""
    (found,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(config))
    data = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    found.max_steps, found.save_strategy, found.disable_tqdm = 1, "no", True
    Trainer(model=zoo.build("llama"), args=found, train_dataset=data).train()
    return found.learning_rate


def _trl(config: Path, line: str) -> object:
    (found,) = TrlParser(SFTConfig).parse_args_and_config(["--config", str(config)])
    return found.learning_rate


def _peft(config: Path, line: str) -> object:
    """peft reads no YAML; its settings are filled from one as tutorials do."""
    key, value = next(iter(yaml.safe_load(line).items()))
    known = {"learning_rate": "lora_dropout"}.get(key, key)
    found = peft.LoraConfig(**{known: value}, target_modules=["q_proj"])
    peft.get_peft_model(zoo.build("llama"), found)
    return found.lora_dropout


ROWS: dict[str, MakeRow] = {"F9": f9, "F10": f10, "F11": f11, "F12": f12, "F22": f22}
