"""What the data will train, in numbers and on one sample: shown before step 1. Knows no models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from decal.data.sample import Sample
from decal.data.tokens import Tokenizer

SCATTERED = 1.5
"""Trained tokens per piece below which a mask cannot be right: an answer of one token and the token
that ends it are two."""


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Counts over encoded samples."""

    rows: int
    tokens: int
    """After truncation."""
    trained: int
    """Trained tokens, after truncation."""
    longest: int
    """Tokens of the longest sample."""
    truncated_rows: int
    tokens_cut: int
    """Tokens lost to truncation, trained or not."""
    trained_cut: int
    """Trained tokens among them."""
    ended_rows: int
    """Rows whose last end-of-turn token is there and trained."""
    straddling: int
    """Tokens that hold characters of a prompt and of what is trained; they are not trained."""
    longest_row: int = 0
    """Number of the longest sample's row."""
    pieces: int = 0
    """Stretches of trained tokens: an answer is one, a mask gone astray is many short ones."""
    dropped: int = 0
    """Rows left out as too long."""
    per_class: tuple[tuple[str, int], ...] = ()
    """Classes with their rows; empty where tokens are trained."""
    notes: tuple[str, ...] = ()
    """What else the encoder has to say."""

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all, 0 … 1."""
        return self.trained / self.tokens if self.tokens else 0.0

    @property
    def scattered(self) -> bool:
        """Whether the trained tokens lie in pieces far shorter than any answer and its end."""
        return self.trained < SCATTERED * self.pieces

    def lines(self) -> list[str]:
        """The summary in plain sentences; the second and later lines only where they say much."""
        lines = self._class_lines() if self.per_class else self._token_lines()
        if self.dropped:
            share = self.dropped / (self.rows + self.dropped)
            lines.append(f"{_count(self.dropped, 'row')} too long and dropped ({share:.1%})")
        return [*lines, *self.notes]

    def _token_lines(self) -> list[str]:
        lines = [
            f"{_count(self.rows, 'row')}, {self.tokens:,} tokens, {self.trained:,} trained "
            f"({self.trained_share:.1%}), longest {self.longest:,}",
            f"end-of-turn token trained in {self.ended_rows:,} of {_count(self.rows, 'row')}",
        ]
        if self.truncated_rows:
            lines.append(f"{self._truncated()}, {self.trained_cut:,} of them trained")
        if self.straddling:
            lines.append(
                f"not trained: {_count(self.straddling, 'token')} with both the end of a prompt "
                "and the beginning of what is trained"
            )
        return lines

    def _class_lines(self) -> list[str]:
        lines = [
            f"{_count(self.rows, 'row')}, {self.tokens:,} tokens, longest {self.longest:,}",
            f"{len(self.per_class):,} classes: {_listed(self.per_class)}",
        ]
        return [*lines, self._truncated()] if self.truncated_rows else lines

    def _truncated(self) -> str:
        share = self.truncated_rows / self.rows
        return (
            f"{_count(self.truncated_rows, 'row')} truncated ({share:.1%}): "
            f"{_count(self.tokens_cut, 'token')} cut"
        )


CLASSES_SHOWN = 8


def _listed(per_class: Sequence[tuple[str, int]]) -> str:
    """Classes with their rows; of many the largest and the smallest."""
    shown = [f"{name} {rows:,}" for name, rows in per_class]
    if len(shown) <= CLASSES_SHOWN:
        return ", ".join(shown)
    by_size = sorted(per_class, key=lambda pair: -pair[1])
    (most, many), (least, few) = by_size[0], by_size[-1]
    return f"between {few:,} ({least}) and {many:,} rows ({most})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def summarize(
    samples: Sequence[Sample],
    *,
    dropped: Sequence[int] = (),
    classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> DataSummary:
    """Count what `samples` will train.

    Args:
        dropped: numbers of the rows that the encoder left out.
        classes: names of the classes, for samples with labels.
        notes: further lines, from the encoder.
    """
    counts = Counter(sample.label for sample in samples)
    longest = max(samples, key=len, default=None)
    return DataSummary(
        rows=len(samples),
        tokens=sum(len(sample) for sample in samples),
        trained=sum(int(sample.trained.sum()) for sample in samples),
        longest=0 if longest is None else len(longest),
        longest_row=0 if longest is None else longest.row,
        pieces=sum(_pieces(sample) for sample in samples),
        truncated_rows=sum(sample.truncated > 0 for sample in samples),
        tokens_cut=sum(sample.truncated for sample in samples),
        trained_cut=sum(sample.lost for sample in samples),
        ended_rows=sum(sample.ended for sample in samples),
        straddling=sum(sample.straddling for sample in samples),
        dropped=len(dropped),
        per_class=tuple((name, counts[i]) for i, name in enumerate(classes)),
        notes=tuple(notes),
    )


def _pieces(sample: Sample) -> int:
    """Stretches of trained tokens; the first token is never trained."""
    return int((sample.trained[1:] & ~sample.trained[:-1]).sum())


def show_sample(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The sample as pieces of text with whether they are trained, special tokens included."""
    pairs = zip(sample.input_ids.tolist(), sample.trained.tolist(), strict=True)
    return [
        (
            tokenizer.decode(
                [token for token, _ in run],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            ),
            trained,
        )
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]
