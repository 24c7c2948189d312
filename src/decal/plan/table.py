"""A plan as it is shown: a column for each way to train, a row for each part. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decal.markup import grid, join, tag
from decal.plan.cards import Card
from decal.plan.memory import Peak
from decal.plan.units import gigabytes
from decal.quant import describe
from decal.quant.base import Recipe

LABEL, COLUMN = 23, 11
"""Characters of the first column, and of each of the others: five of them fit into 80."""
PARTS = {
    "weights": "weights",
    "adapter": "float32 masters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss",
    "buffers": "buffers",
    "holes": "holes in the heap",
    "overlap": "not at one time",
    "process": "process",
}
"""Part of a peak -> its row."""


Row = tuple[str, list[str]]
"""A label and a cell for each way."""


@dataclass(frozen=True)
class Limit:
    """How much memory there is."""

    name: str
    """As it was given, or a card's."""
    bytes: int
    card: Card | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train a model."""

    name: str
    """full, lora, int8, nf4, nf4 double, or a run's own recipe."""
    way: str
    """full | lora"""
    recipe: Recipe | None
    trained: int
    """Parameters that are trained."""
    peak: Peak
    """As the settings say."""
    checkpointed: Peak
    """With gradient checkpointing."""
    checkpointing: bool
    """Whether the settings say so."""
    adapter_bytes: int
    """Of the adapter's file; 0 where there is none."""
    merged_bytes: int
    """Of the model's files in 16 bits, merged or trained."""
    operations: float
    """Of a token, forward and backward."""
    tokens_per_second: float | None
    """At the measured rate of this machine, or a card's assumed one; None if neither is known."""
    run_tokens: int
    """Tokens of the run, or of a thousand steps; 0 if unknown."""
    refused: str | None
    """Why the model cannot be trained in this way."""

    @property
    def seconds(self) -> float | None:
        """Time of the run, or of a thousand steps."""
        speed = self.tokens_per_second
        return None if speed is None or not self.run_tokens else self.run_tokens / speed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training needs, in every way that was asked about. Sizes are in bytes."""

    model: str
    parameters: int
    layers: int
    dtype: str
    device: str
    """cpu | cuda"""
    adapter: str
    """Rank, targets and trained parameters, in words."""
    rows: str
    """Samples and micro-batches, in words."""
    methods: tuple[Method, ...]
    wanted: str | None
    """The name of the method that a run.yaml asks for."""
    limit: Limit | None
    change: Mapping[str, str] | None
    """The cheapest change that makes it fit: settings by name; empty where none does; None where
    nothing has to change."""
    calibrated: bool
    """Whether speeds were measured on this machine."""

    @property
    def fits(self) -> bool | None:
        """Whether the wanted run fits, or of a model any way; None where no limit was given."""
        if self.limit is None:
            return None
        asked = [m for m in self.methods if self.wanted in (None, m.name) and not m.refused]
        return any(m.peak.bytes <= self.limit.bytes for m in asked)

    def method(self, name: str) -> Method:
        """The method of this name."""
        return next(m for m in self.methods if m.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "layers": self.layers,
            "dtype": self.dtype,
            "device": self.device,
            "adapter": self.adapter,
            "rows": self.rows,
            "wanted": self.wanted,
            "limit_bytes": self.limit and self.limit.bytes,
            "fits": self.fits,
            "change": None if self.change is None else dict(self.change),
            "methods": [_method_dict(m) for m in self.methods],
        }

    def lines(self) -> list[str]:
        """The plan as text, at most 80 characters wide with the five usual ways."""
        return [
            f"{self.model}: {self.parameters:,} parameters in {self.layers} layers;"
            f" computes in {self.dtype}",
            self.adapter,
            self.rows,
            self._where(),
            "",
            self._row("", [_head(m)[0] for m in self.methods]),
            self._row("GB", [self._marked(m) for m in self.methods]),
            *(self._row(*row) for row in self._parts()),
            "",
            *(self._row(*row) for row in self._costs()),
            *self._notes(),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """The plan in a notebook: a column for each way, notes below."""
        head = ["GB", *(" ".join((_head(m)[0], self._marked(m))) for m in self.methods)]
        rows = [[label, *cells] for label, cells in (*self._parts(), *self._costs())]
        notes = [tag("div", line) for line in (self.adapter, self.rows, self._where())]
        notes += [tag("div", line) for line in self._notes() if line]
        return join((grid(head, rows, title=self.lines()[0]), *notes))

    def _marked(self, method: Method) -> str:
        return "*" * (method.name == self.wanted) + _head(method)[1]

    def _where(self) -> str:
        if self.limit is None:
            return "on this CPU" if self.device == "cpu" else "on a GPU"
        if self.limit.card is not None:
            name, kept = self.limit.name, "half a GiB is kept for the driver"
            return f"on a {name} with {self.limit.bytes / 1e9:.1f} GB; {kept}"
        place = "on this CPU" if self.device == "cpu" else "on a GPU"
        return f"{place} with {self.limit.bytes / 1e9:.2f} GB (10^9 bytes)"

    def _parts(self) -> list[Row]:
        found = []
        for part, label in PARTS.items():
            if any(getattr(m.peak, part) for m in self.methods):
                sizes = [self._size(m, getattr(m.peak, part)) for m in self.methods]
                found.append((label, sizes))
        found.append(("peak", [self._size(m, m.peak.bytes) for m in self.methods]))
        if not all(m.checkpointing for m in self.methods):
            cells = [self._size(m, m.checkpointed.bytes) for m in self.methods]
            found.append(("  with checkpointing", cells))
        if self.limit is not None:
            cells = [self._verdict(m) for m in self.methods]
            found.append((f"fits {self.limit.name}"[:LABEL], cells))
        return found

    def _costs(self) -> list[Row]:
        files = [
            f"{m.adapter_bytes / 1e6:,.1f} MB" if m.adapter_bytes else "-" for m in self.methods
        ]
        found = [
            ("disk: adapter", files),
            ("disk: 16-bit model", [self._size(m, m.merged_bytes) for m in self.methods]),
            ("GFLOP a token", [f"{m.operations / 1e9:,.1f}" for m in self.methods]),
        ]
        if any(m.tokens_per_second for m in self.methods):
            found.append(("tokens/s", [_speed(m) for m in self.methods]))
            label = "time of the run" if self.wanted else "1,000 steps"
            found.append((label, [_time(m.seconds) for m in self.methods]))
        return found

    def _notes(self) -> list[str]:
        found = []
        if self.wanted is not None:
            found.append(f"*: what the settings ask for ({self.wanted})")
        if self.device == "cpu" and any(m.peak.mapped for m in self.methods):
            found.append(
                "16-bit weights are mapped from files; a run reports its peak without them"
            )
        card = self.limit.card if self.limit is not None else None
        if card is not None:
            found.append(
                "estimated for a GPU that is not here; times at 35 % of the published"
                f" {card.teraflops:,.0f} TFLOP/s"
            )
        found += dict.fromkeys(f"-: {m.refused}" for m in self.methods if m.refused)
        if self.change:
            words = [f"{key}={value}" for key, value in self.change.items()]
            shown = " ".join(f"--set {word}" for word in words) if self.wanted else ", ".join(words)
            found.append(f"the cheapest change that fits: {shown}")
        elif self.change is not None:
            found.append("nothing that can be changed in these settings makes it fit")
        return ["", *found] if found else []

    def _row(self, label: str, cells: list[str]) -> str:
        return f"{label:<{LABEL}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)

    def _size(self, method: Method, size: int) -> str:
        return "-" if method.refused else gigabytes(size)

    def _verdict(self, method: Method) -> str:
        assert self.limit is not None
        if method.refused:
            return "-"
        if method.peak.bytes <= self.limit.bytes:
            return "yes"
        return "with ckpt." if method.checkpointed.bytes <= self.limit.bytes else "no"


def _head(method: Method) -> tuple[str, str]:
    """The two lines above a column."""
    if method.way == "full":
        return "full", "fine-tuning"
    if method.recipe is None:
        return "LoRA", "16-bit"
    return "QLoRA", {"nf4": "nf4 single"}.get(method.name, method.name)


def _speed(method: Method) -> str:
    speed = method.tokens_per_second
    if speed is None or method.refused:
        return "-"
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _time(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.4 h`, `2.1 d`."""
    if seconds is None:
        return "-"
    for size, unit in ((86400 * 2, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            scale = 86400 if unit == "d" else size
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.0f} s"


def _method_dict(method: Method) -> dict[str, Any]:
    recipe = None if method.recipe is None else describe(method.recipe)
    return {
        "name": method.name,
        "quant": recipe,
        "refused": method.refused,
        "trained_params": method.trained,
        "peak_bytes": method.peak.bytes,
        "reported_bytes": method.peak.reported,
        "parts": method.peak.parts,
        "mapped_bytes": method.peak.mapped,
        "loading_bytes": method.peak.loading,
        "checkpointed_bytes": method.checkpointed.bytes,
        "adapter_bytes": method.adapter_bytes,
        "merged_bytes": method.merged_bytes,
        "flops_per_token": method.operations,
        "tokens_per_second": method.tokens_per_second,
        "run_tokens": method.run_tokens,
        "seconds": method.seconds,
    }
