"""Texts with labels: classes, tokens as at inference, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from decal.config import DataConfig
from decal.data.chat import Encoder
from decal.data.example import Example
from decal.data.label import LabelEncoder, class_names
from decal.data.pack import Batches, flat_batch, make_batches
from decal.data.stats import summarize
from decal.errors import DataError


def rows(*labels: str, text: str = "a b c") -> list[Example]:
    return [Example(row=i, text=text, label=label) for i, label in enumerate(labels, 1)]


@pytest.fixture(scope="module")
def bert() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=12,
    )


def test_class_names() -> None:
    """Mutation: sort numbers as text."""
    assert class_names(rows("b", "a", "b"), rows("a")) == ("a", "b")
    assert class_names(rows("10", "9", "-1")) == ("-1", "9", "10")
    assert class_names(rows("10", "9", "x")) == ("10", "9", "x")


def test_classes_that_cannot_be_learned() -> None:
    with pytest.raises(DataError, match="the training rows have 1 class, `a`"):
        class_names(rows("a", "a"))
    with pytest.raises(DataError, match="1 class of the evaluation rows") as caught:
        class_names(rows("spam", "ham"), rows("ham", "spm"))
    assert caught.value.details == ("row 2: `spm`",)
    assert caught.value.hint == "is `spam` meant?"
    with pytest.raises(DataError, match="the rows have no labels"):
        class_names([Example(row=1, text="a")])


def test_tokens_are_those_of_inference(bert: Any) -> None:
    """Mutations: add no special tokens; cut the closing one off."""
    encoder = LabelEncoder(bert, DataConfig(path="x"), ("no", "yes"))
    (sample,) = encoder.encode_all(rows("yes"))
    assert sample.input_ids.tolist() == [2, 4, 5, 6, 3] == bert("a b c")["input_ids"]
    assert (sample.label, sample.truncated, sample.trained.any()) == (1, 0, False)
    assert encoder.max_length == 12
    assert encoder.notes == ("the tokenizer takes at most 12 tokens",)
    (cut,) = encoder.encode_all(rows("no", text="a b c d " * 4))
    assert cut.input_ids.tolist() == [2, *[4, 5, 6, 7, 4, 5, 6, 7, 4, 5], 3]
    assert (cut.label, cut.truncated) == (0, 6)


def test_own_bos_is_kept(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("inst", adds_bos=True)
    (sample,) = LabelEncoder(tokenizer, DataConfig(path="x"), ("no", "yes")).encode_all(rows("no"))
    assert sample.input_ids.tolist()[0] == tokenizer.bos_token_id


def test_long_rows_are_dropped_and_counted(bert: Any) -> None:
    settings = DataConfig(path="x", overflow="drop", max_length=8)
    encoder = LabelEncoder(bert, settings, ("no", "yes"))
    examples = [*rows("no", "no"), Example(row=3, text="a " * 9, label="yes")]
    samples = encoder.encode_all(examples)
    assert encoder.dropped == (3,)
    lines = summarize(samples, dropped=encoder.dropped, classes=encoder.classes).lines()
    assert lines == [
        "2 rows, 10 tokens, longest 5",
        "2 classes: no 2, yes 0",
        "1 row too long and dropped (33.3%)",
    ]
    with pytest.raises(DataError, match="the row of `e` is longer"):
        encoder.encode_all(examples[2:], "e")


def test_batches(bert: Any) -> None:
    """Trained counts samples. Mutations: count tokens; give labels in the order of the rows."""
    encoder = LabelEncoder(bert, DataConfig(path="x"), ("no", "yes"))
    examples = [*rows("yes", "no"), Example(row=3, text="a b c d", label="yes")]
    samples = encoder.encode_all(examples)
    (batch,) = make_batches(samples, 100, layout="padded")
    assert batch.labels is not None
    assert dict(zip(batch.rows, batch.labels.tolist(), strict=True)) == {1: 1, 2: 0, 3: 1}
    assert (batch.trained, batch.tokens) == (3, 16)
    assert batch.to("cpu").labels is batch.labels
    data = Batches(samples=samples, batch_size=2, micro_batch_tokens=6, layout="padded")
    assert next(data.steps()).trained == 2
    with pytest.raises(ValueError, match="padded"):
        flat_batch(samples)


def test_labels_are_not_for_text_objectives(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="the rows have labels") as caught:
        Encoder(make_tokenizer("inst"), DataConfig(path="x")).encode_all(rows("a"))
    assert "objective: classify" in str(caught.value.hint)


def test_unknown_label(bert: Any) -> None:
    encoder = LabelEncoder(bert, DataConfig(path="x"), ("no", "yes"))
    with pytest.raises(DataError, match="row 1: the label `may` is not a known class"):
        encoder.encode_all(rows("may"))


def test_many_classes_are_summed_up(bert: Any) -> None:
    names = tuple(str(i) for i in range(20))
    encoder = LabelEncoder(bert, DataConfig(path="x"), names)
    samples = encoder.encode_all(rows(*names, "7"))
    lines = summarize(samples, classes=names).lines()
    assert lines[1] == "20 classes: between 1 (19) and 2 rows (7)"
