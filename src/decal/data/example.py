"""Example: one row as it was meant, the only thing that passes from source.py to the encoders.

Knows neither files nor tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decal.untrusted import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str
    """Its text; empty where a message only calls tools and the row has null, because templates
    would write that out."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further keys for the chat template as the row has them: tool_calls, tool_call_id, name,
    reasoning_content, …"""
    trained: bool = True
    """False for a turn of the assistant with `weight: 0`: it is part of the prompt only."""

    def as_dict(self, *, decode_arguments: bool = True) -> dict[str, Any]:
        """The message as chat templates take it.

        Args:
            decode_arguments: hand on the arguments of tool calls as objects where the row has JSON
                text (as OpenAI's format does): most templates write them with `tojson`, which
                would put JSON text into quotes a second time.
        """
        extra = dict(self.extra)
        if decode_arguments and "tool_calls" in extra:
            extra["tool_calls"] = [_decoded(call) for call in extra["tool_calls"]]
        return {"role": self.role, "content": self.content, **extra}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row: `messages`; or `prompt` and `completion`; or `text`, with a `label` or without."""

    row: int
    """Number of the row: its line in the file or its place in the data set, from 1."""
    messages: tuple[Message, ...] | None = None
    tools: tuple[Any, ...] | None = None
    """Descriptions of functions that the chat may call, for the chat template."""
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    """Plain text, all of it trained; or, with a label, the text to be classified."""
    label: str | None = None
    """The name of the text's class."""


def _decoded(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _decoded(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        value = parse_json(arguments, nan=True)
    except ValueError:
        return dict(call)
    return {**call, "arguments": value} if isinstance(value, dict) else dict(call)
