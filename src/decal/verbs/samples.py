"""Sample outputs: evaluation rows answered by the base and by candidates, kept in samples.json.

    [{"prompt": str, "expected": str | null, "outputs": {"base": str, "<candidate>": str, ...}}]

A sweep has one such file for all of its candidates, a run one of its own. Once it is there, reports
need no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decal.config import RunConfig
from decal.data.source import Example
from decal.errors import DataError, DecalError, OutputError
from decal.report.page import Sample
from decal.runfile import load_run
from decal.store.files import JSON_LIMIT, write_json
from decal.untrusted import parse_json, read_bounded
from decal.verbs.candidates import Found
from decal.verbs.compare import BASE_NAME, Observe, answers, compare
from decal.verbs.load import load, load_base
from decal.verbs.measure import question
from decal.verbs.rows import read_run_rows
from decal.verbs.text import Chat, Prompt

SAMPLES = "samples.json"
_LONGEST = 64
"""Tokens of an answer."""
Asked = list[tuple[Prompt, str | None]]
"""Prompt and expected answer of each row."""


def read_samples(found: Found) -> list[Sample]:
    """The samples that lie in the folders, those of one prompt put together.

    Raises:
        OutputError: a samples.json that is damaged.
    """
    places = [(found.sweep, None)] if found.sweep else []
    places += [(folder, name) for name, folder in found.folders.items()]  # type: ignore[misc]
    together: dict[tuple[str, str | None], dict[str, str]] = {}
    for folder, name in places:
        assert folder is not None
        for sample in _read(folder / SAMPLES):
            outputs = together.setdefault((sample.prompt, sample.expected), {})
            for model, output in sample.outputs.items():
                # A run's own file calls it by its folder; beside others it may have a longer name.
                outputs.setdefault(
                    name if name and model == folder.resolve().name else model, output
                )
    known = (BASE_NAME, *(one.name for one in found.candidates))
    return [
        Sample(prompt=prompt, expected=expected,
               outputs={name: outputs[name] for name in known if name in outputs})
        for (prompt, expected), outputs in together.items()
    ]  # fmt: skip


def _read(path: Path) -> list[Sample]:
    if not path.exists():
        return []
    try:
        rows = parse_json(read_bounded(path, JSON_LIMIT))
    except OSError as error:
        raise OutputError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise OutputError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(_sound(row) for row in rows):
        raise OutputError(f"`{path}` is no list of samples", hint="remove it, or sample again")
    return [
        Sample(prompt=row["prompt"], expected=row.get("expected"), outputs=row["outputs"])
        for row in rows
    ]


def _sound(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        return False
    outputs = row.get("outputs")
    texts = isinstance(outputs, dict) and all(isinstance(v, str) for v in outputs.values())
    return texts and isinstance(row.get("expected"), str | None)


def make_samples(found: Found, count: int, observe: Observe | None = None) -> None:
    """Answers `count` evaluation rows with the base and each candidate that left weights.

    Raises:
        DataError: a run without evaluation rows, or none that asks something.
        DecalError: no candidate has left weights yet, and whatever loading raises.
    """
    groups = _groups(found)
    if not groups:
        raise DecalError("no run has left weights to sample from", hint="let one of them end first")
    made: list[dict[str, Any]] = []
    for members in groups:
        config = load_run(found.folders[members[0]] / "run.yaml")
        asked = _asked(config, count)
        prompts = [prompt for prompt, _ in asked]
        outputs = _outputs(found, members, config, prompts, observe)
        if config.objective == "classify":  # `label (97.3%)`
            outputs = {n: [t.rpartition(" (")[0] for t in texts] for n, texts in outputs.items()}
        rows = [
            {
                "prompt": _shown(prompt),
                "expected": expected,
                "outputs": {name: texts[i] for name, texts in outputs.items()},
            }
            for i, (prompt, expected) in enumerate(asked)
        ]
        made += rows
        if found.sweep is None:
            for name in members:
                _write_own(found.folders[name], name, rows)
    if found.sweep is not None:
        write_json(found.sweep / SAMPLES, made)


def _write_own(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    own = folder.resolve().name
    kept = [
        {**row, "outputs": {own if model == name else model: text
                            for model, text in row["outputs"].items()
                            if model in (BASE_NAME, name)}}
        for row in rows
    ]  # fmt: skip
    write_json(folder / SAMPLES, kept)


def _groups(found: Found) -> list[list[str]]:
    """Candidates that one base in memory, packed in one way, and one set of rows serve."""
    groups: dict[str, list[str]] = {}
    for one in found.candidates:
        folder = found.folders.get(one.name)
        if folder is None or not one.settings:
            continue
        shared = {
            k: v for k, v in one.settings.items() if k.startswith(("base.", "quant.", "data."))
        }
        if (folder / "adapter").is_dir():
            groups.setdefault(f"{shared} {one.data} {one.base}", []).append(one.name)
        elif (folder / "model").is_dir():
            groups[f"{one.name} alone"] = [one.name]
    return list(groups.values())


def _asked(config: RunConfig, count: int) -> Asked:
    rows = read_run_rows(config).eval.examples
    if not rows:
        raise DataError(
            "the run has no evaluation rows to sample", hint="it was run with data.eval null"
        )
    asked = [found for row in rows if (found := _question(row)) is not None][:count]
    if not asked:
        raise DataError("the evaluation rows ask nothing: they are plain text")
    return asked


def _question(row: Example) -> tuple[Prompt, str | None] | None:
    if row.label is not None and row.text is not None:
        return row.text, str(row.label)
    return question(row)


def _outputs(
    found: Found,
    members: Sequence[str],
    config: RunConfig,
    prompts: list[Prompt],
    observe: Observe | None,
) -> dict[str, list[str]]:
    first = found.folders[members[0]]
    if not (first / "adapter").is_dir():
        return _full(first, members[0], config, prompts)
    # compare has its own name for the base, and rules for names: candidates get plain ones there.
    names = {f"c{i}": name for i, name in enumerate(members)}
    results = compare(
        None,
        {alias: str(found.folders[name]) for alias, name in names.items()},
        prompts=prompts,
        max_new_tokens=_LONGEST,
        observe=observe
        and (lambda alias, done, total: observe(names.get(alias, alias), done, total)),
    )["results"]
    return {names.get(alias, alias): values["outputs"] for alias, values in results.items()}


def _full(
    folder: Path, name: str, config: RunConfig, prompts: list[Prompt]
) -> dict[str, list[str]]:
    """A full fine-tuning beside its base; a classifier's base has no head to answer with."""
    outputs = {}
    if config.objective != "classify":
        base = config.base
        model, tokenizer = load_base(
            base.path, dtype=base.dtype, device=base.device, revision=base.revision
        )
        outputs[BASE_NAME] = answers(model, tokenizer, prompts, _LONGEST)
        del model
    model, tokenizer = load(folder)
    outputs[name] = answers(model, tokenizer, prompts, _LONGEST)
    return outputs


def _shown(prompt: Prompt) -> str:
    """A prompt as text: of a chat what is said, after the system message if there is one."""
    if isinstance(prompt, str):
        return prompt
    chat = prompt if isinstance(prompt, Chat) else Chat.of(prompt)
    if len(chat.messages) == 1:
        return chat.messages[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in chat.messages)
