"""Where the assistant speaks in a rendered chat: character spans, found strictly or not at all.

This file works on text only: it knows neither tokens nor how a template is run (`render` does
that).

A chat template turns messages into one text, and nothing in that text says who wrote which part.
What is trained is, for every assistant turn, everything after the generation prompt up to and
including the end-of-turn token. A span is looked for in this order:

1. Generation markers (`{% generation %}`), where the template has them: the caller knows the runs
   of marked characters; one run per assistant turn, or it is an error.
2. Prefix rendering. The messages before the turn are rendered with the generation prompt. If that
   is a true prefix of this row's text, the turn begins where it ends: precisely where a model
   begins to speak at inference. Nothing is assumed: templates that strip earlier thinking, or that
   treat the last turn differently, fail the comparison and go on to 3.
3. Substitution. The same chat is rendered with a sentinel instead of what the turn says. If the
   two texts are equal before the sentinel and equal behind it, what lies between is the turn, and
   it must be the turn's content. Spaces in front of it belong to it, because tokenizers put a space
   and a word into one token; so does what the generation prompt leaves to the model, where it is a
   prefix.

Otherwise the row is refused. The end of a turn is the first *mark* (an added or special token in
the text) that follows the content after white space only. Where a template wraps the content (an
empty thinking block, channels), it is the last mark of the region that prefix rendering of the
messages up to and including the turn proves to be the turn's own. A turn without such a token
would teach the model never to stop, and is refused too.

Rejected: looking for role headers such as `<|im_start|>assistant` (one regular expression per model
family, and a user who writes the header into a message shifts every span), looking for the turn's
content (short answers occur everywhere), and comparing the tokens of prefixes (tokens merge across
the boundary).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from decal.data.example import Message
from decal.data.messages import tool_name
from decal.data.problems import RowError
from decal.data.tokens import Span

Render = Callable[[Sequence[Message], bool], "str | None"]
"""(messages, add_generation_prompt) -> text, or None where the template refuses them."""

SENTINEL = "\U0010fffd\U0010fffe\U0010fffd"
"""Stands for a turn's words: text that no template looks for and no row holds."""

NO_END = "no end-of-turn token"
NOT_FOUND = "an assistant turn that cannot be located"
REWRITTEN = "a message that the chat template drops or rewrites"

HINT_NO_END = (
    "the chat template must close assistant turns with a special token such as the tokenizer's "
    "eos token, or the model never learns to stop"
)
HINT_NOT_FOUND = (
    "set `data.turns: last`, split the row so that the turn is its last message, or add "
    "{% generation %} … {% endgeneration %} around the assistant's part of the chat template"
)
HINT_REWRITTEN = (
    "change the message so that the template keeps it whole, split the row, or train only the last "
    "turn with `data.turns: last`"
)
THINKING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what the model thought before its content."""


@dataclass(frozen=True)
class Rendered:
    """One row as text, with what is known about it."""

    text: str
    messages: tuple[Message, ...]
    marks: Sequence[Span]
    """Added and special tokens in the text, in order."""
    runs: Sequence[Span] | None
    """Runs of characters inside generation markers; None where the template has no markers."""


def find_spans(row: Rendered, render: Render, turns: Sequence[int]) -> list[Span]:
    """One span for each of `turns`, in order; each ends behind the turn's end-of-turn token.

    Args:
        turns: the assistant's turns to train, as ascending indices into the messages. The others
            are prompt, and need not be found.

    Raises:
        RowError: a turn that cannot be located beyond doubt, has no end-of-turn token, or has
            lost text in rendering; named by its number among the messages, from 1.
    """
    _require_kept(row)
    if row.runs is not None:
        return _marked_spans(row, turns, row.runs)
    spans: list[Span] = []
    floor = 0
    for i in turns:
        spans.append(_turn_span(row, i, floor, render))
        floor = spans[-1][1]
    return spans


def _require_kept(row: Rendered) -> None:
    """Every prompt message must occur in the text: templates skip roles they do not know."""
    text = _squeeze(row.text)
    for i, message in enumerate(row.messages):
        if message.role != "assistant" and not _occurs(message.content, text):
            raise RowError(
                REWRITTEN,
                f"message {i + 1} ({message.role}) is not in the rendered chat: "
                f"{_quote(message.content)}",
                hint=HINT_REWRITTEN,
            )


def _marked_spans(row: Rendered, turns: Sequence[int], runs: Sequence[Span]) -> list[Span]:
    speaking = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    if len(runs) != len(speaking):
        raise RowError(
            "generation markers that do not match the turns",
            f"the chat template marks {len(runs)} generated parts, the row has {len(speaking)} "
            "assistant turns",
            hint="put {% generation %} … {% endgeneration %} around every assistant turn",
        )
    found = dict(zip(speaking, runs, strict=True))
    return [_marked_span(row, i, found[i]) for i in turns]


def _marked_span(row: Rendered, i: int, run: Span) -> Span:
    start, end = run
    _require_content(row, i, run)
    content = row.messages[i].content.strip()
    found = -1 if _says_more(row.messages[i]) else row.text.find(content, start, end)
    close = _mark_after(row, found + len(content)) if found >= 0 else None
    close = close or _last_mark(row, run) or _mark_after(row, end)
    if close is None:
        raise _no_end(i, row.text[start:end])
    return start, close


def _turn_span(row: Rendered, i: int, floor: int, render: Render) -> Span:
    prompt = render(row.messages[:i], True)
    content = row.messages[i].content.strip()
    start = None
    if prompt is not None and len(prompt) >= floor and row.text.startswith(prompt):
        start = len(prompt)
        spoken = _skip_space(row.text, start)
        if row.text.startswith(content, spoken) and not _says_more(row.messages[i]):
            close = _mark_after(row, spoken + len(content))
            if close is not None:
                return start, close
        through = row.text if i + 1 == len(row.messages) else render(row.messages[: i + 1], False)
        if through is not None and row.text.startswith(through):
            region = (start, len(through))
            _require_content(row, i, region)
            close = _last_mark(row, region)
            if close is None:
                raise _no_end(i, row.text[start : len(through)])
            return start, close
    return _substituted_span(row, i, (floor, start), render)


def _substituted_span(row: Rendered, i: int, begin: tuple[int, int | None], render: Render) -> Span:
    """The span between what stays the same when the turn says something else.

    Args:
        begin: end of the turn before, and of the generation prompt if it is a prefix of the text.
    """
    floor, prompt_end = begin
    stand_in = (*row.messages[:i], Message("assistant", SENTINEL), *row.messages[i + 1 :])
    before, found, behind = (render(stand_in, False) or "").partition(SENTINEL)
    end = len(row.text) - len(behind)
    same = row.text.startswith(before) and row.text.endswith(behind)
    if not found or SENTINEL in behind or not same or not floor <= len(before) <= end:
        raise RowError(
            NOT_FOUND,
            f"message {i + 1} (assistant) cannot be told from the rest of the rendered chat: "
            f"{_quote(row.messages[i].content)}",
            hint=HINT_NOT_FOUND,
        )
    _require_content(row, i, (len(before), end), whole=not _says_more(row.messages[i]))
    close = _mark_after(row, end)
    if close is None:
        raise _no_end(i, row.text[len(before) : end])
    start = len(row.text[: len(before)].rstrip(" "))
    return start if prompt_end is None else min(start, prompt_end), close


def _require_content(row: Rendered, i: int, region: Span, *, whole: bool = False) -> None:
    """The region must hold what the turn says, white space apart: templates may re-indent it.

    Args:
        whole: and nothing but the content.
    """
    rendered = _squeeze(row.text[slice(*region)])
    for said in _said(row.messages[i]):
        if not _occurs(said, rendered) or (whole and rendered != _squeeze(said)):
            raise RowError(
                REWRITTEN,
                f"message {i + 1} (assistant) is rendered as {_quote(row.text[slice(*region)])}, "
                f"the row has {_quote(said)}",
                hint=HINT_REWRITTEN,
            )


def _says_more(message: Message) -> bool:
    """Whether the turn holds thinking or tool calls besides its content."""
    return any(key in message.extra for key in ("tool_calls", *THINKING))


def _said(message: Message) -> Iterator[str]:
    """All texts that must be found in the rendered turn: content, thinking, and calls."""
    yield message.content
    for key in THINKING:
        if isinstance(message.extra.get(key), str):
            yield message.extra[key]
    for call in message.as_dict().get("tool_calls", ()):
        yield tool_name(call) or ""
        yield from _texts(call.get("function", call).get("arguments"))


def _texts(value: object) -> Iterator[str]:
    """The texts inside a decoded JSON value, keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _occurs(said: str, squeezed: str) -> bool:
    """Whether a text occurs as it is, or as JSON has it, in a text without white space."""
    ways = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
    return any(_squeeze(way) in squeezed for way in ways)


def _mark_after(row: Rendered, position: int) -> int | None:
    """End of the first mark behind `position`, if only white space lies between."""
    for start, end in row.marks:
        if start >= position:
            return None if row.text[position:start].strip() else end
    return None


def _last_mark(row: Rendered, region: Span) -> int | None:
    """End of the last mark in the region, if only white space follows it there."""
    inside = [end for start, end in row.marks if start >= region[0] and end <= region[1]]
    if not inside or row.text[inside[-1] : region[1]].strip():
        return None
    return inside[-1]


def _no_end(i: int, turn: str) -> RowError:
    return RowError(
        NO_END,
        f"message {i + 1} (assistant) has no end-of-turn token behind {_quote(turn, tail=True)}",
        hint=HINT_NO_END,
    )


def _skip_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _quote(text: str, *, tail: bool = False) -> str:
    limit = 40
    if len(text) > limit:
        text = f"…{text[-limit:]}" if tail else f"{text[:limit]}…"
    return repr(text)
