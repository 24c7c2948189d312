"""Prompts to completions, texts to labels: alone or in batches, the answers are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from decal import demo
from decal.errors import ConfigError, DataError
from decal.model.hf import load_tokenizer
from decal.verbs.text import (
    Chat,
    Completion,
    Sampling,
    classify,
    complete,
    complete_one,
    encode_prompt,
    exact_match,
)

TEXTS = ["The lamp is broken.", "Hi", "My invoice of last week is wrong, please correct it now."]
LABELS = {0: "lamp", 1: "invoice", 2: "greeting"}


class Letters:
    """A tokenizer of letters whose eos never comes by itself."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = None, 28, None, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 28 for letter in text]}

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture
def model() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=12, n_layer=1, n_head=3, vocab_size=29, n_positions=16, bos_token_id=0,
        eos_token_id=28,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = None
    return model


def one(model: GPT2LMHeadModel, prompt: str, **settings: Any) -> Completion:
    return complete_one(model, Letters(), prompt, Sampling(**settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(demo.base_path()))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classes_do_not_depend_on_the_batch(kind: str, tokenizer: Any) -> None:
    """Fails when padding is pooled or attended to, or answers come back in sorted order."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 20}
    sizes |= {"intermediate_size": 24, "vocab_size": 2048, "pad_token_id": 3}
    if kind == "bert":
        model: Any = BertForSequenceClassification(BertConfig(**sizes, id2label=LABELS))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, id2label=LABELS))
    torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "score" in n
                               or "classifier.weight" in n))  # fmt: skip
    seen: list[tuple[int, int]] = []
    found = classify(
        model,
        tokenizer,
        TEXTS,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    model.eval()
    for text, (label, probability) in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        wanted = torch.softmax(model(input_ids=ids).logits[0].detach(), 0)
        assert label == LABELS[int(wanted.argmax())]
        assert probability == pytest.approx(float(wanted.max()), rel=1e-5)
    assert seen == [(2, 3), (3, 3)]
    assert len({probability for _, probability in found}) == 3


def test_a_prompt_longer_than_the_context_is_refused(model: GPT2LMHeadModel) -> None:
    """Fails when the model is asked beyond its positions, or the wrong prompt is named."""
    with pytest.raises(DataError, match="prompt is too long: 17 tokens, the model's context hold"):
        one(model, "a" * 17)
    with pytest.raises(DataError, match=r"1 of 2 prompts are too long.*\n  prompt 2 has 16 tokens"):
        complete(model, Letters(), ["a", "b" * 16])  # type: ignore[arg-type]


def test_a_completion_ends_with_the_context(model: GPT2LMHeadModel) -> None:
    """Fails when the room left is not counted, or a cut answer is called finished."""
    made = one(model, "abc", max_new_tokens=100)
    assert (made.prompt_tokens, made.new_tokens, made.finished) == (3, 13, False)
    assert one(model, "abc", max_new_tokens=5).new_tokens == 5


def test_a_completion_ends_with_a_stop_token(model: GPT2LMHeadModel) -> None:
    """Fails when a row that ended early is padded into its text, or is called unfinished."""
    first = one(model, "abc", max_new_tokens=3).split()
    model.generation_config.eos_token_id = int(first[0])
    made = one(model, "abc", max_new_tokens=9)
    assert (made, made.new_tokens, made.finished) == (first[0], 1, True)
    assert complete(model, Letters(), ["abc"], max_new_tokens=9) == [first[0]]  # type: ignore[arg-type]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_narrow_sampling_is_greedy(model: GPT2LMHeadModel, narrow: dict[str, Any]) -> None:
    """Fails when top_k or top_p is dropped: a temperature of 50 chooses at random."""
    greedy = one(model, "abc", max_new_tokens=9)
    assert one(model, "abc", max_new_tokens=9, temperature=50.0, **narrow) == greedy
    assert one(model, "abc", max_new_tokens=9, temperature=50.0) != greedy


def test_sampling_is_of_its_own_generator(model: GPT2LMHeadModel) -> None:
    """Fails when the caller's random numbers decide, or go on from another place."""
    before = torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        texts.append(one(model, "abc", max_new_tokens=9, temperature=5.0, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]


def test_sampling_takes_all_tokens_by_default(model: GPT2LMHeadModel) -> None:
    """Fails when transformers' own top_k of 50, or the model's, narrows the choice."""
    model.generation_config.top_k = 1
    texts = {one(model, "abc", max_new_tokens=4, temperature=50.0, seed=s) for s in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ({"top_p": 0.0}, "top_p: expected a number above 0"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"top_k": 0}, "top_k: expected"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"temperature": -0.1}, "temperature: expected"),
        ({"temprature": 0.1}, "temprature: unknown key, did you mean `temperature`"),
    ],
)
def test_wrong_sampling_is_refused(wrong: dict[str, Any], shown: str) -> None:
    """Fails when a value out of range reaches transformers, or a misspelt one is dropped."""
    with pytest.raises(ConfigError, match=shown):
        Sampling(**wrong)


def test_chats_are_rendered_as_in_training(tokenizer: Any) -> None:
    """Fails when a base without a template refuses chats that training takes."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    own = encode_prompt(tokenizer, turns)
    assert own == encode_prompt(tokenizer, Chat.of(turns))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        plain = tokenizer.decode(encode_prompt(tokenizer, turns))
    finally:
        tokenizer.chat_template = template
    assert plain.endswith("### User:\nhi\n\n### Assistant:\n")


def test_a_template_that_refuses_is_named(tokenizer: Any) -> None:
    """Fails when jinja's error leaves as it is."""
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    try:
        with pytest.raises(DataError, match="refuses the turns `system, user`: System role not"):
            encode_prompt(tokenizer, [{"role": "system", "content": "s"}, {"role": "user"}])
    finally:
        tokenizer.chat_template = template


def test_exact_match_ignores_outer_spaces_only() -> None:
    """Fails when case is ignored, or nothing expected counts as all right."""
    assert exact_match([" a ", "B", "c d"], ["a", "b", "c  d"]) == pytest.approx(1 / 3)
    assert exact_match([], []) != exact_match([], [])
