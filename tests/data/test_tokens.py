"""Slow tokenizers: what is trained is found without offsets, or the row is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AddedToken, PreTrainedTokenizer

from decal.data.example import Example
from decal.errors import DataError
from tests.data.chats import Make, chat, derived, encoder, trained


class Letters(PreTrainedTokenizer):
    """One token for each letter, and one for each pair in `pairs`, found from the left."""

    def __init__(self, pairs: tuple[str, ...] = (), **options: Any):
        self._names = ["<unk>", *(chr(i) for i in range(9, 255)), *pairs]
        self._ids = {name: i for i, name in enumerate(self._names)}
        self._pairs = pairs
        super().__init__(unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens = []
        while text:
            size = 2 if text[:2] in self._pairs else 1
            tokens.append(text[:size])
            text = text[size:]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def letters(template: str | None, *pairs: str) -> Any:
    tokenizer = Letters(
        pairs,
        eos_token=AddedToken("<|im_end|>", special=True),
        additional_special_tokens=[AddedToken("<|im_start|>", special=True)],
    )
    tokenizer.chat_template = template
    assert not tokenizer.is_fast
    return tokenizer


def test_chats_are_found_without_offsets(make_tokenizer: Make) -> None:
    """The same characters are trained as with a fast tokenizer. Mutations: take the tokens of the
    text from the boundary on; leave out the end-of-turn token."""
    template = make_tokenizer("chatml").chat_template
    tokenizer = letters(template, "es", "no")
    row = chat("Say yes?", "yes, no", "And?", "no\n", system="Be brief.")
    sample = encoder(tokenizer).encode(row)
    assert trained(sample, tokenizer) == ["yes, no<|im_end|>", "no\n<|im_end|>"]
    assert sample.ended
    assert sample.straddling == 0
    text = tokenizer.decode(sample.input_ids.tolist())
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay yes?")


def test_markers_are_not_needed(make_tokenizer: Make) -> None:
    """transformers cannot place them without offsets, prefix rendering can do without."""
    tokenizer = letters(make_tokenizer("chatml-marked").chat_template)
    sample = encoder(tokenizer).encode(chat("a", "yes"))
    assert trained(sample, tokenizer) == ["yes<|im_end|>"]


def test_token_across_the_boundary_is_refused(make_tokenizer: Make) -> None:
    r"""`\ny` is one token. Mutation: compare lengths only."""
    tokenizer = letters(make_tokenizer("chatml").chat_template, "\ny")
    assert trained(encoder(tokenizer).encode(chat("a", "no")), tokenizer) == ["no<|im_end|>"]
    with pytest.raises(DataError, match="row 6: the tokens of the text before 'yes") as caught:
        encoder(tokenizer).encode(chat("a", "yes", row=6))
    assert "tokenizer.json" in str(caught.value.hint)


def test_plain_text(make_tokenizer: Make) -> None:
    tokenizer = letters(None, ": ")
    sample = encoder(tokenizer).encode(Example(row=1, prompt="a:", completion="yes"))
    assert trained(sample, tokenizer) == ["yes<|im_end|>"]
    with pytest.raises(DataError, match="the tokens of the text before ' yes'"):
        encoder(tokenizer).encode(Example(row=1, prompt="a:", completion=" yes"))
    sample = encoder(tokenizer).encode(Example(row=1, text="a: b"))
    assert sample.trained.sum() == len(sample) - 1


def test_default_template(make_tokenizer: Make) -> None:
    tokenizer = letters(None)
    encode = encoder(tokenizer)
    assert trained(encode.encode(chat("a", "yes")), tokenizer) == ["yes<|im_end|>"]
    assert encode.template_used is not None


def test_fast_and_slow_agree_on_characters(make_tokenizer: Make) -> None:
    fast = make_tokenizer("headers")
    slow = letters(fast.chat_template)
    slow.add_special_tokens({"additional_special_tokens": ["<|begin_of_text|>", "<|eot_id|>"]})
    row = chat("Hi", "yes no", "b", "no")
    expected = trained(encoder(fast).encode(row), derived(fast, fast.chat_template))
    assert trained(encoder(slow).encode(row), slow) == expected
