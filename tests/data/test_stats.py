"""The summary's counts, and the sample as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from decal.config import DataConfig
from decal.data.chat import Encoder
from decal.data.sample import Sample
from decal.data.source import Example, Message
from decal.data.stats import show_sample, summarize


def test_counts() -> None:
    """Mutations: swap tokens cut and trained tokens cut; count truncated tokens as rows."""
    ids = np.arange(4, dtype=np.int32)
    mask = np.array([False, True, True, False])
    samples = [
        Sample(row=1, input_ids=ids, trained=mask),
        Sample(row=2, input_ids=ids, trained=mask, truncated=5, lost=3, ended=False),
        Sample(row=3, input_ids=ids[:2], trained=mask[:2], straddling=1),
    ]
    summary = summarize(samples)
    assert (summary.rows, summary.tokens, summary.trained, summary.longest) == (3, 10, 5, 4)
    assert (summary.truncated_rows, summary.tokens_cut, summary.trained_cut) == (1, 5, 3)
    assert (summary.ended_rows, summary.straddling) == (2, 1)
    assert summary.trained_share == 0.5
    assert summary.lines() == [
        "3 rows, 10 tokens, 5 trained (50.0%), longest 4",
        "end-of-turn token trained in 2 of 3 rows",
        "1 row truncated (33.3%): 5 tokens cut, 3 of them trained",
        "not trained: 1 token with both the end of a prompt and the beginning of what is trained",
    ]


def test_scattered_tokens_are_no_answers() -> None:
    """An answer of one token with its end is not scattered. Mutations: count trained tokens for
    pieces; let a piece reach from one sample into the next."""
    masks = {"answers": "0011 0011", "lots": "0101 0010", "both": "0111 0101"}
    found = {}
    for name, mask in masks.items():
        flags = [np.array([c == "1" for c in part]) for part in mask.split()]
        ids = np.arange(4, dtype=np.int32)
        samples = [Sample(row=i, input_ids=ids, trained=f) for i, f in enumerate(flags, 1)]
        summary = summarize(samples)
        found[name] = (summary.pieces, summary.scattered, summary.longest_row)
    assert found == {"answers": (2, False, 1), "lots": (3, True, 1), "both": (3, False, 1)}


def test_shown_pieces_are_the_whole_text(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("chatml")
    messages = (Message("user", "Grüße 🙂"), Message("assistant", "你好"))
    sample = Encoder(tokenizer, DataConfig(path="rows")).encode(Example(row=1, messages=messages))
    pieces = show_sample(sample, tokenizer)
    text = "<|im_start|>user\nGrüße 🙂<|im_end|>\n<|im_start|>assistant\n你好<|im_end|>\n"
    assert "".join(piece for piece, _ in pieces) == text
    assert [piece for piece, trained in pieces if trained] == ["你好<|im_end|>"]
