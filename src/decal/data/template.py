"""How a chat template is run: the tokenizer's own, or a plain one where it has none.

Knows messages, not tokens. Two things are done to templates besides running them:

- A template that writes today's date (through `strftime_now`) gets the same day in every run; its
  text is changed for that, because transformers takes no functions for templates. Otherwise the
  tokens of a row would depend on the day it is encoded, and a run that is resumed tomorrow would
  train on other rows than today.
- Arguments of tool calls go in as objects, and as the row has them where the template refuses
  objects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from decal.data.example import Message
from decal.data.tokens import Tokenizer, own_bos
from decal.errors import DataError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)
"""What running a template on a row can raise: its own refusals, and slips in its expressions."""

TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""How templates ask for the date, with the format as its text."""

DAY = datetime(2025, 1, 1)
"""The day that templates are told, always."""

DEFAULT_TEMPLATE = (
    "{% for message in messages %}### {{ message.role | capitalize }}:\n"
    "{{ message.content | trim }}"
    "{{ eos_token if message.role == 'assistant' else '' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""For bases without a template of their own. It writes

    ### User:
    Where is my parcel?

    ### Assistant:
    On its way.</s>

and so on: headers that any vocabulary can spell, and the tokenizer's eos token behind every turn of
the assistant, because that is the only token that all bases know as an end. Headers of special
tokens, as chat models have them, would need rows in the embedding that a base never trained."""


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises:
        DataError: it has several and none for general use.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[bool, str] = {}
        self._undated: dict[bool, str | None] = {}
        self._default: str | None = None
        if not tokenizer.chat_template:
            bos = "{{ bos_token }}" if own_bos(tokenizer) is not None else ""
            self._default = bos + DEFAULT_TEMPLATE
        self._dated = self._dating(None) is not None

    @property
    def default(self) -> str | None:
        """The text of the plain template, with bos where the tokenizer adds it; None where the
        tokenizer has a template of its own."""
        return self._default

    @property
    def dated(self) -> bool:
        """Whether the template asks for today's date."""
        return self._dated

    def has_markers(self, tools: Sequence[Any] | None) -> bool:
        """Whether it marks what the assistant generates, and the tokenizer can tell where."""
        return self._tokenizer.is_fast and bool(GENERATION.search(self._text(tools)))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        generation_prompt: bool = False,
        decode_arguments: bool = True,
    ) -> str:
        """The chat as text; raises one of TEMPLATE_ERRORS where the template refuses it."""
        text: str = self._tokenizer.apply_chat_template(
            self._chat(messages, decode_arguments),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **self._options(tools),
        )
        return text

    def encode_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, decode_arguments: bool
    ) -> Any:
        """`input_ids`, `offset_mapping` and `assistant_masks`: 1 on tokens inside markers."""
        return self._tokenizer.apply_chat_template(
            self._chat(messages, decode_arguments),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
            **self._options(tools),
        )

    def refused_turn(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> int:
        """Number of the turn, from 1, from which on the template refuses a refused chat."""
        turn = len(messages)
        while turn > 1 and not self._accepts(messages[: turn - 1], tools):
            turn -= 1
        return turn

    def _accepts(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        try:
            self.render(messages, tools)
        except TEMPLATE_ERRORS:
            return False
        return True

    def _text(self, tools: Sequence[Any] | None) -> str:
        """The template that rows with or without tools take."""
        if self._default is not None:
            return self._default
        try:
            if bool(tools) not in self._texts:
                text = self._tokenizer.get_chat_template(tools=list(tools) if tools else None)
                self._texts[bool(tools)] = text
            return self._texts[bool(tools)]
        except ValueError as error:
            raise DataError(
                "the tokenizer has several chat templates and none is called `default`",
                hint="set `chat_template` in the base's tokenizer_config.json to one of them",
            ) from error

    def _options(self, tools: Sequence[Any] | None) -> dict[str, Any]:
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if self._default is not None:
            options["chat_template"] = self._default
        elif (undated := self._dating(tools)) is not None:
            options["chat_template"] = undated
        return options

    def _dating(self, tools: Sequence[Any] | None) -> str | None:
        """The template with the date of DAY in it; None where it asks for no date."""
        if bool(tools) not in self._undated:
            text = self._text(tools)
            undated = TODAY.sub(lambda found: repr(DAY.strftime(found[2])), text)
            self._undated[bool(tools)] = undated if undated != text else None
        return self._undated[bool(tools)]

    def _chat(self, messages: Sequence[Message], decode_arguments: bool) -> list[dict[str, Any]]:
        return [message.as_dict(decode_arguments=decode_arguments) for message in messages]
