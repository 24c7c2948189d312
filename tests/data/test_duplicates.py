"""Rows with the same text, whatever their layout and whitespace."""

from __future__ import annotations

from decal.data.duplicates import Duplicates, repeated, shared
from decal.data.example import Example, Message


def text(row: int, text: str, label: str | None = None) -> Example:
    return Example(row=row, text=text, label=label)


def pair(row: int, prompt: str, completion: str) -> Example:
    return Example(row=row, prompt=prompt, completion=completion)


def chat(row: int, *turns: tuple[str, str], **more: object) -> Example:
    messages = tuple(Message(role, content, more) for role, content in turns)
    return Example(row=row, messages=messages)


def test_whitespace_makes_no_difference_and_words_do() -> None:
    """Mutations: compare raw texts; strip only the ends; lower the case."""
    rows = [text(3, "a  b\n"), text(5, "a c"), text(9, " a b"), text(11, "A b"), text(12, "a\tb")]
    assert repeated(rows) == Duplicates(count=2, first=(9, 3))


def test_parts_are_not_run_together() -> None:
    """Mutation: hash prompt and completion as one text."""
    rows = [pair(1, "a b", "c"), pair(2, "a", "b c"), pair(3, "a b c", "")]
    assert repeated(rows) == Duplicates()


def test_roles_and_calls_are_part_of_a_chat() -> None:
    """Mutations: hash contents only; leave out what a message has besides."""
    said = ("user", "yes")
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [chat(1, said), chat(2, ("assistant", "yes")), chat(3, said, **call), chat(4, said)]
    assert repeated(rows) == Duplicates(count=1, first=(4, 1))


def test_tools_are_part_of_a_chat() -> None:
    """Mutation: leave out the tools."""
    plain = chat(1, ("user", "yes"))
    tools = Example(row=2, messages=plain.messages, tools=({"name": "f"},))
    assert repeated([plain, tools]) == Duplicates()


def test_evaluation_rows_that_are_training_rows() -> None:
    """A row that only evaluation has twice is no leak. Mutations: the pair the other way round;
    take evaluation rows for training rows."""
    train = [text(1, "a"), text(2, "b"), text(3, "b")]
    evaluated = [text(7, "c"), text(8, "c"), text(9, "b"), text(10, "b ")]
    assert shared(evaluated, train) == Duplicates(count=2, first=(9, 2))


def test_the_same_text_with_another_label() -> None:
    """Mutations: make the label part of the text; count agreeing labels."""
    rows = [text(1, "a", "x"), text(2, "a", "y"), text(3, "a", "x")]
    assert repeated(rows) == Duplicates(count=2, first=(2, 1), contrary=1)
