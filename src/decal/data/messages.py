"""Lists of messages as rows hold them -> Message, strictly. Knows no files and no templates.

What a message says besides its text (tool calls, thinking, a name) goes to the chat template as it
is; keys that change what is trained and that are not known are refused, all others are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from decal.data.example import ROLES, Message
from decal.data.problems import RowError
from decal.errors import nearest
from decal.untrusted import parse_json

TEMPLATE_KEYS = (
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
)
"""Keys that chat templates read."""

REFUSED_KEYS = {
    "function_call": "write the call into `tool_calls`",
    "train": "write `weight: 0` for a turn that is not trained",
    "training": "write `weight: 0` for a turn that is not trained",
}
"""Keys that change what should be trained: dropping them would be silently wrong."""


def parse_messages(turns: object, column: str, ignored: set[str]) -> tuple[Message, ...]:
    """The messages in `column` of a row; names of keys that are not used are added to `ignored`.

    Raises:
        RowError: not a list of messages with a known role and text.
    """
    if not isinstance(turns, list | tuple):
        raise RowError(f"wrong type of `{column}`", f"`{column}` is {kind(turns)}, not a list")
    if not turns:
        raise RowError(f"empty `{column}`", f"`{column}` is empty")
    return tuple(_message(i, turn, column, ignored) for i, turn in enumerate(turns, start=1))


def parse_tools(tools: object) -> tuple[Any, ...] | None:
    """The descriptions of tools in a row: a list, or its JSON text; None where there are none."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = parse_json(tools, nan=True)
        except ValueError as error:
            raise RowError("broken `tools`", f"`tools` is not valid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong type of `tools`", "`tools` is not a list of objects")
    return tuple(tools)


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a described tool, or of a call: its own or its function's."""
    name = tool.get("function", tool)
    name = name.get("name") if isinstance(name, Mapping) else None
    return name if isinstance(name, str) else None


def _message(i: int, turn: object, column: str, ignored: set[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError("wrong type of message", f"message {i} is {kind(turn)}, not an object")
    role = turn.get("role")
    if role not in ROLES:
        near = nearest(role, ROLES) if isinstance(role, str) else None
        raise RowError(
            "unknown role",
            f"message {i} has the role {json.dumps(role, ensure_ascii=False, default=str)}",
            hint=f"did you mean `{near}`?" if near else f"roles are {', '.join(ROLES)}",
        )
    extra = _extra(i, turn, column, ignored)
    what = f"`content` of message {i} ({role})"
    given = turn.get("content")
    if given is None and extra.get("tool_calls"):
        content = ""
    elif isinstance(given, list):
        content = "".join(_part(i, j, part) for j, part in enumerate(given, start=1))
    else:
        content = plain_text(given, what, "`content`")
    if role == "assistant" and not content.strip() and not extra.get("tool_calls"):
        raise RowError("empty assistant message", f"message {i} (assistant) is empty")
    return Message(role, content, extra, trained=role != "assistant" or _weight(i, turn))


def _extra(i: int, turn: Mapping[str, Any], column: str, ignored: set[str]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for key, value in turn.items():
        if key in ("role", "content", "weight") or value is None or value == []:
            continue
        if key in REFUSED_KEYS:
            raise RowError(
                f"`{key}` in a message",
                f"message {i} has `{key}`, which is not known here",
                hint=REFUSED_KEYS[key],
            )
        if key in TEMPLATE_KEYS:
            extra[key] = value
        else:
            ignored.add(f"{column}[].{key}")
    calls = extra.get("tool_calls", [])
    well_formed = isinstance(calls, list) and all(
        isinstance(call, Mapping) and tool_name(call) for call in calls
    )
    if not well_formed:
        raise RowError(
            "broken `tool_calls`",
            f"`tool_calls` of message {i} is not a list of calls with the name of a function",
            hint='a call is {"type": "function", "function": {"name": …, "arguments": …}}',
        )
    return extra


def _weight(i: int, turn: Mapping[str, Any]) -> bool:
    """OpenAI's `weight`: 0 leaves the turn out of what is trained."""
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(
            "a weight that is neither 0 nor 1",
            f"`weight` of message {i} is {json.dumps(weight, default=str)}",
            hint="1 trains a turn of the assistant, 0 does not",
        )
    return bool(weight)


def _part(i: int, j: int, part: object) -> str:
    """The text of one part of a message's content."""
    if not isinstance(part, Mapping):
        raise RowError(
            "wrong type of part",
            f"part {j} of the content of message {i} is {kind(part)}, not an object",
        )
    shape = part.get("type", "text")
    if shape != "text":
        raise RowError(
            "a part that is not text",
            f"part {j} of the content of message {i} is of type "
            f"{json.dumps(shape, ensure_ascii=False, default=str)}",
            hint="only text is trained on; leave out rows with images, audio or video",
        )
    return plain_text(part.get("text"), f"part {j} of the content of message {i}", "`content`")


def plain_text(value: object, what: str, column: str) -> str:
    """The value, if it is text that can be encoded.

    Raises:
        RowError: saying what `what` is instead.
    """
    if not isinstance(value, str):
        raise RowError(f"wrong type of {column}", f"{what} is {kind(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"broken text in {column}",
            f"{what} has half of a surrogate pair at character {error.start + 1}",
        ) from None
    return value


def kind(value: object) -> str:
    """What a decoded JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)
