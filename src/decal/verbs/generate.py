"""`decal generate`: one prompt to one completion, streamed, with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from decal.errors import DecalError
from decal.model.heads import labels_of
from decal.verbs.load import load
from decal.verbs.target import data_settings, resolve
from decal.verbs.text import Completion, Prompt, Sampling, classify, complete_one


def generate(
    target: str,
    prompt: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    chat: bool | None = None,
    stream: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    **sampling: Any,
) -> Completion:
    """Completes `prompt` with the model, adapter or run at `target`.

    A model that classifies gives the label of `prompt` instead, with its probability.

    Args:
        target: run, adapter, model folder or hub id.
        adapter: an adapter to put on `target`, if that is a base.
        system: a system message before the prompt; for chats. Left out: that of the run's rows,
            if `target` is a run whose rows got one.
        chat: render the prompt as a user turn; left out: if the tokenizer has a chat template.
        stream: called with pieces of text as they are generated.
        trust_remote_code: run Python code that comes with the model.
        allow_other_base: warn where the base is not the one of the adapter's training, instead of
            refusing it.
        sampling: max_new_tokens (256), temperature (0: greedy), top_p (1), top_k (all), seed (0).

    Returns:
        The whole completion without special tokens: a text that also knows how many tokens it has
        and whether the model ended it.

    Raises:
        ConfigError: a sampling setting that is unknown or out of its range.
        DecalError: the prompt is empty, or `system` without a chat.
        DataError: the prompt is longer than the model's context, or the template refuses it.
        Whatever `load` raises.
    """
    chosen = Sampling(**sampling)
    if not prompt.strip():
        raise DecalError("the prompt is empty", hint="decal generate MODEL 'your prompt'")
    if system is not None and chat is False:
        raise DecalError(
            "a plain prompt has no place for a system message", hint="drop one of them"
        )
    model, tokenizer = load(
        target,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    if labels_of(model) is not None:
        label, probability = classify(model, tokenizer, [prompt])[0]
        return Completion.of(label, probability=probability)
    as_chat = tokenizer.chat_template is not None if chat is None else chat
    return complete_one(model, tokenizer, _asked(target, prompt, system, as_chat), chosen, stream)


def _asked(target: str, prompt: str, system: str | None, as_chat: bool) -> Prompt:
    """The prompt as it is, or as a user turn after the system message of the run's rows."""
    if not as_chat:
        if system is not None:
            raise DecalError(
                f"`{target}` has no chat template, so there is no place for a system message",
                hint="put the text in front of the prompt",
            )
        return prompt
    data = data_settings(resolve(target))
    system = data.system if system is None and data is not None else system
    instruction = [{"role": "system", "content": system}] if system is not None else []
    return [*instruction, {"role": "user", "content": prompt}]
