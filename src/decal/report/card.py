"""The model card: README.md of an adapter or a model, as text.

It says what is known and nothing else: what a fact lacks is left out, never guessed. Names of
places on the author's disk are for the caller to keep out.

Knows no files, no hub and no adapters; facts come in as plain values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MARK = "<!-- Written by decal push, which writes it anew until this line is removed. -->"

Value = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card may say."""

    repo: str
    """The repository it is for, `owner/name`."""
    kind: Literal["adapter", "model"]
    base: str | None = None
    """Hub id of the base, or the bare name of the folder it lay in."""
    base_on_hub: bool = False
    commit: str | None = None
    """The base's commit on the hub that was trained on."""
    labels: Sequence[str] = ()
    """Class names of a classifier."""
    quantized: str | None = None
    """How the base was quantized in training, in words; None for 16 or 32 bits."""
    dataset: str | None = None
    """Hub id of the training data, if it has one."""
    data: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    results: Mapping[str, Value] = field(default_factory=dict)
    versions: Mapping[str, Value] = field(default_factory=dict)


def card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    blocks = [
        _front_matter(facts),
        MARK,
        f"# {facts.repo.rpartition('/')[2]}",
        _summary(facts),
        "## How to use it",
        *_usage(facts),
    ]
    sections = {
        "Training data": facts.data,
        "Settings": facts.settings,
        "Results": facts.results,
        "Versions": facts.versions,
    }
    for title, values in sections.items():
        if values:
            rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
            blocks += [f"## {title}", "\n".join(["| | |", "|---|---|", *rows])]
    return "\n\n".join(blocks) + "\n"


def _front_matter(facts: CardFacts) -> str:
    adapter = facts.kind == "adapter"
    tags = ["decal", *(["lora"] if adapter else [])]
    if adapter and facts.quantized:
        tags.append("qlora")
    fields: dict[str, str | list[str]] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if facts.labels else "text-generation",
        "tags": tags,
    }
    if facts.base and facts.base_on_hub:
        fields["base_model"] = facts.base
        fields["base_model_relation"] = "adapter" if adapter else "finetune"
    if facts.dataset:
        fields["datasets"] = [facts.dataset]
    # JSON values are YAML values, quoted whatever a name is made of.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _summary(facts: CardFacts) -> str:
    base = ""
    if facts.base:
        shown = f"[{facts.base}](https://huggingface.co/{facts.base})"
        base = shown if facts.base_on_hub else f"`{facts.base}`"
        if facts.commit:
            base += f" at commit `{facts.commit[:12]}`"
    if facts.kind == "adapter":
        text = "A LoRA adapter" + (f" for {base}" if base else "")
        if facts.quantized:
            text += f", trained on the base quantized to {facts.quantized} (QLoRA)"
    else:
        text = "A language model" if not facts.labels else "A text classifier"
        text += f", fine-tuned from {base}" if base else ""
    text += ", made with decal."
    if facts.labels:
        text += "\n\nClasses: " + ", ".join(f"`{label}`" for label in facts.labels) + "."
    return text


def _usage(facts: CardFacts) -> list[str]:
    return _use_adapter(facts) if facts.kind == "adapter" else _use_model(facts)


def _use_adapter(facts: CardFacts) -> list[str]:
    if facts.base is None or not facts.base_on_hub:
        name = facts.base or "base"
        loaded = f'decal.load("{facts.repo}", base="path/to/{name}")'
        hint = "The base is not on the hub under a known id: name the folder it lies in."
        return [hint, _code("import decal", "", f"model, tokenizer = {loaded}")]
    decal = _code("import decal", "", f'model, tokenizer = decal.load("{facts.repo}")')
    revision = f', revision="{facts.commit}"' if facts.commit else ""
    auto, extra = "AutoModelForCausalLM", ""
    if facts.labels:
        auto, extra = "AutoModelForSequenceClassification", f", num_labels={len(facts.labels)}"
    peft = _code(
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"base = {auto}.from_pretrained(",
        f'    "{facts.base}"{revision}{extra}, dtype="bfloat16"',
        ")",
        f'model = PeftModel.from_pretrained(base, "{facts.repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.base}"{revision})',
    )
    exact = ""
    if facts.quantized:
        exact = (
            "This loads the base in 16 bits, whose weights differ a little from the quantized ones "
            "of the training; decal loads those."
        )
    return ["With decal:", decal, "With transformers and peft:", peft, *([exact] if exact else [])]


def _use_model(facts: CardFacts) -> list[str]:
    auto = "AutoModelForSequenceClassification" if facts.labels else "AutoModelForCausalLM"
    return [
        _code(
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("{facts.repo}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")',
        )
    ]


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _cell(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
