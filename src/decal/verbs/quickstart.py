"""`decal quickstart`: the whole way once, on the embedded base, with every claim checked.

quantize -> look at the data -> train -> score -> save -> reload -> merge -> plain transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal import demo
from decal.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from decal.data.stats import show_sample
from decal.errors import VerificationError
from decal.model.hf import Quiet
from decal.model.inject import disabled, trainable_parameters
from decal.model.size import weight_bytes
from decal.report.tables import marked, size, table
from decal.store.files import check_free
from decal.train.events import Event
from decal.verbs.load import load
from decal.verbs.merge import merge
from decal.verbs.session import Session, prepare
from decal.verbs.text import complete, encode_prompt, exact_match
from decal.verbs.train import RunResult, train

HELD_OUT = 500
STEPS = 150
"""Optimizer steps where the machine is fast enough for them."""
BATCH = 32
SECONDS = 48.0
"""What training may take by calibration; a slower machine takes fewer steps."""
SHOWN = 3
AGREEMENT = 0.995
"""Share of predictions, ties apart, that must survive a merge into 16 bits."""
TIE = 0.25
"""Lead of a prediction, in logits, that bfloat16 can turn over."""


@dataclass
class _Show:
    """Where the stages report to."""

    say: Callable[[Any], None]
    observe: Callable[[Event], None]
    colour: bool
    started: float = field(default_factory=time.perf_counter)

    def stage(self, title: str) -> None:
        self.say(f"\n{title}  ({time.perf_counter() - self.started:.0f} s)")


def quickstart(
    out: Path,
    *,
    force: bool = False,
    say: Callable[[Any], None] = lambda what: None,
    observe: Callable[[Event], None] = lambda event: None,
    colour: bool = False,
) -> dict[str, Any]:
    """Trains a ticket router on the embedded base into `out`, and proves each step.

    Args:
        out: folder for data, run and merged model.
        force: replace what an earlier quickstart left there.
        say: takes lines and tables; `observe` takes the events of the training.
        colour: mark trained tokens by colour instead of brackets.

    Returns:
        The facts of `decal quickstart --json`.

    Raises:
        OutputError: `out` is in use.
        VerificationError: the reloaded or the merged model does not predict what was trained.
    """
    check_free(out, force=force, marker="run/run.yaml", hint="use --force, or another --out")
    show = _Show(say, observe, colour)
    config = _settings(out)
    test = demo.rows("test")[:HELD_OUT]
    config = _prepare(show, config, out)

    show.stage("3. train a QLoRA adapter")
    done = train(config, force=force, observe=observe)
    assert done is not None
    session = done.session
    result = done.result
    say(
        f"{result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, loss {result.loss:.3f},"
        f" eval loss {result.eval_loss:.3f}, peak memory {size(result.memory.bytes)}"
    )

    show.stage(f"4. score base and adapter on {len(test)} held-out tickets")
    with disabled(session.model):
        base_says = _predict(session.model, session.tokenizer, test)
    adapter_says = _predict(session.model, session.tokenizer, test)

    margins = _margins(session, test)
    says = _again(show, done.run, out, test, force)
    _agree("the reloaded adapter", says["reloaded"], adapter_says)
    changed = _agree("the merged model", says["merged"], adapter_says, margins)
    differ = f"{changed} of {len(test)} predictions differ" if changed else "the same predictions"
    say(f"reloaded: the same predictions; merged: {differ}")
    says = {"base": base_says, "adapter": adapter_says, **says}
    expected = [row.queue for row in test]
    scores = {name: exact_match(said, expected) for name, said in says.items()}
    _show_end(show, scores, test, says)
    return _facts(done, scores, out / "merged", time.perf_counter() - show.started)


def _again(
    show: _Show, run: Path, out: Path, test: Sequence[demo.TicketRow], force: bool
) -> dict[str, list[str]]:
    """Predictions of what was saved: the adapter on a new base, and the merged model."""
    show.stage("5. load the saved adapter into a newly loaded base, score it")
    model, tokenizer = load(run)
    reloaded = _predict(model, tokenizer, test)
    show.stage("6. merge, load the result with plain transformers, score it")
    report = merge(None, run, out / "merged", force=force).report
    show.say(
        f"{report.targeted} tensors merged, {report.dequantized} dequantized,"
        f" {report.untouched} untouched"
    )
    with Quiet():
        plain = AutoModelForCausalLM.from_pretrained(out / "merged", dtype="auto")
    merged = _predict(plain, AutoTokenizer.from_pretrained(out / "merged"), test)
    return {"reloaded": reloaded, "merged": merged}


def _settings(out: Path) -> RunConfig:
    return RunConfig(
        base=str(demo.base_path()),
        quant=QuantConfig(format="nf4", double=True),
        adapter=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05),
        data=DataConfig(path=str(out / "train.jsonl"), max_length=256, eval=0.05),
        train=TrainConfig(max_steps=STEPS, batch_size=BATCH, lr=2e-3, warmup=0.1, eval_every=STEPS),
        output=str(out / "run"),
    )


def _prepare(show: _Show, config: RunConfig, out: Path) -> RunConfig:
    """Shows base and data, and fits the number of steps to this machine."""
    show.stage("1. load the embedded base and quantize it")
    out.mkdir(parents=True, exist_ok=True)
    demo.write_jsonl(out / "train.jsonl", "train")
    demo.write_jsonl(out / "test.jsonl", "test")
    lines: list[str] = []
    session = prepare(config, lines.append)
    base = next(line for line in lines if line.startswith("base: "))
    show.say(base)
    weights, stored = _base_size(session.model)
    rows = [
        ("16-bit", size(2 * weights), "16.00"),
        ("NF4, double quantization", size(stored), f"{8 * stored / weights:.2f}"),
    ]
    show.say(table(("stored as", "weights", "bits per weight"), rows))
    show.stage("2. one training sample, what is trained marked")
    show.say(marked(show_sample(session.samples[0], session.tokenizer), colour=show.colour))
    for line in lines:
        if line != base:
            show.say(line)
    steps = _fitting_steps(session)
    if steps < STEPS:
        show.say(f"this machine is given {steps} steps instead of {STEPS}, to end in time")
    settings = config.train.model_copy(update={"max_steps": steps, "eval_every": steps})
    return config.model_copy(update={"train": settings})


def _base_size(model: Any) -> tuple[int, int]:
    """(weights, stored bytes) of the base alone; the adapter on it is in float32."""
    trainable, total = trainable_parameters(model)
    return total - trainable, weight_bytes(model) - 4 * trainable


def _fitting_steps(session: Session) -> int:
    """Steps that fit into SECONDS, from the quickest of four (the first one warms up)."""
    seconds = float("inf")
    with session.training():
        for step in islice(session.batches.steps(0), 4):
            begun = time.perf_counter()
            for batch in step.micro:
                loss, _ = session.loss(batch, 0)
                loss.backward()
            seconds = min(seconds, time.perf_counter() - begun)
    return max(20, min(STEPS, int(SECONDS / max(seconds, 1e-6))))


def _predict(model: Any, tokenizer: Any, rows: Sequence[demo.TicketRow]) -> list[str]:
    with torch.inference_mode():
        prompts = [row.messages[:-1] for row in rows]
        return complete(model, tokenizer, prompts, max_new_tokens=8, batch_size=100)


def _margins(session: Session, rows: Sequence[demo.TicketRow]) -> list[float]:
    """How far the likeliest first token of each answer is ahead of the next, in logits."""
    found = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([encode_prompt(session.tokenizer, row.messages[:-1])])
            logits = session.model(ids.to(session.model.device), logits_to_keep=1).logits[0, -1]
            first, second = logits.float().topk(2).values.tolist()
            found.append(first - second)
    return found


def _agree(
    what: str,
    says: Sequence[str],
    trained: Sequence[str],
    margins: Sequence[float] | None = None,
) -> int:
    """Refuses predictions that differ and says how many do; with `margins`, ties may.

    Logits of about 16 are 1/16 to 1/8 apart in bfloat16, so a lead of TIE or less is rounding.
    """
    differ = [i for i, (a, b) in enumerate(zip(says, trained, strict=True)) if a != b]
    real = [i for i in differ if margins is None or margins[i] > TIE]
    if len(real) > (0 if margins is None else (1 - AGREEMENT) * len(trained)):
        raise VerificationError(
            f"{what} predicts otherwise on {len(real)} of {len(trained)} tickets",
            hint="this is a bug in decal: what was saved is not what was trained",
        )
    return len(differ)


def _show_end(
    show: _Show,
    scores: dict[str, float],
    test: Sequence[demo.TicketRow],
    says: dict[str, list[str]],
) -> None:
    show.stage("7. what came of it")
    rows = [(name, f"{score:.1%}") for name, score in scores.items()]
    show.say(table(("model", "right queue"), rows))
    shown = ("base", "adapter", "merged")
    cells = [
        (row.prompt.partition("\n")[2], row.queue, *(says[name][i] for name in shown))
        for i, row in enumerate(test[:SHOWN])
    ]
    show.say(table(("ticket", "queue", *shown), cells, wrap=38))


def _facts(
    done: RunResult, scores: dict[str, float], merged: Path, seconds: float
) -> dict[str, Any]:
    weights, stored = _base_size(done.session.model)
    return {
        **{f"{name}_accuracy": score for name, score in scores.items()},
        "trainable_params": done.trainable_params,
        "total_params": done.total_params,
        "base_bytes_16bit": 2 * weights,
        "base_bytes_quantized": stored,
        "bits_per_weight": 8 * stored / weights,
        "adapter_bytes": sum(f.stat().st_size for f in done.weights.iterdir()),
        "peak_memory_bytes": done.result.memory.bytes,
        "train_tokens_per_second": done.result.tokens_per_second,
        "seconds": seconds,
        "run": str(done.run),
        "adapter": str(done.weights),
        "merged": str(merged),
    }
