"""Chat templates with one trait each: what they do to the tokens, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from decal.data.chat import DEFAULT_TEMPLATE
from decal.data.example import Example, Message
from decal.data.stats import summarize
from decal.errors import DataError
from tests.data.chats import Make, chat, derived, encoder, trained

TOOLS = (
    {"type": "function", "function": {"name": "find_parcel", "description": "", "parameters": {}}},
)
ASKED = Message("user", "Where is 7?")
CALL = {"type": "function", "function": {"name": "find_parcel", "arguments": '{"id": "DE-7"}'}}
CALLED = Message("assistant", "", {"tool_calls": [CALL]})
FOUND = Message("tool", '{"at": "Köln"}', {"name": "find_parcel"})
SAID = Message("assistant", "In Köln.")

CALLING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tools_chat(*messages: Message, tools: Any = TOOLS) -> Example:
    return Example(row=1, messages=messages or (ASKED, CALLED, FOUND, SAID), tools=tools)


@pytest.fixture
def calling(make_tokenizer: Make) -> Any:
    """Like many models' tokenizers, it has tokens around calls, which are marks inside a turn."""
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = CALLING
    return tokenizer


# --- tools ------------------------------------------------------------------------------------


def test_calls_are_trained_with_their_turn(calling: Any) -> None:
    """Arguments that are JSON text become an object, so `tojson` quotes them once. Mutations: end
    the turn at `<tool_call>`; hand the arguments on as text."""
    encode = encoder(calling)
    call = '<tool_call>\n{"name": "find_parcel", "arguments": {"id": "DE-7"}}\n</tool_call>'
    sample = encode.encode(tools_chat())
    assert trained(sample, calling) == [f"{call}<|im_end|>", "In Köln.<|im_end|>"]
    assert sample.ended
    assert encode.notes == ()


def test_calls_with_generation_markers(calling: Any) -> None:
    calling.chat_template = CALLING.replace(
        "{% if m.content %}", "{% if m.role == 'assistant' %}{% generation %}{% if m.content %}", 1
    ).replace(
        "</tool_call>{% endfor %}<|im_end|>",
        "</tool_call>{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}",
        1,
    )
    first, second = trained(encoder(calling).encode(tools_chat()), calling)
    assert first.startswith("<tool_call>\n")
    assert first.endswith("</tool_call><|im_end|>")
    assert second == "In Köln.<|im_end|>"


def test_template_that_wants_arguments_as_text(calling: Any) -> None:
    """Adding text and an object fails. Mutation: hand on objects only."""
    calling.chat_template = CALLING.replace(
        "{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"
    )
    call = '<tool_call>\n{"name": "find_parcel", "arguments": {"id": "DE-7"}}\n</tool_call>'
    assert trained(encoder(calling).encode(tools_chat()), calling)[0] == f"{call}<|im_end|>"


def test_calls_in_a_chat_whose_last_turn_is_treated_differently(calling: Any) -> None:
    """The first two messages alone would be rendered with a thinking block, so only substitution
    finds the call. Mutations: begin behind the sentinel's turn; take the turn's region from the
    shorter chat."""
    calling.chat_template = CALLING.replace(
        "{% if m.content %}",
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{% if m.content %}",
    )
    call = '<tool_call>\n{"name": "find_parcel", "arguments": {"id": "DE-7"}}\n</tool_call>'
    assert trained(encoder(calling).encode(tools_chat()), calling) == [
        f"{call}<|im_end|>",
        "<think></think>In Köln.<|im_end|>",
    ]


def test_empty_content_beside_calls(calling: Any) -> None:
    """Mutation: leave the content out, which templates that trim it refuse."""
    calling.chat_template = CALLING.replace(
        "{% if m.content %}{{ m.content }}{% endif %}", "{{ m.content.strip() }}"
    )
    first = trained(encoder(calling).encode(tools_chat()), calling)[0]
    assert first.startswith("<tool_call>")


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ("{% if tools %}", "the chat template leaves out the row's 1 `tools`"),
        ("{{ c.function.name }}", r"message 2 \(assistant\) is rendered as .*'find_parcel'"),
        ("{{ c.function.arguments | tojson }}", r"message 2 \(assistant\) is rendered as"),
    ],
)
def test_dropped_tools_and_calls_are_refused(calling: Any, cut: str, text: str) -> None:
    """Mutation: look for the content of a turn only."""
    calling.chat_template = CALLING.replace(cut, "{% if false %}" if "if" in cut else "")
    with pytest.raises(DataError, match=text):
        encoder(calling).encode(tools_chat())


def test_results_of_tools_may_be_quoted_but_not_dropped(calling: Any) -> None:
    quoted = CALLING.replace("{{ m.content }}", "{{ m.content | tojson }}")
    plain = (ASKED, Message("tool", 'a "b"\n'), Message("assistant", "ok"))
    calling.chat_template = quoted
    assert trained(encoder(calling, turns="last").encode(tools_chat(*plain)), calling)
    calling.chat_template = CALLING.replace("in messages %}", "in messages if m.role != 'tool' %}")
    with pytest.raises(DataError, match=r"message 2 \(tool\) is not in the rendered chat"):
        encoder(calling).encode(tools_chat(*plain))


# --- which turns ------------------------------------------------------------------------------


def test_only_the_last_turn(make_tokenizer: Make) -> None:
    """Mutation: train all; with markers, count the untrained turns as missing."""
    for template in ("chatml", "chatml-marked"):
        tokenizer = make_tokenizer(template)
        sample = encoder(tokenizer, turns="last").encode(chat("a", "yes", "b", "no"))
        assert trained(sample, tokenizer) == ["no<|im_end|>"]


def test_stripped_thinking_is_no_trouble_in_turns_that_are_not_trained(
    make_tokenizer: Make,
) -> None:
    """Mutation: require every turn to be found."""
    tokenizer = make_tokenizer("thinking")
    row = chat("Hi", "<think>hm</think>yes", "And?", "no")
    sample = encoder(tokenizer, turns="last").encode(row)
    assert trained(sample, tokenizer) == ["<think>\n\n</think>\n\nno<|im_end|>"]


def test_turns_of_weight_0_are_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    first, second = Message("assistant", "no", trained=False), Message("assistant", "yes")
    row = Example(row=3, messages=(Message("user", "a"), first, Message("user", "b"), second))
    assert trained(encoder(tokenizer).encode(row), tokenizer) == ["yes<|im_end|>"]
    assert row.messages is not None
    flipped = Example(row=3, messages=(*row.messages[:3], first))
    with pytest.raises(DataError, match="row 3: the last turn of the assistant has `weight: 0`"):
        encoder(tokenizer, turns="last").encode(flipped)


def test_thinking_beside_the_content(make_tokenizer: Make) -> None:
    """A template that writes `reasoning_content`, and one that does not know it. Mutations: begin
    at the content; drop the thinking without a word."""
    tokenizer = make_tokenizer("chatml")
    thought = Message("assistant", "yes", {"reasoning_content": "hm"})
    row = Example(row=1, messages=(Message("user", "a"), thought))
    with pytest.raises(DataError, match=r"message 2 \(assistant\) is rendered as .* has 'hm'"):
        encoder(tokenizer).encode(row)
    written = "{% if m.reasoning_content %}[{{ m.reasoning_content }}] {% endif %}{{ m.content }}"
    tokenizer = derived(tokenizer, tokenizer.chat_template.replace("{{ m.content }}", written))
    assert trained(encoder(tokenizer).encode(row), tokenizer) == ["[hm] yes<|im_end|>"]


# --- refusals ---------------------------------------------------------------------------------


def test_strict_alternation_names_row_and_turn(make_tokenizer: Make) -> None:
    """Mutation: name the last message."""
    twice = (Message("user", "a"), Message("user", "b"), SAID, Message("user", "c"), SAID)
    with pytest.raises(DataError) as caught:
        encoder(make_tokenizer("inst")).encode(Example(row=4, messages=twice))
    assert caught.value.details[0] == (
        "row 4: the chat template refuses the row at message 2 (user): roles must alternate"
    )


# --- dates ------------------------------------------------------------------------------------


def test_dates_are_the_same_every_day(
    make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: let the template have today's date."""
    from datetime import datetime

    tokenizer = make_tokenizer("chatml")
    tokenizer = derived(
        tokenizer, "{{ strftime_now('%d %b %Y') + '\n' }}" + tokenizer.chat_template
    )
    encode = encoder(tokenizer)
    assert encode.notes == ()
    before = encode.encode(chat("Hi", "yes"))

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 7, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    hello = [{"role": "user", "content": "Hi"}]
    assert "05 Jul 2031" in tokenizer.apply_chat_template(hello, tokenize=False)
    after = encode.encode(chat("Hi", "yes"))
    assert before.input_ids.tolist() == after.input_ids.tolist()
    assert tokenizer.decode(before.input_ids.tolist()).startswith("01 Jan 2025\n")
    assert encode.notes == ("the chat template writes the date: 01 Jan 2025 in all rows",)


def test_end_of_turn_that_is_not_eos_is_noted(make_tokenizer: Make) -> None:
    """Trained all the same. Mutation: train eos tokens only."""
    tokenizer = make_tokenizer("chatml")
    tokenizer = derived(tokenizer, tokenizer.chat_template, eos_token="</s>")
    encode = encoder(tokenizer)
    sample = encode.encode(chat("Hi", "yes"))
    assert trained(sample, tokenizer) == ["yes<|im_end|>"]
    (note,) = encode.notes
    assert note.startswith("turns end with <|im_end|>, the tokenizer ends with </s>")
    assert summarize([sample], notes=encode.notes).lines()[-1] == note


# --- bases without a template -----------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_default_template(make_tokenizer: Make, adds_bos: bool) -> None:
    """Plain headers, eos behind the assistant's turns, and bos exactly where plain text has one.
    The tokens are those of a tokenizer with that template. Mutations: no eos; no bos; eos behind
    every turn."""
    tokenizer = copy.deepcopy(make_tokenizer("inst", adds_bos=adds_bos))
    tokenizer.chat_template = None
    encode = encoder(tokenizer)
    assert encode.template_used is None
    sample = encode.encode(chat("Say yes?", " yes 🙂\n", "And 你好?", "no", system="Be brief."))
    assert tokenizer.decode(sample.input_ids.tolist()) == (
        ("<s>" if adds_bos else "")
        + "### System:\nBe brief.\n\n### User:\nSay yes?\n\n### Assistant:\nyes 🙂</s>\n\n"
        "### User:\nAnd 你好?\n\n### Assistant:\nno</s>\n\n"
    )
    assert trained(sample, tokenizer) == ["yes 🙂</s>", "no</s>"]
    assert encode.template_used == ("{{ bos_token }}" if adds_bos else "") + DEFAULT_TEMPLATE
    assert "no chat template: a plain one is used" in encode.notes[0]
    tokenizer.chat_template = encode.template_used
    own = encoder(tokenizer)
    row = chat("Say yes?", " yes 🙂\n", "And 你好?", "no", system="Be brief.")
    assert own.encode(row).input_ids.tolist() == sample.input_ids.tolist()
    assert own.template_used is None


def test_default_template_needs_eos_and_has_no_tools(make_tokenizer: Make) -> None:
    tokenizer = copy.deepcopy(make_tokenizer("inst"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the chat template leaves out the row's 1 `tools`"):
        encoder(tokenizer).encode(tools_chat(ASKED, SAID))
    with pytest.raises(DataError, match=r"message 2 \(assistant\) is rendered as"):
        encoder(tokenizer).encode(tools_chat(tools=None))
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no eos token"):
        encoder(bare).encode(chat("a", "b"))


def test_several_templates(make_tokenizer: Make) -> None:
    """Rows with tools take the one called `tool_use`. Mutation: always take the default."""
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": CALLING}
    row = tools_chat(ASKED, SAID)
    assert "find_parcel" in tokenizer.decode(encoder(tokenizer).encode(row).input_ids.tolist())
    tokenizer.chat_template = {"tool_use": CALLING, "rag": CALLING}
    with pytest.raises(DataError, match="several chat templates and none is called `default`"):
        encoder(tokenizer)


# --- plain text -------------------------------------------------------------------------------


def test_text_is_trained_whole(make_tokenizer: Make) -> None:
    """All but the first token, which nothing predicts. Mutation: leave out eos."""
    tokenizer = make_tokenizer("inst", adds_bos=True)
    sample = encoder(tokenizer).encode(Example(row=1, text="yes maybe"))
    assert tokenizer.decode(sample.input_ids.tolist()) == "<s>yes maybe</s>"
    assert sample.trained.tolist() == [False] + [True] * (len(sample) - 1)
    assert encoder(tokenizer).notes == ()


def test_long_rows_are_dropped_and_counted(make_tokenizer: Make) -> None:
    """Rows that are cut to nothing else would be errors. Mutations: truncate; count tokens."""
    encode = encoder(make_tokenizer("chatml"), 30, overflow="drop")
    rows = [chat("Hi", "yes", row=1), chat("Hi " * 40, "yes", row=2), chat("a", "b", row=3)]
    samples = encode.encode_all(rows)
    assert [sample.row for sample in samples] == [1, 3]
    assert encode.dropped == (2,)
    lines = summarize(samples, dropped=encode.dropped).lines()
    assert lines[-1] == "1 row too long and dropped (33.3%)"
    with pytest.raises(DataError, match="the row of `e` is longer"):
        encode.encode_all(rows[1:2], "e")
