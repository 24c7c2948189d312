"""Reading rows: layouts, precedence, and every way a row can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decal.config import DataConfig
from decal.data.source import Example, Message, Rows, read_rows, split_eval
from decal.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def write(folder: Path, *rows: Any, name: str = "train.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(path: str | Path, **settings: Any) -> Rows:
    return read_rows(DataConfig(path=path, **settings))


def test_messages(tmp_path: Path) -> None:
    rows = read(write(tmp_path, {"messages": CHAT}, "", {"messages": CHAT[::-1]}))
    assert rows.layout == "messages"
    assert rows.ignored == ()
    first = Example(row=1, messages=(Message("user", "Hi"), Message("assistant", "Ho")))
    assert rows.examples[0] == first
    assert rows.examples[1].row == 3, "a blank line counts: the row's number is its line"


def test_prompt_and_completion(tmp_path: Path) -> None:
    rows = read(write(tmp_path, {"prompt": "", "completion": " a", "source": "x"}))
    assert rows.layout == "prompt-completion"
    assert rows.ignored == ("source",)
    assert rows.examples == [Example(row=1, prompt="", completion=" a")]


def test_messages_win_over_prompt(tmp_path: Path) -> None:
    """Columns of no_robots; mutation: order LAYOUTS the other way round."""
    extra = {"prompt": "Hi", "completion": "Ho", "prompt_id": "7", "category": "chat"}
    rows = read(write(tmp_path, {**extra, "messages": CHAT}))
    assert rows.layout == "messages"
    assert rows.ignored == ("category", "completion", "prompt", "prompt_id")


def test_null_columns_do_not_make_a_layout(tmp_path: Path) -> None:
    rows = read(write(tmp_path, {"messages": None, "prompt": "a", "completion": "b"}))
    assert rows.layout == "prompt-completion"


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": CHAT}, {"messages": CHAT}, "not json")
    assert len(read(path, limit=2).examples) == 2


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    line = json.dumps({"messages": CHAT}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert [example.row for example in read(str(path)).examples] == [1, 3]


def test_separators_inside_text_are_not_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    text = "one\u2028two\x85three"
    chat = [{"role": "assistant", "content": text}]
    path.write_text(json.dumps({"messages": chat}, ensure_ascii=False) + "\n", encoding="utf-8")
    (example,) = read(str(path)).examples
    assert example.messages == (Message("assistant", text),)


BAD_ROWS = {
    "not json": "invalid JSON on line 2, column 1",
    '{"messages": [}': "invalid JSON on line 2, column 15",
    "[1, 2]": "the row is a list, not an object",
    '{"prompt": "a"}': "no `messages` (the row has `prompt`)",
    '{"messages": null}': "no `messages`",
    '{"messages": "hi"}': "`messages` is text, not a list",
    '{"messages": []}': "`messages` is empty",
    '{"messages": ["hi"]}': "message 1 is text, not an object",
    '{"messages": [{"content": "x"}]}': "message 1 has the role null",
    '{"messages": [{"role": "assistent", "content": "x"}]}': 'message 1 has the role "assistent"',
    '{"messages": [{"role": "user", "content": "x"}]}': "none of the 1 messages is the assistant's",
    '{"messages": [{"role": "assistant", "content": null}]}': "message 1 (assistant) is null",
    '{"messages": [{"role": "assistant", "content": [1]}]}': "content of message 1 is a number",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': 'is of type "image"',
    '{"messages": [{"role": "assistant", "content": " "}]}': "message 1 (assistant) is empty",
    '{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "half of a surrogate pair",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}': "have `weight: 0`",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}': "message 1 is 0.5",
    '{"messages": [{"role": "assistant", "content": "x", "train": false}]}': "1 has `train`",
    '{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}': "not a list of c",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}': "`tools` is not valid",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": [1]}': "not a list of obj",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_row_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, {"messages": CHAT}, line))
    assert "1 of 2 rows of" in caught.value.message
    assert caught.value.details[0].startswith("row 2: ")
    assert BAD_ROWS[line] in caught.value.details[0]


def test_harmless_keys_of_messages_are_named(tmp_path: Path) -> None:
    chat = [{**CHAT[0], "mood": "calm", "weight": None}, {**CHAT[1], "tool_calls": []}]
    rows = read(write(tmp_path, {"messages": chat, "id": 3}))
    assert rows.ignored == ("id", "messages[].mood")


def test_problems_are_collected_and_counted(tmp_path: Path) -> None:
    """Mutation: raise at the first bad row."""
    bad = {"messages": CHAT[:1]}
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, {"messages": CHAT}, *[bad] * 8, "{", {"messages": CHAT}))
    error = caught.value
    assert error.message.startswith("9 of 11 rows of")
    assert error.details[0].endswith("(and 7 more: 3, 4, 5, 6, …)")
    assert error.details[1].startswith("row 10: invalid JSON on line 10, column 2")
    assert len(error.details) == 2


def test_invalid_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps({"messages": CHAT}).encode() + b'\n{"prompt": "\xfc"}\n')
    with pytest.raises(DataError, match="row 2: byte 13 of line 2 is 0xfc") as caught:
        read(str(path))
    assert caught.value.hint == "save the file as UTF-8"


def test_utf16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wide.jsonl"
    path.write_text(json.dumps({"messages": CHAT}), encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        read(str(path))


def test_one_json_array_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name it \.json, or write a line"):
        read(write(tmp_path, "[", '{"prompt": "a", "completion": "b"}', "]"))


def test_unknown_layout_names_columns_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, {"message": CHAT, "id": 1}))
    assert "row 1 has `message`, `id`" in caught.value.message
    assert caught.value.hint == (
        "rename `message` to `messages`, with `data.columns` or in the data"
    )


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read(write(tmp_path, "", " "))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, {"messages": CHAT}, name="tickets.jsonl")
    with pytest.raises(DataError, match="there is no file") as caught:
        read(str(tmp_path / "ticket.jsonl"))
    assert caught.value.hint == f"did you mean `{tmp_path / 'tickets.jsonl'}`?"


def test_relative_missing_file_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`data/train.jsonl` looks like `owner/name`; mutation: do not look at the suffix."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"there is no file `data/train\.jsonl`") as caught:
        read("data/train.jsonl")
    assert caught.value.hint == "there is no folder `data` either"


def test_unknown_suffix(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b", name="rows.xlsx")
    with pytest.raises(DataError, match="not one of the file types that are read"):
        read(path)


def examples(n: int) -> list[Example]:
    return [Example(row=i + 1, prompt="a", completion=str(i)) for i in range(n)]


def split(n: int, eval: float | str | None, seed: int = 0) -> tuple[list[Example], list[Example]]:
    rows = Rows(source="rows", layout="prompt-completion", ignored=(), examples=examples(n))
    train, held_out = split_eval(rows, DataConfig(path="rows", eval=eval), seed)
    return train.examples, held_out.examples


@pytest.mark.parametrize(("n", "share", "count"), [(20, 0.1, 2), (20, 0.01, 1), (3, 0.99, 2)])
def test_split_by_share(n: int, share: float, count: int) -> None:
    """Mutations: take the first rows; allow an empty part; ignore the seed."""
    train, held_out = split(n, share, seed=3)
    assert len(held_out) == count
    assert sorted([*train, *held_out], key=lambda e: e.row) == examples(n)
    assert [e.row for e in train] == sorted(e.row for e in train)
    assert split(n, share, seed=3) == (train, held_out)
    others = [split(n, share, seed=s)[1] for s in range(8)]
    assert len({tuple(e.row for e in other) for other in others}) > 1


def test_no_class_is_held_out_whole() -> None:
    """Fails when the only row of a class can become an evaluation row."""
    labels = ["a"] * 9 + ["b", "c"]
    examples = [Example(row=i, text="t", label=label) for i, label in enumerate(labels, 1)]
    rows = Rows(source="rows", layout="labels", ignored=(), examples=examples)
    for seed in range(20):
        train, held_out = split_eval(rows, DataConfig(path="rows", eval=0.5), seed)
        assert {e.label for e in train.examples} == {"a", "b", "c"}
        assert len(held_out.examples) == 6
    alone = replace(rows, examples=examples[-2:])
    with pytest.raises(DataError, match="the only one of its class"):
        split_eval(alone, DataConfig(path="rows", eval=0.5), 0)


def test_split_by_nothing_and_of_one_row() -> None:
    assert split(2, None) == (examples(2), [])
    with pytest.raises(DataError, match="1 row cannot be split"):
        split(1, 0.5)


def test_split_by_file(tmp_path: Path) -> None:
    """The evaluation file has the same settings, and errors that name it. Mutations: name the
    training file; read it with the default settings."""
    row = {"q": "a", "a": "b"}
    columns = {"prompt": "{q}", "completion": "{a}"}
    path = write(tmp_path, row, row, name="eval.jsonl")
    settings = DataConfig(path=write(tmp_path, row), columns=columns, eval=path, limit=1)
    rows = read_rows(settings)
    train, held_out = split_eval(rows, settings)
    assert train is rows
    assert held_out.examples == [Example(row=1, prompt="a", completion="b")]
    assert held_out.source == path
    broken = write(tmp_path, row, {"q": "a", "a": None}, name="broken.jsonl")
    settings = settings.model_copy(update={"eval": broken, "limit": None})
    with pytest.raises(DataError, match=r"1 of 2 rows of `.*broken\.jsonl`"):
        split_eval(rows, settings)


def test_evaluation_rows_have_the_layout_of_the_training_rows(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, name="eval.jsonl")
    settings = DataConfig(path=write(tmp_path, {"messages": CHAT}), eval=path)
    with pytest.raises(DataError, match=r"`.*eval\.jsonl` has not the layout messages"):
        split_eval(read_rows(settings), settings)


def test_shuffle_comes_before_limit(tmp_path: Path) -> None:
    """Rows keep their numbers. Mutations: limit first; the same order for every seed."""
    lines = [{"text": str(i)} for i in range(1, 31)]
    settings = DataConfig(path=write(tmp_path, *lines), shuffle=True, limit=5)
    chosen = [read_rows(settings, seed=seed).examples for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert any(example.row > 5 for example in chosen[0])
    assert all(example.row == int(example.text or 0) for example in chosen[0])


@pytest.mark.parametrize(("setting", "value"), [("split", "test"), ("name", "x")])
def test_settings_of_data_sets_on_a_file(tmp_path: Path, setting: str, value: str) -> None:
    """Mutation: ignore them."""
    path = write(tmp_path, {"text": "a"})
    with pytest.raises(DataError, match=f"`data.{setting}` is {value}, but .* is a file"):
        read(path, **{setting: value})


def test_name_without_owner(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file `imdb`") as caught:
        read("imdb")
    assert caught.value.hint == "a hub data set is named owner/name"
