"""The rows of a run: read and split before the model is loaded, encoded with its tokenizer.

For classifiers the rows say which classes there are; an adapter that training goes on with has
its own, in their order. Knows no adapters' insides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decal.config import RunConfig
from decal.data.chat import Encoder
from decal.data.label import LabelEncoder, class_names
from decal.data.sample import Sample
from decal.data.source import Rows, read_rows, split_eval
from decal.data.stats import DataSummary, summarize
from decal.errors import DataError, nearest


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """What will be trained and evaluated on, not yet encoded."""

    rows: Rows
    train: Rows
    eval: Rows
    classes: tuple[str, ...] | None
    """Names of the classes in the order of the logits; None where none are learned."""


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """The same as tokens."""

    rows: Rows
    """All of them, for their source and layout."""
    train: list[Sample]
    eval: list[Sample]
    summary: DataSummary
    """Of the training rows."""
    chat_template: str | None
    """The template that was used where the tokenizer has none of its own."""

    def lines(self) -> list[str]:
        """What will be trained, in words."""
        counts = f"{len(self.train):,} to train, {len(self.eval):,} to evaluate"
        lines = [f"data: {self.rows.source} ({self.rows.layout}), {counts}"]
        lines += [f"  {line}" for line in self.summary.lines()]
        if self.rows.ignored:
            lines.append(f"  columns not used: {', '.join(self.rows.ignored)}")
        return lines


def read_run_rows(config: RunConfig, known: Sequence[str] | None = None) -> RunRows:
    """Reads and splits what `config.data` names.

    `known` are the classes of an adapter that training goes on with.

    Raises:
        DataError: unreadable rows, or classes that cannot be learned or that `known` lacks.
    """
    rows = read_rows(config.data, seed=config.train.seed)
    train, evaluated = split_eval(rows, config.data, config.train.seed)
    classes = None
    if config.objective == "classify":
        classes = class_names(train.examples, evaluated.examples)
        if known is not None:
            _refuse_new_classes(classes, known)
            classes = tuple(known)
    return RunRows(rows=rows, train=train, eval=evaluated, classes=classes)


def encode(found: RunRows, tokenizer: Any, config: RunConfig) -> EncodedRows:
    """Encodes all rows.

    Raises:
        DataError: rows that would train nothing or the wrong thing.
    """
    encoder: Encoder | LabelEncoder
    if found.classes is None:
        encoder = Encoder(tokenizer, config.data)
    else:
        encoder = LabelEncoder(tokenizer, config.data, found.classes)
    samples = encoder.encode_all(found.train.examples, found.train.source)
    summary = summarize(
        samples, dropped=encoder.dropped, classes=found.classes or (), notes=encoder.notes
    )
    return EncodedRows(
        rows=found.rows,
        train=samples,
        eval=encoder.encode_all(found.eval.examples, found.eval.source),
        summary=summary,
        chat_template=encoder.template_used if isinstance(encoder, Encoder) else None,
    )


def _refuse_new_classes(classes: Sequence[str], known: Sequence[str]) -> None:
    new = [name for name in classes if name not in known]
    if new:
        near = nearest(new[0], list(known))
        raise DataError(
            f"{len(new)} of {len(classes)} classes are unknown to the adapter's head",
            details=[f"first: `{new[0]}`" + (f", the nearest known is `{near}`" if near else "")],
            hint="train a new adapter, or leave those rows out",
        )
