"""The demo's public functions: importing is light, files hold rows, the base folder is whole."""

import json
import subprocess
import sys

import pytest

from decal.demo import QUEUES, base_path, rows, write_jsonl


def test_importing_the_demo_imports_no_torch():
    """Mutation: import the tokenizer's module in `decal.demo`."""
    code = (
        "import sys, decal.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_jsonl_holds_the_first_rows(tmp_path):
    """Mutation: ignore `limit`, or write the dataclass fields instead of messages."""
    path = tmp_path / "train.jsonl"
    assert write_jsonl(path, "train", limit=7) == 7
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"messages": row.messages} for row in rows("train")[:7]]


def test_the_base_folder_is_at_most_8_megabytes():
    """Mutation: save the weights in fp32."""
    assert sum(file.stat().st_size for file in base_path().iterdir()) <= 8_000_000


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_path())


def test_the_tokenizer_round_trips_any_text(tokenizer):
    """Mutation: train without the byte alphabet."""
    for text in (rows("test")[0].prompt, "Größe: 3 µm — 漢字\t\n  end", "<html> & 'quotes'"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_queue_is_one_token_and_tickets_are_short(tokenizer):
    """Mutation: train the tokenizer without the extra drills."""
    ids = [tokenizer.encode(queue) for queue in QUEUES]
    assert all(len(tokens) == 1 for tokens in ids)
    assert len({tokens[0] for tokens in ids}) == 48
    messages = [row.messages for row in rows("train")[:300]]
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    lengths = sorted(map(len, encoded["input_ids"]))
    assert lengths[len(lengths) // 2] <= 60
    assert lengths[-1] <= 100


def test_the_template_marks_the_answer_and_its_end(tokenizer):
    """Mutation: leave the end token outside of the generation block."""
    row = rows("train")[0]
    encoded = tokenizer.apply_chat_template(
        row.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mark
    ]
    assert marked == [*tokenizer.encode(row.queue), tokenizer.eos_token_id]
    prompt = tokenizer.apply_chat_template(
        row.messages[:1], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt


def test_the_base_loads_with_plain_transformers_and_knows_its_products():
    """Mutation: ship untrained weights, or leave a tensor out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model, report = AutoModelForCausalLM.from_pretrained(
        base_path(), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for question, answer in (("What is the Zorvik?", "printer"), ("Havorra?", "lamp")):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        assert reply.startswith(f"{answer}<|im_end|>")
