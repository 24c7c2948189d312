"""Rows with known answers, and how well a model does on them: loss, perplexity, right answers.

Rows are read and encoded once, as training read and encoded them, and then put to any number of
adapters on one model. Knows no adapters: the caller switches them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from decal.config import DataConfig
from decal.data.batch import Batch
from decal.data.chat import Encoder
from decal.data.label import LabelEncoder
from decal.data.pack import LayoutName, make_batches
from decal.data.source import Example, read_rows
from decal.errors import DataError
from decal.model import attention, heads
from decal.objectives import classify, sft
from decal.verbs.loss import batch_losses, head_of
from decal.verbs.text import Chat, Observe, Prompt, complete, context_length, exact_match

_BATCH_TOKENS = 4096
_LONGEST = 1 << 20
"""Tokens of a row where the model sets no limit."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Rows, encoded for one model."""

    batches: list[Batch]
    questions: list[tuple[Prompt, str]]
    """What each row asks, and the answer it expects; empty where rows ask nothing."""
    rows: int
    classes: tuple[str, ...] | None
    """Names of the classes, for a classifier."""


def exam(model: Any, tokenizer: Any, settings: DataConfig) -> Exam:
    """The rows that `settings` name, encoded for `model`; longer ones than its context are cut.

    Raises:
        DataError: rows that cannot be read, or do not fit a model of this kind.
    """
    rows = read_rows(settings)
    settings = settings.model_copy(update={"max_length": context_length(model) or _LONGEST})
    classes = heads.labels_of(model)
    questions: list[tuple[Prompt, str]] = []
    layout: LayoutName = "padded"
    if classes is not None:
        samples = LabelEncoder(tokenizer, settings, classes).encode_all(rows.examples, rows.source)
    else:
        samples = Encoder(tokenizer, settings).encode_all(rows.examples, rows.source)
        questions = [asked for row in rows.examples if (asked := question(row)) is not None]
        layout = "flat" if attention.flattens(model) else "padded"
    batches = make_batches(samples, _BATCH_TOKENS, layout=layout)
    return Exam(batches=batches, questions=questions, rows=len(samples), classes=classes)


def question(row: Example) -> tuple[Prompt, str] | None:
    """What a row asks, and the answer it expects: its last turn, or its completion.

    None for plain text, and for a chat whose last answer calls tools.
    """
    if row.messages is None:
        return None if row.completion is None else (row.prompt or "", row.completion)
    last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")
    if row.messages[last].extra.get("tool_calls"):
        return None
    return Chat(row.messages[:last], row.tools), row.messages[last].content


def measure(
    model: Any,
    tokenizer: Any,
    asked: Exam,
    *,
    max_new_tokens: int = 64,
    observe: Observe | None = None,
) -> dict[str, Any]:
    """What `model` scores, with the adapter that is switched on.

    Returns:
        `rows`, and of a language model `loss` per trained token, `perplexity`, and `accuracy`
        (exact match of the last answer, greedy) where rows ask something; of a classifier `loss`
        per row, `accuracy` and `macro_f1`.
    """
    steps = len(asked.batches) + len(asked.questions)
    losses, count = 0.0, 0
    predicted: list[int] = []
    head = head_of(model, sft) if asked.classes is None else None
    training = model.training
    model.eval()
    with torch.no_grad():
        for done, batch in enumerate(asked.batches, start=1):
            batch = batch.to(model.device)
            if asked.classes is not None:
                logits = heads.forward(model, batch)
                predicted += logits.argmax(dim=-1).tolist()
                losses += float(classify.losses(logits, classify.targets(batch)).sum())
            else:
                with attention.flat_attention(model) if batch.layout == "flat" else nullcontext():
                    losses += float(batch_losses(model, batch, sft, head).sum())
            count += batch.trained
            if observe:
                observe(done, steps)
    model.train(training)
    if not count:
        raise DataError("the rows train nothing, so there is nothing to measure")
    found: dict[str, Any] = {"rows": asked.rows, "loss": losses / count}
    if asked.classes is not None:
        labels = [label for batch in asked.batches for label in classify.targets(batch).tolist()]
        return found | classify.scores(predicted, labels)
    found["perplexity"] = math.exp(min(found["loss"], 700.0))
    if asked.questions:
        begun = len(asked.batches)
        answers = complete(
            model,
            tokenizer,
            [prompt for prompt, _ in asked.questions],
            max_new_tokens=max_new_tokens,
            progress=observe and (lambda done, _: observe(begun + done, steps)),
        )
        found["accuracy"] = exact_match(answers, _answers(asked.questions))
    return found


def _answers(questions: Sequence[tuple[Prompt, str]]) -> list[str]:
    return [answer for _, answer in questions]
