"""What a run begins with, weights apart: rows, tokenizer, and the adapter on a skeleton.

Everything that can be wrong before the weights are read is found here, in seconds and all at once:
one problem does not hide the next, so bad rows, a target that matches nothing and settings that
contradict each other come in one error. The skeleton has the names and shapes of the model and no
weights; quantizing it and attaching the adapter to it meets whatever will be met on the real one.

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from decal.config import ContinueConfig, FullConfig, LoraConfig, QuantConfig, RunConfig
from decal.data.sample import Sample
from decal.errors import ConfigError, DataError, DecalError, Interrupted, OutputError
from decal.model import heads, hf, names
from decal.model.adapter import Adapter
from decal.model.hub import commit_of
from decal.model.inject import attach
from decal.model.quantizer import quantize_skeleton
from decal.model.rates import learning_rates
from decal.model.targets import TargetTable
from decal.report import trackers
from decal.train import eightbit
from decal.verbs.load import as_recipe, labels_of
from decal.verbs.rows import EncodedRows, RunRows, encode, read_run_rows
from decal.verbs.target import read
from decal.verbs.text import context_length

ADAPTER = "default"

Found = TypeVar("Found")


@dataclass(frozen=True)
class Problem:
    """Something that keeps the run from starting."""

    area: str
    """settings | data | targets | model"""
    error: DecalError


@dataclass(kw_only=True)
class Inputs:
    """All of it; what could not be had is None, and `problems` says why."""

    config: RunConfig
    problems: list[Problem] = field(default_factory=list)
    commit: str | None = None
    """What the base's revision means on the hub, asked for once; None for a folder."""
    going_on: Adapter | None = None
    """The adapter that training goes on with."""
    rows: RunRows | None = None
    tokenizer: Any = None
    encoded: EncodedRows | None = None
    skeleton: Any = None
    """On the meta device, with the adapter; also None where the code of a model cannot be built
    without weights."""
    table: TargetTable | None = None
    """What the adapter came to; None where every weight is trained."""
    allow_other_base: bool = False
    """Whether to go on with an adapter on a base that it was not trained on, with a warning."""

    @property
    def place(self) -> dict[str, Any]:
        """Which files of the base are meant, for whatever reads them."""
        base = self.config.base
        revision = self.commit or base.revision
        return {"revision": revision, "trust_remote_code": base.trust_remote_code}

    def attempt(self, area: str, work: Callable[[], Found]) -> Found | None:
        """What `work` gives, or None after its error was noted; the same error is noted once."""
        try:
            return work()
        except Interrupted:
            raise
        except DecalError as error:
            if str(error) not in [str(known.error) for known in self.problems]:
                self.problems.append(Problem(area, error))
            return None

    def refuse(self) -> None:
        """Raises all problems as one error; a single one as itself."""
        if not self.problems:
            return
        if len(self.problems) == 1:
            raise self.problems[0].error
        details = [
            line
            for problem in self.problems
            for line in (
                f"{problem.area}: {problem.error.message}",
                *(f"  {detail}" for detail in problem.error.details),
            )
        ]
        hints = dict.fromkeys(p.error.hint for p in self.problems if p.error.hint)
        raise type(self.problems[0].error)(
            f"{len(self.problems)} problems keep the run from starting",
            details=details,
            hint="; ".join(hints) or None,
        )


def look(config: RunConfig) -> Inputs:
    """Reads and builds all that can be had; raises nothing that a user can cause."""
    base = config.base
    found = Inputs(config=config)
    found.attempt("settings", lambda: refuse_contradictions(config))
    known = _going_on(found)
    found.rows = rows = found.attempt("data", lambda: read_run_rows(config, known))
    folder = found.attempt(
        "model", lambda: hf.local_folder(base.path, base.revision, weights=False)
    )
    if folder is not None:
        found.commit = None if Path(expanduser(base.path)).is_dir() else commit_of(folder)
        found.skeleton = found.attempt("model", lambda: _skeleton(found, known))
        found.tokenizer = found.attempt(
            "model", lambda: hf.load_tokenizer(base.path, **found.place)
        )
    if rows is not None and found.tokenizer is not None:
        found.encoded = found.attempt("data", lambda: encode(rows, found.tokenizer, config))
    _attach_to_skeleton(found)
    return found


def look_again(found: Inputs, config: RunConfig) -> Inputs:
    """As `look`, for settings with the same base and data: what was read for `found` is taken.

    Rows are read again where the seed decides which of them are held out.
    """
    again = replace(found, config=config, problems=[], going_on=None, skeleton=None, table=None)
    again.attempt("settings", lambda: refuse_contradictions(config))
    known = _going_on(again)
    if row_seed(config) != row_seed(found.config) and found.tokenizer is not None:
        again.encoded = None
        again.rows = rows = again.attempt("data", lambda: read_run_rows(config, known))
        if rows is not None:
            again.encoded = again.attempt("data", lambda: encode(rows, found.tokenizer, config))
    if found.skeleton is not None:
        again.skeleton = again.attempt("model", lambda: _skeleton(again, known))
        _attach_to_skeleton(again)
    return again


def row_seed(config: RunConfig) -> int | None:
    """What decides which rows are trained on and which are held out; None where no seed does."""
    drawn = config.data.shuffle or isinstance(config.data.eval, float)
    return config.train.seed if drawn else None


def _going_on(found: Inputs) -> tuple[str, ...] | None:
    """Reads the adapter that training goes on with, if there is one; its classes, if it has any."""
    asked = found.config.adapter
    if not isinstance(asked, ContinueConfig):
        return None
    found.going_on = going_on = found.attempt("targets", lambda: read(asked.from_)[1])
    return None if going_on is None else found.attempt("targets", lambda: labels_of(going_on))


def _attach_to_skeleton(found: Inputs) -> None:
    """Meets on the skeleton what the model would meet; and the rows, what it has no place for."""
    config = found.config
    if found.skeleton is None:
        return
    found.attempt("model", lambda: _quantize(found.skeleton, config))
    found.table = found.attempt("targets", lambda: _attached(found))
    if found.table is not None or isinstance(config.adapter, FullConfig):
        found.attempt("settings", lambda: rates(trained(found.skeleton), config))
    if (encoded := found.encoded) is not None:
        samples = [*encoded.train, *encoded.eval]
        found.attempt("model", lambda: refuse_other_vocabulary(found.skeleton, samples))
        found.attempt("data", lambda: refuse_beyond_context(found.skeleton, samples))


def make_trainable(
    model: Any,
    config: RunConfig,
    going_on: Adapter | None,
    new: tuple[str, ...],
    *,
    name: str = ADAPTER,
    allow_other_base: bool = False,
) -> TargetTable | None:
    """Attaches the adapter that the settings ask for, or frees every weight and returns None.

    Args:
        new: parameters of a classification head that the base's files lack; they are trained.
        name: what to call the adapter; dropout is that of `ADAPTER`, whatever it is called.

    Raises:
        AdapterError, TargetError: see `attach`.
    """
    asked = config.adapter
    if isinstance(asked, FullConfig):
        model.requires_grad_(True)
        return None
    if going_on is not None:
        return attach(model, going_on, name, allow_other_base=allow_other_base, drops_as=ADAPTER)
    assert isinstance(asked, LoraConfig)
    head = heads.new_modules(new, model.base_model_prefix)
    whole = tuple(dict.fromkeys((*asked.modules_to_save, *head)))
    lora = asked.model_copy(update={"modules_to_save": whole})
    return attach(model, lora, name, seed=config.train.seed, drops_as=ADAPTER)


def trained(model: Any, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """What is trained of one adapter, or of a whole model, by name.

    The names are those that the adapter's parameters have in a run of its own, under `ADAPTER`.
    """
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if name == ADAPTER:
        return found
    own, usual = f".adapters.{name}.", f".adapters.{ADAPTER}."
    return {n.replace(own, usual): p for n, p in found.items() if own in n}


def rates(names: Iterable[str], config: RunConfig) -> dict[str, float]:
    """Factors on the learning rate by parameter name; raises ConfigError (`model/rates.py`)."""
    return learning_rates(
        list(names),
        ratio=config.train.loraplus_lr_ratio,
        patterns=config.train.lr_pattern,
    )


def refuse_contradictions(config: RunConfig) -> None:
    """Settings that cannot be right together, or not on this machine.

    Raises:
        ConfigError: something to evaluate with and nothing to evaluate on, or a missing package.
        OutputError: see `refuse_own_output`.
    """
    trackers.require(config.train.report_to)
    eightbit.require(config.train.optimizer, hf.pick_device(config.base.device))
    for name in ("eval_every", "early_stopping"):
        if config.data.eval is None and getattr(config.train, name):
            raise ConfigError(
                f"`train.{name}` is set, but `data.eval` is null: there is nothing to evaluate on",
                hint=f"set `data.eval: 0.05`, or leave `train.{name}` out",
            )
    refuse_own_output(config)


def refuse_own_output(config: RunConfig) -> None:
    """The run folder, which --force replaces, must not hold base or adapter; OutputError."""
    output = Path(config.output)
    needed = {"base": Path(expanduser(config.base.path))}
    if isinstance(config.adapter, ContinueConfig):
        needed["adapter"] = Path(expanduser(config.adapter.from_))
    for what, path in needed.items():
        if path.is_dir() and output.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(
                f"output `{output}` holds the {what} `{path}`", hint="choose another output"
            )


def refuse_other_vocabulary(model: Any, samples: list[Sample]) -> None:
    """A tokenizer of another model makes ids that the embedding does not have; DataError."""
    rows = model.get_input_embeddings().weight.shape[0]
    worst = max(samples, key=lambda sample: int(sample.input_ids.max()))
    if int(worst.input_ids.max()) >= rows:
        raise DataError(
            f"the tokenizer makes token {int(worst.input_ids.max())},"
            f" the embedding has {rows} rows",
            details=[f"first seen in row {worst.row}"],
            hint="tokenizer and weights do not belong together",
        )


def refuse_beyond_context(model: Any, samples: list[Sample]) -> None:
    """Positions that the model never saw mean nothing to it, or do not exist; DataError."""
    context = context_length(model)
    long = [sample for sample in samples if context is not None and len(sample) > context]
    if long:
        raise DataError(
            f"{len(long)} of {len(samples)} rows are longer than the model's context of"
            f" {context:,} tokens",
            details=[f"row {long[0].row} has {len(long[0]):,} tokens"],
            hint=f"set `data.max_length: {context}`",
        )


def _skeleton(found: Inputs, known: tuple[str, ...] | None) -> Any:
    """None for a model whose own code cannot be built without weights; loading will tell."""
    config, labels = found.config, known
    if config.objective == "classify":
        labels = (found.rows and found.rows.classes) or known
        labels = labels or ("0", "1")  # any two: no row says better
    try:
        return names.skeleton(config.base.path, **found.place, labels=labels)
    except DecalError:
        raise
    except Exception:
        return None


def _quantize(skeleton: Any, config: RunConfig) -> None:
    quant: QuantConfig = config.quant
    recipe = as_recipe(quant)
    if recipe is not None:
        quantize_skeleton(skeleton, recipe, quant.skip_modules)


def _attached(found: Inputs) -> TargetTable | None:
    if isinstance(found.config.adapter, ContinueConfig) and found.going_on is None:
        return None
    return make_trainable(found.skeleton, found.config, found.going_on, _new_head(found))


def _new_head(found: Inputs) -> tuple[str, ...]:
    """Parameters of a classification head, unless the files' own is for these very labels."""
    labels = heads.labels_of(found.skeleton)
    if labels is None:
        return ()
    config = hf.load_config(found.config.base.path, **found.place)
    if heads.stored_labels(config) == labels:
        return ()
    named = found.skeleton.named_parameters()
    return tuple(name for name, _ in named if heads.in_head(found.skeleton, name))
