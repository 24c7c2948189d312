"""`generate`: what is streamed is what is returned, and what is refused before loading."""

from __future__ import annotations

import pytest

from decal import demo
from decal.errors import AdapterError, DecalError
from decal.verbs.generate import generate
from decal.verbs.train import RunResult

PROMPT = "Route this ticket:\nThe app cannot find my lamp."


def test_the_stream_is_the_answer(finished: RunResult) -> None:
    """Mutation: stream the prompt too, or the special tokens."""
    pieces: list[str] = []
    text = generate(str(finished.run), PROMPT, max_new_tokens=6, stream=pieces.append)
    assert "".join(pieces).strip() == text
    assert "Route this" not in text
    assert "<|im_end|>" not in text
    assert generate(str(finished.weights), PROMPT, max_new_tokens=6) == text


def test_sampling_follows_the_seed() -> None:
    """Mutation: ignore the seed, or the temperature."""
    answers = [
        generate(str(demo.base_path()), PROMPT, max_new_tokens=8, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_wrong_questions_are_refused_before_loading(finished: RunResult) -> None:
    with pytest.raises(DecalError, match="the prompt is empty"):
        generate("nowhere", "")
    with pytest.raises(DecalError, match="temperature: expected a number of at least 0"):
        generate("nowhere", "hi", temperature=-1)
    with pytest.raises(AdapterError, match="a second one cannot be put on it"):
        generate(str(finished.run), "hi", adapter=str(finished.run))
