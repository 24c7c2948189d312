"""Texts with labels -> samples for a classifier. Knows no chats and no layouts.

A text is tokenized as it will be at inference, by the tokenizer's own rules with its special
tokens: [CLS] text [SEP] for BERT, a beginning-of-sequence token for Llama. Truncation is the
tokenizer's too, so a closing special token stays. No token is trained; the sample's label is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from decal.config import DataConfig
from decal.data.example import Example
from decal.data.problems import RowError, each_row
from decal.data.sample import Sample
from decal.data.tokens import Tokenizer
from decal.errors import DataError, nearest


def class_names(
    examples: Iterable[Example], eval_examples: Iterable[Example] = ()
) -> tuple[str, ...]:
    """Names of the classes in the training rows, sorted; numbers by their value.

    Raises:
        DataError: rows without labels, fewer than two classes, or a class that only evaluation
            rows have: nothing could be learned about it.
    """
    names = _labels(examples)
    if len(names) < 2:
        raise DataError(
            f"the training rows have {len(names)} class{'es' if len(names) != 1 else ''}"
            + (f", `{next(iter(names))}`" if names else "")
            + ": a classifier needs two or more",
            hint="check which column is the label, with `data.columns: {label: '{…}'}`",
        )
    unseen = {name: row for name, row in _labels(eval_examples).items() if name not in names}
    if unseen:
        name, row = next(iter(unseen.items()))
        near = nearest(name, list(names))
        raise DataError(
            f"{len(unseen):,} class{'es' if len(unseen) != 1 else ''} of the evaluation rows "
            f"{'does' if len(unseen) == 1 else 'do'} not occur in the training rows",
            details=[f"row {row}: `{name}`"],
            hint=f"is `{near}` meant?"
            if near
            else "add training rows of the class, or set `data.eval` to other rows",
        )
    return tuple(sorted(names, key=_order(names)))


def _labels(examples: Iterable[Example]) -> dict[str, int]:
    """Class names with the first row of each."""
    found: dict[str, int] = {}
    for example in examples:
        if example.label is None:
            raise DataError(
                "the rows have no labels, and the objective is to classify",
                hint="the columns `text` and `label` are needed; make them with `data.columns`",
            )
        found.setdefault(example.label, example.row)
    return found


def _order(names: Iterable[str]) -> Callable[[str], int | str]:
    """By value where all names are whole numbers, else by text."""
    return int if all(_is_whole(name) for name in names) else str


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


class LabelEncoder:
    """Encodes examples with labels, for training a classifier.

    Args:
        classes: names of the classes; a label is its index in here.
        settings: max_length and overflow are honoured here. Where the tokenizer knows a smaller
            longest text (BERT's 512), that is the limit.
    """

    def __init__(self, tokenizer: Tokenizer, settings: DataConfig, classes: Sequence[str]):
        self.tokenizer = tokenizer
        self.settings = settings
        self.classes = tuple(classes)
        self.max_length = min(settings.max_length, tokenizer.model_max_length)
        self._index = {name: i for i, name in enumerate(self.classes)}
        self._dropped: list[int] = []

    @property
    def dropped(self) -> tuple[int, ...]:
        """Numbers of the rows that the last encoding left out as too long."""
        return tuple(self._dropped)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, after encoding."""
        if self.max_length < self.settings.max_length:
            return (f"the tokenizer takes at most {self.max_length:,} tokens",)
        return ()

    def encode_all(self, examples: Iterable[Example], source: str = "data") -> list[Sample]:
        """Encode all examples; `source` names them in errors.

        Raises:
            DataError: rows without text or with an unknown label, all of them in one error; or
                all rows are dropped as too long.
        """
        return list(self.encode_iter(examples, source))

    def encode_iter(self, examples: Iterable[Example], source: str = "data") -> Iterator[Sample]:
        """Like `encode_all`, one sample after the other, for a progress bar."""
        self._dropped = []
        yield from each_row(examples, source, self._encode, self._dropped)

    def encode_text(self, text: str) -> tuple[list[int], int]:
        """Token ids of a text as training and inference see it, and how many were cut off."""
        whole = list(self.tokenizer(text, verbose=False)["input_ids"])
        if len(whole) <= self.max_length:
            return whole, 0
        cut = self.tokenizer(text, truncation=True, max_length=self.max_length, verbose=False)
        return list(cut["input_ids"]), len(whole) - self.max_length

    def _encode(self, example: Example) -> Sample | None:
        if example.text is None or example.label is None:
            raise RowError("no text with a label")
        if example.label not in self._index:
            raise RowError("an unknown label", f"the label `{example.label}` is not a known class")
        ids, cut = self.encode_text(example.text)
        if cut and self.settings.overflow == "drop":
            return None
        if not ids:
            raise RowError("no tokens", f"the text {example.text!r:.40} has no tokens")
        return Sample(
            row=example.row,
            input_ids=np.array(ids, dtype=np.int32),
            trained=np.zeros(len(ids), dtype=np.bool_),
            truncated=cut,
            ended=not cut,
            label=self._index[example.label],
        )
