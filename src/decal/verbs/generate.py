"""`decal generate`: one prompt to one completion, streamed, with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from decal.errors import DecalError
from decal.verbs.load import load
from decal.verbs.text import Prompt, encode_prompt, stop_tokens


class _Stream(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._emit(text)


def generate(
    target: str,
    prompt: str,
    *,
    adapter: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> str:
    """Completes `prompt` with the model, adapter or run at `target`.

    Args:
        target: run, adapter, model folder or hub id.
        adapter: an adapter to put on `target`, if that is a base.
        chat: render the prompt as a user turn; left out: if the tokenizer has a chat template.
        temperature: 0 is greedy.
        stream: called with pieces of text as they are generated.

    Returns:
        The whole completion without special tokens.
    """
    if not prompt:
        raise DecalError("the prompt is empty", hint="decal generate MODEL 'your prompt'")
    if temperature < 0:
        raise DecalError(f"temperature is {temperature}", hint="0 is greedy, 0.7 is usual")
    model, tokenizer = load(target, adapter=adapter)
    as_chat = tokenizer.chat_template is not None if chat is None else chat
    asked: Prompt = [{"role": "user", "content": prompt}] if as_chat else prompt
    ids = torch.tensor([encode_prompt(tokenizer, asked)], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature} if temperature > 0 else {}),
        pad_token_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
        eos_token_id=stop_tokens(model, tokenizer),
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=_Stream(tokenizer, stream) if stream else None,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
