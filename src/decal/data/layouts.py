"""Columns -> example: what the ways mean in which rows are written. Knows no files, no templates.

`LAYOUTS` is the seam. The layout is found in the first readable row and then required of all.
Where a row fits several, the first in `LAYOUTS` wins: `messages` before `prompt` and `completion`,
because a chat holds its prompt already (data sets that carry both repeat the first message as
`prompt`); `labels` before `text`, because a label next to a text is there to be learned.

Whatever looks like a chat becomes `messages`: sharegpt's conversations, prompts and completions
that are lists of messages, and alpaca's instruction, input and output (a user turn of instruction,
blank line, input, and an answer). So the base's own chat template is used for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from decal.data.example import Example, Message
from decal.data.messages import parse_messages, parse_tools, plain_text
from decal.data.problems import MOST_COLUMNS, RowError, columns_text
from decal.errors import DataError, nearest
from decal.untrusted import parse_json


@dataclass(frozen=True)
class Layout:
    """A way rows can look: the columns it needs, and how they become an example.

    `parse(row number, columns, ignored)` raises RowError, and adds to the set `ignored`.
    """

    columns: tuple[str, ...]
    parse: Callable[[int, Mapping[str, Any], set[str]], Example]
    optional: tuple[str, ...] = ()
    """Columns that are used where a row has them."""


def find_layout(columns: Mapping[str, Any], made: frozenset[str], number: int, source: str) -> str:
    """The layout that the columns of a row fit; `made` are those of `data.columns`.

    A layout that uses all the made columns goes before one that does not.

    Raises:
        DataError: none fits.
    """
    fitting = [
        name
        for name, layout in LAYOUTS.items()
        if all(columns.get(column) is not None for column in layout.columns)
    ]
    for name in fitting:
        if made <= {*LAYOUTS[name].columns, *LAYOUTS[name].optional}:
            return name
    if fitting:
        return fitting[0]
    wanted = [" and ".join(f"`{c}`" for c in layout.columns) for layout in LAYOUTS.values()]
    known = [column for layout in LAYOUTS.values() for column in layout.columns]
    strange = [column for column in columns if column not in known][:MOST_COLUMNS]
    near = {column: nearest(column, known) for column in strange}
    hints = [f"rename `{column}` to `{meant}`" for column, meant in near.items() if meant]
    raise DataError(
        f"the columns of `{source}` fit no layout: row {number} has {_names(columns)}",
        details=[f"expected {', or '.join(wanted)}"],
        hint=(hints[0] if hints else "name the columns that are meant")
        + ", with `data.columns` or in the data",
    )


def require_layout(name: str, columns: Mapping[str, Any], number: int, source: str) -> None:
    """Raises DataError if the first row lacks a column of the layout that was asked for."""
    missing = [column for column in LAYOUTS[name].columns if columns.get(column) is None]
    if missing:
        near = nearest(missing[0], list(columns))
        raise DataError(
            f"`{source}` has not the layout {name}: row {number} has {_names(columns)}, "
            f"and no `{missing[0]}`",
            hint=f"is `{near}` meant? then set `data.columns: {{{missing[0]}: '{{{near}}}'}}`"
            if near
            else "leave out `data.layout`, or make the column with `data.columns`",
        )


def parse_row(name: str, number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    """The example in a row of layout `name`; columns that are not used are added to `ignored`.

    Raises:
        RowError: the row has not this layout.
    """
    layout = LAYOUTS[name]
    missing = [column for column in layout.columns if columns.get(column) is None]
    if missing:
        trouble = f"no `{missing[0]}`"
        raise RowError(
            trouble,
            f"{trouble} (the row has {_names(columns)})",
            hint="all rows must have the layout of the first row",
        )
    used = (*layout.columns, *layout.optional)
    ignored.update(column for column in columns if column not in used)
    return layout.parse(number, columns, ignored)


def _names(columns: Mapping[str, Any]) -> str:
    return columns_text(columns) or "no columns"


# --- chats ------------------------------------------------------------------------------------


def _chat(number: int, messages: tuple[Message, ...], columns: Mapping[str, Any]) -> Example:
    """A chat with the row's `system` and `tools`, if it has any."""
    speaking = [message for message in messages if message.role == "assistant"]
    if not speaking:
        raise RowError(
            "no assistant message",
            f"none of the {len(messages)} messages is the assistant's, so nothing can be trained",
        )
    if not any(message.trained for message in speaking):
        raise RowError("no trained message", "all messages of the assistant have `weight: 0`")
    system = columns.get("system")
    if system is not None and plain_text(system, "`system`", "`system`").strip():
        messages = with_system(messages, system)
    return Example(row=number, messages=messages, tools=parse_tools(columns.get("tools")))


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The chat with a system message in front, unless it begins with one of its own."""
    if messages[0].role in ("system", "developer"):
        return messages
    return (Message("system", system), *messages)


def _messages(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    messages = parse_messages(columns["messages"], "messages", ignored)
    return _chat(number, messages, columns)


def _sharegpt(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    turns = columns["conversations"]
    if isinstance(turns, list):
        turns = [_turn(i, turn) for i, turn in enumerate(turns, start=1)]
    return _chat(number, parse_messages(turns, "conversations", ignored), columns)


SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""What others call the roles; ours are taken too."""


def _turn(i: int, turn: object) -> object:
    """A turn with `from` and `value` as a message with `role` and `content`."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    further = {key: value for key, value in turn.items() if key not in ("from", "value")}
    given = turn["from"]
    role = SHAREGPT_ROLES.get(given, given) if isinstance(given, str) else given
    message = {**further, "role": role, "content": turn.get("value")}
    if given == "function_call":
        message |= {"content": None, "tool_calls": _calls(i, turn.get("value"))}
    return message


def _calls(i: int, value: object) -> list[Any]:
    """The calls in a turn of `function_call`: JSON text of one call or of a list."""
    try:
        calls = parse_json(value, nan=True) if isinstance(value, str) else value
    except ValueError:
        raise RowError(
            "a function call that is no JSON",
            f"message {i} (function_call) is not valid JSON: {value!r:.60}",
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    return [
        call
        if isinstance(call, Mapping) and "function" in call
        else {"type": "function", "function": call}
        for call in calls
    ]


def _alpaca(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    instruction = plain_text(columns["instruction"], "`instruction`", "`instruction`")
    given = columns.get("input")
    more = plain_text(given, "`input`", "`input`") if given is not None else ""
    output = plain_text(columns["output"], "`output`", "`output`")
    if not output.strip():
        raise RowError("empty output", "`output` is empty")
    asked = f"{instruction}\n\n{more}" if more.strip() else instruction
    return _chat(number, (Message("user", asked), Message("assistant", output)), columns)


# --- plain text -------------------------------------------------------------------------------


def _prompt_completion(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = parse_messages(prompt, "prompt", ignored)
        answer = parse_messages(completion, "completion", ignored)
        context = tuple(replace(message, trained=False) for message in asked)
        return _chat(number, (*context, *answer), columns)
    prompt = plain_text(prompt, "`prompt`", "`prompt`")
    completion = plain_text(completion, "`completion`", "`completion`")
    if not completion.strip():
        raise RowError("empty completion", "`completion` is empty")
    ignored.update({"system", "tools"} & columns.keys())
    return Example(row=number, prompt=prompt, completion=completion)


def _text(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    text = plain_text(columns["text"], "`text`", "`text`")
    if not text.strip():
        raise RowError("empty text", "`text` is empty")
    return Example(row=number, text=text)


def _labels(number: int, columns: Mapping[str, Any], ignored: set[str]) -> Example:
    text = plain_text(columns["text"], "`text`", "`text`")
    if not text.strip():
        raise RowError("empty text", "`text` is empty")
    return Example(row=number, text=text, label=_class(columns["label"]))


def _class(label: object) -> str:
    """The name of a class: text, a whole number, true or false."""
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))
    if isinstance(label, float):
        raise RowError(
            "a label that is a measure",
            f"`label` is {label}, which names no class",
            hint="classes have names or whole numbers",
        )
    name = plain_text(label, "`label`", "`label`").strip()
    if not name:
        raise RowError("empty label", "`label` is empty")
    return name


LAYOUTS: dict[str, Layout] = {
    "messages": Layout(("messages",), _messages, ("system", "tools")),
    "sharegpt": Layout(("conversations",), _sharegpt, ("system", "tools")),
    "prompt-completion": Layout(("prompt", "completion"), _prompt_completion, ("system", "tools")),
    "alpaca": Layout(("instruction", "output"), _alpaca, ("input", "system")),
    "labels": Layout(("text", "label"), _labels),
    "text": Layout(("text",), _text),
}
"""Layouts in order of precedence."""
