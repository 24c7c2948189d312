"""Text in, text out: prompts to completions in batches, and exact-match accuracy.

Knows no adapters and no files; works on any causal language model with its tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from decal.data.chat import own_bos
from decal.errors import DataError

Prompt = str | Sequence[dict[str, Any]]
"""Plain text, or the messages of a chat up to the turn that is asked for."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, as training saw it (chat.py).

    Plain text gets the tokenizer's own bos and nothing else: some tokenizers close every text with
    eos, and a model that has seen its prompt end answers nothing. Chats are rendered by the
    template with the generation prompt.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        bos = own_bos(tokenizer)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, but the prompt is a chat",
            hint="give the prompt as plain text",
        )
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy completions, in the order of the prompts, without special tokens and outer spaces.

    Prompts of similar length share a batch, padded on the left; `progress(done, total)` is called
    after each batch. What the model's own generation_config asks for besides (a repetition penalty,
    say) is left out: a penalty changes answers, and greedy means the likeliest token.
    """
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad or 0,
        eos_token_id=stop_tokens(model, tokenizer),
    )
    results = [""] * len(encoded)
    with _plainly(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            width = max(len(encoded[i]) for i in chunk)
            ids = torch.full((len(chunk), width), pad or 0, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chunk):
                ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
                mask[row, width - len(encoded[i]) :] = 1
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
            for row, i in enumerate(chunk):
                text = tokenizer.decode(out[row, width:], skip_special_tokens=True)
                results[i] = text.strip()
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
    return results


@contextmanager
def _plainly(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and no generation settings of the model's own, inside the block."""
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids that end a completion: the tokenizer's eos and those of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return sorted(i for i in ids if i is not None) or None


def exact_match(predictions: Sequence[str], expected: Sequence[str]) -> float:
    """Share of predictions equal to what was expected, outer spaces apart."""
    if not expected:
        return float("nan")
    hits = sum(p.strip() == e.strip() for p, e in zip(predictions, expected, strict=True))
    return hits / len(expected)
