"""What columns mean: every layout, what is found by itself, and how made columns weigh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.config import DataConfig
from decal.data.example import Message
from decal.data.source import Rows, read_rows
from decal.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
HI, HO = Message("user", "Hi"), Message("assistant", "Ho")
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"id": 7}'}}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(*rows: Any, **settings: Any) -> Rows:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(DataConfig(path=path, **settings))

    return read


def test_sharegpt(read: Any) -> None:
    """Mutation: call every role that is not human the assistant."""
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"id": 7}}'},
        {"from": "observation", "value": "a parcel"},
        {"from": "gpt", "value": "Ho", "weight": 1},
    ]
    rows = read({"conversations": turns, "system": "Be brief.", "id": 3})
    assert (rows.layout, rows.ignored) == ("sharegpt", ("id",))
    call = {"type": "function", "function": {"name": "find", "arguments": {"id": 7}}}
    assert rows.examples[0].messages == (
        Message("system", "Be brief."),
        HI,
        Message("assistant", "", {"tool_calls": [call]}),
        Message("tool", "a parcel"),
        HO,
    )


def test_sharegpt_with_roles_and_broken_turns(read: Any) -> None:
    assert read({"conversations": [USER, ANSWER]}).examples[0].messages == (HI, HO)
    bad = {"conversations": [{"from": "humans", "value": "x"}]}
    with pytest.raises(DataError, match='message 1 has the role "humans"'):
        read(bad)
    with pytest.raises(DataError, match=r"message 1 \(function_call\) is not valid JSON"):
        read({"conversations": [{"from": "function_call", "value": "find(7)"}]})


def test_alpaca(read: Any) -> None:
    """The `text` column that goes with it is not used. Mutation: leave a blank line behind an
    instruction without input."""
    more = {"instruction": "Add", "input": "1 2", "output": "3", "text": "…"}
    rows = read(more, {"instruction": "Hi", "input": "", "output": "Ho"})
    assert (rows.layout, rows.ignored) == ("alpaca", ("text",))
    assert rows.examples[0].messages == (Message("user", "Add\n\n1 2"), Message("assistant", "3"))
    assert rows.examples[1].messages == (HI, HO)


def test_prompt_and_completion_as_chats(read: Any) -> None:
    """Only the completion is trained. Mutation: train the answers in the prompt too."""
    rows = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert rows.layout == "prompt-completion"
    assert [m.trained for m in rows.examples[0].messages] == [False, False, False, True]
    with pytest.raises(DataError, match="`prompt` is a list, not text"):
        read({"prompt": [USER], "completion": "Ho"})


def test_text_and_labels(read: Any) -> None:
    assert read({"text": "a"}).layout == "text"
    rows = read({"text": "a", "label": 3}, {"text": "b", "label": " x "}, {"text": "c", "label": 0})
    assert rows.layout == "labels"
    assert [example.label for example in rows.examples] == ["3", "x", "0"]
    assert read({"text": "a", "label": 3}, layout="text").ignored == ("label",)
    with pytest.raises(DataError, match=r"`label` is 0\.5, which names no class"):
        read({"text": "a", "label": 0.5})


def test_tool_calls_weights_and_parts(read: Any) -> None:
    """What a message says besides its text is kept for the template."""
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    asked = {"role": "user", "content": parts, "name": "Ann"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0}
    given = {"role": "tool", "content": "a parcel", "tool_call_id": "c1"}
    thought = {**ANSWER, "reasoning_content": "hm"}
    tools = json.dumps([{"type": "function", "function": {"name": "find"}}])
    example = read({"messages": [asked, called, given, thought], "tools": tools}).examples[0]
    assert example.tools == ({"type": "function", "function": {"name": "find"}},)
    assert example.messages[0] == Message("user", "Hi", {"name": "Ann"})
    assert [m.trained for m in example.messages] == [True, False, True, True]
    decoded = {"type": "function", "function": {"name": "find", "arguments": {"id": 7}}}
    assert example.messages[1].as_dict() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [decoded],
    }
    assert example.messages[1].as_dict(decode_arguments=False)["tool_calls"] == [CALL]
    assert example.messages[2].extra == {"tool_call_id": "c1"}
    assert example.messages[3].extra == {"reasoning_content": "hm"}


def test_system_setting_is_for_chats_without_one(read: Any) -> None:
    """Mutation: put it in front of every chat."""
    own = {"role": "system", "content": "Own."}
    rows = read({"messages": [USER, ANSWER]}, {"messages": [own, USER, ANSWER]}, system="Be brief.")
    assert [example.messages[0].content for example in rows.examples] == ["Be brief.", "Own."]
    with pytest.raises(DataError, match="is for chats, and the rows are text"):
        read({"text": "a"}, system="Be brief.")


def test_layout_that_is_asked_for_is_required(read: Any) -> None:
    row = {"messages": [USER, ANSWER], "prompt": "a", "completion": "b"}
    assert read(row, layout="prompt-completion").layout == "prompt-completion"
    with pytest.raises(DataError, match="has not the layout alpaca: row 1 has `instructions`") as e:
        read({"instructions": "a", "output": "b"}, layout="alpaca")
    assert e.value.hint is not None
    assert "data.columns: {instruction: '{instructions}'}" in e.value.hint


def test_made_columns_decide(read: Any) -> None:
    """A row that has the made layout and another. Mutation: precedence alone."""
    row = {"text": "a", "label": 1, "messages": [USER, ANSWER]}
    made = {"prompt": "Sort: {text}", "completion": " {label}"}
    rows = read(row, columns=made)
    assert rows.layout == "prompt-completion"
    assert (rows.examples[0].prompt, rows.examples[0].completion) == ("Sort: a", " 1")
    assert rows.ignored == ("messages",)
    rows = read({"sentence": "a", "label": 1}, columns={"text": "{sentence}"})
    assert (rows.layout, rows.ignored) == ("labels", ())
    assert read({"chat": [USER, ANSWER]}, columns={"messages": "{chat}"}).layout == "messages"


def test_null_in_a_made_column_is_a_row_error(read: Any) -> None:
    with pytest.raises(DataError, match="row 2: `b` is null"):
        read({"b": "x"}, {"b": None}, columns={"text": "{b}"})
