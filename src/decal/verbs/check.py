"""`decal check`: everything that can be known of a run before real time is spent on it.

Settings, rows, targets, tokenizer and embedding are looked at without weights (findings.py). If
nothing there is an error, the model is loaded as the run would load it, and is asked to learn eight
rows by heart (overfit.py). The answer is ready or not ready; every finding is a sentence, and what
can be done about it. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from decal.config import RunConfig
from decal.data.sample import Sample
from decal.data.stats import show_sample
from decal.errors import (
    AdapterError,
    ConfigError,
    DataError,
    DecalError,
    Interrupted,
    OutputError,
    TargetError,
)
from decal.model import hf
from decal.model.unquantized import left_unquantized
from decal.quant import describe
from decal.report.tables import curve
from decal.store.run import RunFolder
from decal.verbs.findings import (
    Finding,
    Level,
    Part,
    data_part,
    machine,
    of_error,
    target_part,
    vocabulary_part,
)
from decal.verbs.inputs import Inputs, look
from decal.verbs.overfit import FAR, Learning, overfit
from decal.verbs.same_base import base_fingerprint
from decal.verbs.session import Session, begin

__all__ = ["Check", "ShownSample", "check"]

SHOWN = 2
"""Samples that are shown, and one more that was cut where there is one."""

Observe = Callable[[str, int, int], None]

_AREAS: Mapping[type[DecalError], str] = {
    ConfigError: "settings",
    OutputError: "settings",
    DataError: "data",
    TargetError: "targets",
    AdapterError: "targets",
}


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """One row as the model will see it."""

    row: int
    label: str | None
    """Its class, for classification."""
    pieces: tuple[tuple[str, bool], ...]
    """Text, and whether its tokens are trained."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """data, targets, model: the same as plain values; empty where it could not be looked at."""
    learning: Learning | None = None
    """None where the run could not even be prepared."""
    samples: tuple[ShownSample, ...] = ()
    seconds: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether nothing is a problem; warnings do not count."""
        return all(finding.level != "problem" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, always with the same keys."""
        return {
            "ready": self.ready,
            "findings": [asdict(finding) for finding in self.findings],
            **{area: dict(self.facts.get(area, {})) for area in ("data", "targets", "model")},
            "learning": None if self.learning is None else self.learning.as_dict(),
            "samples": [
                {
                    "row": sample.row,
                    "label": sample.label,
                    "pieces": [{"text": t, "trained": trained} for t, trained in sample.pieces],
                }
                for sample in self.samples
            ],
            "seconds": self.seconds,
        }


def check(config: RunConfig, *, observe: Observe | None = None) -> Check:
    """Looks at the run that `config` describes; raises nothing that its settings can cause.

    Args:
        observe: told what is done, steps done and steps in all.
    """
    began = time.perf_counter()
    found = look(config)
    parts = {
        "data": data_part(found),
        "targets": target_part(found),
        "model": vocabulary_part(found),
    }
    findings = [of_error(problem.area, problem.error) for problem in found.problems]
    findings += [*machine(), *(finding for part in parts.values() for finding in part.findings)]
    findings += _output(config)
    learning = None
    session = None if found.problems else _session(found, findings)
    if session is not None:
        loaded = _loaded(session)
        model = {**parts["model"].facts, **loaded.facts}
        parts["model"] = Part(findings=parts["model"].findings + loaded.findings, facts=model)
        findings += loaded.findings
        learning = overfit(session, observe=observe)
        findings += _learning(learning, session)
    order = ("settings", "machine", "data", "targets", "model", "learning")
    return Check(
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.area))),
        facts={area: part.facts for area, part in parts.items()},
        learning=learning,
        samples=_samples(found),
        seconds=time.perf_counter() - began,
    )


def _session(found: Inputs, findings: list[Finding]) -> Session | None:
    """The run, ready to begin; or a finding more."""
    try:
        return begin(found, lambda line: None)
    except Interrupted:
        raise
    except DecalError as error:
        area = next((a for kind, a in _AREAS.items() if isinstance(error, kind)), "model")
        findings.append(of_error(area, error))
        return None


def _output(config: RunConfig) -> list[Finding]:
    """An output folder in use stops `decal train`, but says nothing about the run."""
    try:
        RunFolder.check_new(config.output, force=False)
    except DecalError as error:
        finding = of_error("settings", error)
        return [Finding(area="settings", level="warning", text=finding.text, hint=finding.hint)]
    return []


def _loaded(session: Session) -> Part:
    """What the weights themselves say: how they are stored, whose they are, and attention."""
    model, config = session.model, session.config
    info: hf.BaseInfo = model.decal_base
    bits = session.bits_per_weight
    stored = "as they are" if info.recipe is None else f"as {describe(info.recipe)}"
    fingerprint = base_fingerprint(info.path, info.commit or info.revision)
    texts: list[tuple[Level, str]] = [
        ("ok", f"weights are stored {stored}, {bits:.2f} bits each, on {model.device}"),
        *(("note", line) for line in left_unquantized(model)),
        ("ok", f"the base's fingerprint is {fingerprint[:16]}…"),
    ]
    leak = session.flattening.leak
    if session.flat:
        texts.append(("ok", f"samples side by side do not see each other (differ by {leak:.1g})"))
    elif config.objective != "classify":
        by = "" if leak is None else f" (by {leak:.1g} of the largest logit)"
        texts.append(
            (
                "note",
                f"samples side by side change this model's logits{by}: they are padded instead",
            )
        )
    facts = {
        "format": None if info.recipe is None else info.recipe.format,
        "bits_per_weight": bits,
        "device": str(model.device),
        "dtype": config.base.dtype,
        "fingerprint": fingerprint,
        "flattened": session.flat,
        "leak": leak,
        "steps": session.total_steps,
    }
    findings = [Finding(area="model", level=level, text=text) for level, text in texts]
    return Part(findings=tuple(findings), facts=facts)


_LEVELS: Mapping[str, Level] = {
    "learned": "ok",
    "unclear": "note",
    "skipped": "note",
    "failed": "problem",
}
_ADVICE = {
    "unclear": "nothing need be wrong: train a few dozen steps and look at the loss",
    "skipped": "train a few steps with `--set train.max_steps=20` and look at the loss",
    "failed": "what follows is likely in this order",
}
_REMEDIES = {
    "mask": "look at what is trained in the samples; the chat template and `data.turns` decide it",
    "template": "name a base that was trained on such text, with its own tokenizer and template",
    "learning rate": "change `train.lr`; `train.lr_pattern` and `train.loraplus_lr_ratio` scale it",
    "frozen parameters": "see what is adapted (targets), and leave out what the model does not use",
}


def _learning(found: Learning, session: Session) -> list[Finding]:
    """The verdict with the curve, and one finding for each cause."""
    findings = [
        Finding(
            area="learning",
            level=_LEVELS[found.verdict],
            text=found.reason,
            details=(curve(found.losses),) if found.losses else (),
            hint=_ADVICE.get(found.verdict),
        )
    ]
    findings += [
        Finding(
            area="learning",
            level="problem" if found.verdict == "failed" else "warning",
            text=f"{cause.name}: {cause.text}",
            hint=_REMEDIES[cause.name],
        )
        for cause in found.causes
    ]
    if found.reach is not None and found.reach < FAR:
        way = f"{found.reach:.1%}" if found.reach >= 0.001 else "less than 0.1%"
        text = (
            f"learning rate: all {session.total_steps:,} steps at `train.lr`"
            f" {session.config.train.lr:g} go {way} of the way that halved the loss of eight rows"
        )
        hint = "raise `train.lr`, or train longer; 2e-4 is usual for LoRA"
        findings.append(Finding(area="learning", level="warning", text=text, hint=hint))
    return findings


def _samples(found: Inputs) -> tuple[ShownSample, ...]:
    if found.encoded is None or found.rows is None:
        return ()
    samples = found.encoded.train
    cut = [sample for sample in samples[SHOWN:] if sample.truncated][:1]
    classes = found.rows.classes or ()

    def shown(sample: Sample) -> ShownSample:
        label = None if sample.label is None else classes[sample.label]
        pieces = tuple(show_sample(sample, found.tokenizer))
        return ShownSample(row=sample.row, label=label, pieces=pieces)

    return tuple(map(shown, [*samples[:SHOWN], *cut]))
