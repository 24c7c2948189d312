"""F11: chat templates without generation markers give assistant masks of zeros, and train nothing.

No template of the large model families has these markers in its own files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from decal.data import spans
from decal.errors import DataError
from tests.data.chats import chat, derived, encoder, trained
from tests.data.conftest import CHATML, TEMPLATES, build

DIALOG = ("Say yes?", "yes", "And now?", "no")
UNMARKED = [name for name, (text, *_) in TEMPLATES.items() if "generation %}" not in text]
ROW = chat("Say yes?", "not yet", row=7)
REVERSED = (
    "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{{ messages[1].content | length }}"
)


def mask(tokenizer: Any) -> np.ndarray:
    """What transformers says the assistant's tokens are."""
    roles = ("user", "assistant") * 2
    dialog = [{"role": r, "content": c} for r, c in zip(roles, DIALOG, strict=True)]
    encoded = tokenizer.apply_chat_template(
        dialog, return_dict=True, return_assistant_tokens_mask=True
    )
    return np.array(encoded["assistant_masks"])


@pytest.mark.parametrize("name", [name for name in UNMARKED if name != "open-ended"])
def test_answers_are_found_where_the_mask_is_zero(name: str) -> None:
    """By hand: not one token. With decal: both answers with their ends, and no word of the user's.

    Fails when spans come from the mask alone, or a span begins at the wrong turn.
    """
    tokenizer = build(name)
    assert mask(tokenizer).sum() == 0
    found = trained(encoder(tokenizer).encode(chat(*DIALOG)), tokenizer)
    end = tokenizer.eos_token
    assert len(found) == 2
    for answer, text in zip(("yes", "no"), found, strict=True):
        assert text.strip().endswith(end)
        assert text.removesuffix(end).split("</think>")[-1].strip() == answer


def test_a_turn_that_cannot_be_located_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row and the turn are named. The guard away: the user's turn is trained too.

    The template turns the chat around and counts letters: neither a prefix nor a stand-in for the
    answer leaves the rest as it is.
    """
    tokenizer = derived(build("chatml"), REVERSED)
    with pytest.raises(DataError, match=r"row 7: message 2 \(assistant\) cannot be told"):
        encoder(tokenizer).encode(ROW)

    def anywhere(row: spans.Rendered, *_: Any) -> spans.Span:
        return 0, row.marks[-1][1]

    monkeypatch.setattr(spans, "_substituted_span", anywhere)
    sample = encoder(tokenizer).encode(ROW)
    assert "Say yes?" in trained(sample, tokenizer)[0]


def test_markers_that_miss_a_turn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked in the first turn alone: one of two answers would be trained, in silence."""
    marked = "{% if loop.index == 2 %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    template = CHATML.replace("{{ m.content }}", marked + "{{ m.content }}{% endif %}")
    tokenizer = derived(build("chatml"), template)
    with pytest.raises(DataError, match="marks 1 generated parts, the row has 2"):
        encoder(tokenizer).encode(chat(*DIALOG))
    ids = encoder(build("chatml")).encode(chat(*DIALOG)).input_ids
    assert tokenizer.decode(ids[mask(tokenizer).astype(bool)]) == "yes"
