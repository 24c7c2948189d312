"""What `decal check` finds before any weight is read: rows, targets, tokenizer and embedding.

Each function looks at one area and returns a `Part`: findings in words, and the same facts as
plain values for programs. Nothing is raised; what cannot be had at all is among `Inputs.problems`.
These parts cost a second at most, so `decal train` begins with them too.

Levels: `ok` is what should be so, `note` is worth knowing, `warning` works and is probably not
meant, `problem` makes the run worthless or impossible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from decal.config import DataConfig, FullConfig
from decal.data.chat import own_bos
from decal.data.duplicates import Duplicates, repeated, shared
from decal.data.stats import DataSummary
from decal.errors import DataError, DecalError
from decal.kernels import native
from decal.model.inject import adapted_layers, replaced_modules, trainable_parameters
from decal.model.survey import base_modules
from decal.model.targets import TargetTable
from decal.report.tables import size
from decal.verbs.inputs import Inputs, Problem
from decal.verbs.rows import EncodedRows, RunRows

Level = Literal["ok", "note", "warning", "problem"]

MUCH = 0.05
"""Share of the rows from which what is lost is no longer a matter of a few outliers."""
FEW_TRAINED = 0.01
"""Share of trained tokens below which nearly all computing goes into prompts."""
UNEVEN = 10
"""Rows of the largest class per row of the smallest from which accuracy says little."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence on one thing."""

    area: str
    """settings | machine | data | targets | model | learning"""
    level: Level
    text: str
    details: tuple[str, ...] = ()
    hint: str | None = None

    def line(self) -> str:
        """Text and hint in one line."""
        return f"{self.text} ({self.hint})" if self.hint else self.text

    def as_problem(self, way_out: str) -> Problem:
        """The finding as an error that stops a run, and how to run in spite of it."""
        hint = "; ".join(part for part in (self.hint, way_out) if part)
        return Problem(self.area, DataError(self.text, details=self.details, hint=hint))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one area came to."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def of_error(area: str, error: DecalError) -> Finding:
    """An error as a finding."""
    return Finding(
        area=area, level="problem", text=error.message, details=error.details, hint=error.hint
    )


def before(found: Inputs) -> list[Finding]:
    """All findings of machine, data, targets and model that need no weights."""
    parts = (data_part(found), target_part(found), vocabulary_part(found))
    return [*machine(), *(finding for part in parts for finding in part.findings)]


def machine() -> list[Finding]:
    """What will make every step slow; nothing where all is as it should be."""
    if native.switched_off() or native.available() or torch.cuda.is_available():
        return []
    text = f"no compiled kernels for this processor: {native.why()}"
    hint = "steps take several times as long in plain torch; with a C++ compiler, install again"
    return [Finding(area="machine", level="warning", text=text, hint=hint)]


# --- data -------------------------------------------------------------------------------------


def data_part(found: Inputs) -> Part:
    """Rows, tokens, what is trained of them, and rows that are there twice."""
    rows, encoded = found.rows, found.encoded
    if rows is None:
        return Part(findings=())
    twice = repeated(rows.train.examples)
    leaked = shared(rows.eval.examples, rows.train.examples)
    findings = [_counts(rows)]
    if encoded is not None:
        findings += _tokens(encoded.summary, found.config.data)
        if rows.classes is None:
            findings += [*_mask(encoded.summary, rows.rows.layout), _bos(found, encoded)]
        else:
            findings += _classes(encoded.summary)
        findings += [_note(text) for text in encoded.summary.notes]
    findings += [_leaked(leaked, rows), *_repeated(twice, len(rows.train.examples))]
    if rows.rows.ignored:
        findings.append(_note(f"columns not used: {', '.join(rows.rows.ignored)}"))
    facts: dict[str, Any] = {
        "source": rows.rows.source,
        "layout": rows.rows.layout,
        "train_rows": len(rows.train.examples),
        "eval_rows": len(rows.eval.examples),
        "ignored": list(rows.rows.ignored),
        "duplicates_within_train": _duplicate_facts(twice),
        "duplicates_with_eval": _duplicate_facts(leaked),
    }
    if encoded is not None:
        facts |= _summary_facts(encoded.summary)
    return Part(findings=tuple(findings), facts=facts)


def _finding(level: Level, text: str, hint: str | None = None) -> Finding:
    return Finding(area="data", level=level, text=text, hint=hint)


def _note(text: str) -> Finding:
    return _finding("note", text)


def _counts(rows: RunRows) -> Finding:
    train, evaluated = len(rows.train.examples), len(rows.eval.examples)
    text = f"{rows.rows.source} ({rows.rows.layout}): {train:,} rows to train on"
    return _finding("ok", f"{text}, {evaluated:,} to evaluate on" if evaluated else text)


def _tokens(found: DataSummary, settings: DataConfig) -> list[Finding]:
    """Length, and what is lost of it."""
    findings = [
        _finding(
            "ok",
            f"{found.tokens:,} tokens; the longest is row {found.longest_row:,} with"
            f" {found.longest:,}",
        )
    ]
    wider = f"raise `data.max_length` (now {settings.max_length:,}), or shorten the rows"
    if found.truncated_rows:
        many = found.truncated_rows > MUCH * found.rows
        trained = "" if found.per_class else f", {found.trained_cut:,} of them trained,"
        findings.append(
            _finding(
                "warning" if many else "note",
                f"{_share(found.truncated_rows, found.rows)} rows are cut at the right:"
                f" {found.tokens_cut:,} tokens{trained} are lost",
                wider,
            )
        )
    if found.dropped:
        total = found.rows + found.dropped
        findings.append(
            _finding(
                "warning" if found.dropped > MUCH * total else "note",
                f"{_share(found.dropped, total)} rows are too long and left out",
                wider,
            )
        )
    if not found.truncated_rows and not found.dropped:
        findings.append(_finding("ok", "no row is too long"))
    return findings


def _mask(found: DataSummary, layout: str) -> list[Finding]:
    """Which tokens are trained."""
    share = f"{found.trained:,} tokens ({found.trained_share:.1%}) are trained"
    findings = [_finding("ok", f"{share}, at least one in every row")]
    if found.trained_share < FEW_TRAINED:
        hint = "nearly all computing goes into prompts; shorten them if you can"
        findings = [_finding("warning", f"only {share}", hint)]
    if found.scattered:
        findings.append(
            _finding(
                "problem",
                f"the {found.trained:,} trained tokens lie in {found.pieces:,} pieces:"
                " that is no mask of answers",
                "look at the samples: the chat template may mark the wrong tokens",
            )
        )
    ends = f"the token that ends an answer is trained in {{}} of {found.rows:,} rows"
    cut = "answers are cut before their end; raise `data.max_length`"
    if found.ended_rows == found.rows:
        findings.append(_finding("ok", "the token that ends an answer is trained in every row"))
    elif found.ended_rows or layout == "text":
        few = found.ended_rows < (1 - MUCH) * found.rows and layout != "text"
        findings.append(
            _finding("warning" if few else "note", ends.format(f"{found.ended_rows:,}"), cut)
        )
    else:
        text = f"{ends.format('none')}: the model would never learn to stop"
        findings.append(_finding("problem", text, cut))
    if found.straddling:
        findings.append(
            _note(
                f"{found.straddling:,} tokens hold the end of a prompt and the beginning of an"
                " answer; they are not trained"
            )
        )
    return findings


def _bos(found: Inputs, encoded: EncodedRows) -> Finding:
    """Whether rows begin with the token that the model expects there."""
    tokenizer = found.tokenizer
    bos = tokenizer.bos_token_id
    rows = len(encoded.train)
    begun = sum(int(sample.input_ids[0]) == bos for sample in encoded.train)
    if bos is not None and begun == rows:
        return _finding("ok", f"every row begins with one {tokenizer.decode([bos])}")
    if begun:
        text = f"{_share(begun, rows)} rows begin with {tokenizer.decode([bos])}, the others do not"
        return _finding("warning", text, "look at the chat template and at the first rows")
    if own_bos(tokenizer) is not None:
        return _finding(
            "warning",
            f"no row begins with {tokenizer.decode([bos])}, which the tokenizer puts before plain"
            " text",
            "the chat template leaves it out; see whether the base was trained so",
        )
    return _finding(
        "ok", "rows begin without a beginning-of-sequence token: nothing here writes one"
    )


def _classes(found: DataSummary) -> list[Finding]:
    listed = sorted(found.per_class, key=lambda pair: -pair[1])
    (most, many), (least, few) = listed[0], listed[-1]
    details = tuple(f"{name}: {rows:,} rows" for name, rows in listed)
    text = f"{len(listed):,} classes, from {few:,} rows ({least}) to {many:,} ({most})"
    if many < UNEVEN * few:
        return [Finding(area="data", level="ok", text=text, details=details)]
    return [
        Finding(
            area="data",
            level="warning",
            text=f"uneven classes: {text}",
            details=details,
            hint="go by eval_macro_f1, not by eval_accuracy; more rows of the small classes help",
        )
    ]


def _leaked(found: Duplicates, rows: RunRows) -> Finding:
    total = len(rows.eval.examples)
    if not total:
        return _finding("note", "nothing is held out: the run cannot tell learning from memorizing")
    if found.first is None:
        return _finding("ok", "no evaluation row is also a training row")
    evaluated, trained = found.first
    of = "" if rows.eval.source == rows.train.source else f" of {rows.eval.source}"
    return _finding(
        "warning",
        f"{_share(found.count, total)} evaluation rows have the text of a training row: first"
        f" row {evaluated:,}{of}, the same as row {trained:,}",
        "remove the duplicates; the evaluation loss is too good with them",
    )


def _repeated(found: Duplicates, total: int) -> list[Finding]:
    if found.first is None:
        return [_finding("ok", "no training row is there twice")]
    later, earlier = found.first
    findings = [
        _finding(
            "warning" if found.count > MUCH * total else "note",
            f"{_share(found.count, total)} training rows repeat an earlier one: first"
            f" row {later:,}, the same as row {earlier:,}",
            "remove them, unless they are meant to weigh more",
        )
    ]
    if found.contrary:
        text = f"{found.contrary:,} training rows repeat a text with another label"
        findings.append(_finding("warning", text, "correct the labels: both cannot be learned"))
    return findings


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _duplicate_facts(found: Duplicates) -> dict[str, Any]:
    return {
        "rows": found.count,
        "first": None if found.first is None else list(found.first),
        "other_label": found.contrary,
    }


def _summary_facts(found: DataSummary) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "trained_tokens": found.trained,
        "trained_share": found.trained_share,
        "longest_tokens": found.longest,
        "longest_row": found.longest_row,
        "truncated_rows": found.truncated_rows,
        "tokens_cut": found.tokens_cut,
        "trained_cut": found.trained_cut,
        "dropped_rows": found.dropped,
        "ended_rows": found.ended_rows,
        "classes": dict(found.per_class) or None,
    }


# --- targets ----------------------------------------------------------------------------------


def target_part(found: Inputs) -> Part:
    """What the adapter's settings came to on the model's modules."""
    skeleton, table = found.skeleton, found.table
    if skeleton is None or (table is None and not isinstance(found.config.adapter, FullConfig)):
        return Part(findings=())
    trained, total = trainable_parameters(skeleton)
    facts = {"trainable_params": trained, "total_params": total}
    counts = f"{trained:,} of {total:,} parameters ({trained / total:.2%})"
    if table is None:
        text = f"every weight is trained: {counts}"
        return Part(findings=(Finding(area="targets", level="ok", text=text),), facts=facts)
    text = f"{len(table.names):,} layers get an adapter; {counts} are trained"
    findings = [
        Finding(area="targets", level="ok", text=text, details=_table_lines(table)),
        *(Finding(area="targets", level="note", text=note) for note in table.notes),
        *_wide_ranks(table),
    ]
    rows = [
        {
            "pattern": row.pattern,
            "layers": row.count,
            "shapes": [list(shape) for shape in row.shapes],
            "ranks": list(row.ranks),
            "parameters": row.parameters,
        }
        for row in table.rows
    ]
    return Part(
        findings=tuple(findings), facts=facts | {"modules": list(table.names), "rows": rows}
    )


def _table_lines(table: TargetTable) -> tuple[str, ...]:
    """The table without its notes, which are findings of their own."""
    lines = table.lines()
    return tuple(lines[: len(lines) - len(table.notes)])


def _wide_ranks(table: TargetTable) -> list[Finding]:
    """A product B A has no higher rank than the layer's smaller side."""
    wide = [
        (row.pattern, max(row.ranks), min(map(min, row.shapes)))
        for row in table.rows
        if row.ranks and row.shapes and max(row.ranks) > min(map(min, row.shapes))
    ]
    if not wide:
        return []
    pattern, rank, side = wide[0]
    return [
        Finding(
            area="targets",
            level="warning",
            text=f"more rank than a layer can use: r is {rank:,} on {pattern}, whose smaller side"
            f" is {side:,} ({len(wide):,} of {len(table.rows):,} kinds of layers)",
            hint="lower `adapter.r`, or give these layers a rank in `adapter.rank_pattern`",
        )
    ]


# --- tokenizer, embedding and head ------------------------------------------------------------


def vocabulary_part(found: Inputs) -> Part:
    """Tokenizer against embedding, and a head that is tied to it."""
    if found.skeleton is None or found.tokenizer is None:
        return Part(findings=())
    tied, tied_facts = _tied(found.skeleton)
    tokens, rows = len(found.tokenizer), found.skeleton.get_input_embeddings().weight.shape[0]
    facts = {
        "class": type(found.skeleton).__name__,
        "tokenizer_tokens": tokens,
        "embedding_rows": rows,
        **tied_facts,
    }
    return Part(findings=(_vocabulary(found.tokenizer, rows), *tied), facts=facts)


def _vocabulary(tokenizer: Any, rows: int) -> Finding:
    tokens = len(tokenizer)
    text = f"the tokenizer has {tokens:,} tokens, the embedding {rows:,} rows"
    outside = {i: t for t, i in tokenizer.get_vocab().items() if i >= rows}
    if not outside:
        spare = "; the others are never read" if rows > tokens else ""
        return Finding(area="model", level="ok", text=text + spare)
    first = min(outside)
    return Finding(
        area="model",
        level="warning",
        text=f"{text}: {len(outside):,} tokens have none, first `{outside[first]}` ({first:,})",
        hint="no row uses them, but tokenizer and weights may not belong together",
    )


def _tied(model: Any) -> tuple[list[Finding], dict[str, Any]]:
    """Tied weights, and whether the adapter will pull them apart."""
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    modules: dict[str, Any] = dict(base_modules(model))
    if not tied:
        text = "the output head has weights of its own"
        finding = [Finding(area="model", level="ok", text=text)] if _has_head(model) else []
        return finding, {"tied": False, "untied_by_merge": []}
    changed = {*adapted_layers(model), *replaced_modules(model)}
    pulled = sorted({m for m in map(_module_of, _both(tied)) if m in changed})
    facts = {"tied": True, "untied_by_merge": pulled}
    pair = " and ".join(dict.fromkeys(map(_module_of, _both(tied))))
    if not pulled:
        text = f"{pair} share one matrix; the adapter leaves it as it is"
        if not changed:
            text = f"{pair} share one matrix"
        return [Finding(area="model", level="ok", text=text)], facts
    weight = modules[pulled[0]].weight
    return [
        Finding(
            area="model",
            level="note",
            text=f"{pair} share one matrix, and the adapter changes {' and '.join(pulled)}: merging"
            f" writes them apart, {size(2 * weight.numel())} more in 16 bits",
        )
    ], facts


def _both(tied: Mapping[str, str]) -> Iterable[str]:
    return [key for pair in tied.items() for key in pair]


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None
