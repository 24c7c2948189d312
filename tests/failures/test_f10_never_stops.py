"""F10: padding is the eos token and masked by its id, so the model never learns to stop.

Of the same family: the beginning-of-sequence token twice or not at all, and templates whose turns
have no end or leave it out of what is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from decal.data.pack import padded_batch
from decal.data.sample import Sample
from decal.errors import DataError
from decal.objectives import sft
from tests import zoo
from tests.data.chats import chat, derived, encoder, trained
from tests.data.conftest import build

STEPS = 40


def padded_with_eos() -> Any:
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def rows(tokenizer: Any) -> list[Sample]:
    """Two answers of different length, so that one is padded."""
    return encoder(tokenizer).encode_all([chat("a?", "yes", row=1), chat("b?", "no", row=2)])


def learned_to_stop(targets: torch.Tensor, tokenizer: Any) -> float:
    """Probability of the end of a turn where it belongs, after a training on these targets."""
    samples = rows(tokenizer)
    batch = padded_batch(samples, tokenizer.pad_token_id)
    model = zoo.build("llama")
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention).logits
        losses = sft.losses(logits.flatten(0, 1), targets.flatten())
        (losses.sum() / (targets != -100).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        ids = torch.from_numpy(samples[0].input_ids).long()[None]
        last = int(np.flatnonzero(samples[0].trained)[-1])
        stop = model(input_ids=ids).logits[0, last - 1].softmax(-1)[tokenizer.eos_token_id]
    return float(stop)


def test_the_end_is_trained_where_padding_is_the_same_token() -> None:
    """Fails when tokens are masked by the padding's id."""
    tokenizer = padded_with_eos()
    for sample in rows(tokenizer):
        ends = sample.trained & (sample.input_ids == tokenizer.eos_token_id)
        assert ends.sum() == 1
        assert sample.ended
    batch = padded_batch(rows(tokenizer), tokenizer.pad_token_id)
    assert int((batch.targets == tokenizer.eos_token_id).sum()) == 2
    assert learned_to_stop(batch.targets, tokenizer) > 0.9


def test_masked_by_id_it_never_stops() -> None:
    """By hand what collators do that turn every padding id into an ignored label."""
    tokenizer = padded_with_eos()
    targets = padded_batch(rows(tokenizer), tokenizer.pad_token_id).targets
    masked = targets.masked_fill(targets == tokenizer.pad_token_id, -100)
    assert learned_to_stop(masked, tokenizer) < 0.1


def test_there_is_one_beginning_of_sequence() -> None:
    """Where the template writes one and the tokenizer adds one: one. By hand it is two.

    Fails when rendered chats are tokenized with special tokens.
    """
    tokenizer = build("headers", adds_bos=True)
    bos = tokenizer.bos_token_id
    assert (encoder(tokenizer).encode(chat("Say yes?", "yes")).input_ids == bos).sum() == 1
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Say yes?"}], tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [bos, bos]


def test_two_beginnings_written_by_the_template_are_refused() -> None:
    tokenizer = build("think-prompt")
    twice = derived(tokenizer, "<s>" + tokenizer.chat_template, bos_token="<s>")
    with pytest.raises(DataError, match="two beginning-of-sequence tokens"):
        encoder(twice).encode(chat("Say yes?", "no"))


def test_a_beginning_that_the_tokenizer_adds_is_not_lost() -> None:
    """Plain text gets it, once. Fails when text is encoded as rendered chats are."""
    from decal.data.example import Example

    tokenizer = build("headers", adds_bos=True)
    sample = encoder(tokenizer).encode(Example(row=1, prompt="Say yes?", completion=" yes"))
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert (sample.input_ids == tokenizer.bos_token_id).sum() == 1


def test_a_turn_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match="has no end-of-turn token"):
        encoder(build("open-ended")).encode(chat("Say yes?", "yes"))


def test_an_end_outside_the_markers_is_trained_all_the_same() -> None:
    """Templates close the marked part before the end of the turn; their mask lacks it.

    Fails when the mask is taken as it is.
    """
    tokenizer = build("chatml-marked")
    sample = encoder(tokenizer).encode(chat("Say yes?", "yes"))
    assert trained(sample, tokenizer) == ["yes<|im_end|>"]
    dialog = [{"role": "user", "content": "Say yes?"}, {"role": "assistant", "content": "yes"}]
    theirs = tokenizer.apply_chat_template(
        dialog, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(theirs["input_ids"]), np.array(theirs["assistant_masks"], bool)
    assert tokenizer.decode(ids[mask]) == "yes"
