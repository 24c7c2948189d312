"""`decal train`: settings in, a run folder with a trained adapter out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from decal.config import RunConfig
from decal.markup import facts
from decal.plan.memory import Peak
from decal.report import live, trackers
from decal.report.figures import spectrum_figure
from decal.report.plots import loss_figure
from decal.store.run import RunFolder
from decal.train.events import Event, Note, Result
from decal.train.exact import set_workspace
from decal.train.loop import train as run_loop
from decal.verbs.findings import before
from decal.verbs.inputs import look, refuse_own_output
from decal.verbs.leaves import finish, job_of, open_run, result_info, tidy, write_info
from decal.verbs.planned import planned, planned_info, verdict
from decal.verbs.report import NAME
from decal.verbs.session import Say, Session, begin
from decal.verbs.spectrum import spectrum


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """A finished run."""

    run: Path
    weights: Path
    """The adapter folder, or the model folder of a full fine-tuning."""
    result: Result
    scores: dict[str, float]
    """How well the evaluation rows are predicted (`Session.scores`); empty without any."""
    trainable_params: int
    total_params: int
    session: Session
    """The model with its adapter, still loaded."""

    def summary(self) -> dict[str, Any]:
        """The run in a few facts, for printing; what did not happen is left out."""
        result = result_info(self.result)
        rare = {key for key in ("stopped", "skipped", "micro_batch_tokens") if not result[key]}
        return {
            "run": str(self.run),
            "weights": str(self.weights),
            "trainable_params": self.trainable_params,
            "total_params": self.total_params,
            **{key: value for key, value in result.items() if key not in rare},
            **self.scores,
        }

    def plot(self) -> Figure:
        """The loss curve as a matplotlib figure."""
        return loss_figure(RunFolder.look(self.run).metrics(), self.run.name)

    def spectrum(self) -> Figure:
        """The size of what the adapter learned, by layer and module, as a matplotlib figure.

        Raises AdapterError for a full fine-tuning, which has no adapter.
        """
        return spectrum_figure(spectrum(self.run), title=self.run.name)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.summary().items())
        return f"RunResult({facts})"

    def _repr_html_(self) -> str:
        """The run in a notebook: its numbers, and where its report lies."""
        report = {"report": str(self.run / NAME)} if (self.run / NAME).exists() else {}
        return facts({name: _shown(value) for name, value in {**self.summary(), **report}.items()})


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    check: bool = True,
    allow_other_base: bool = False,
    observe: Callable[[Event], None] | None = None,
    say: Say | None = None,
) -> RunResult | None:
    """Trains what `config` says into the run folder `config.output`.

    Args:
        resume: go on from the newest checkpoint of that folder; the settings must be the same,
            apart from `MAY_CHANGE`.
        force: remove an earlier run there.
        dry_run: stop before step 1; nothing is written and None is returned.
        check: look at data, targets and model as `decal check` does, beyond what cannot be trained
            at all: problems are errors, warnings are told to `observe`.
        allow_other_base: warn where an adapter to go on with (adapter.from) was trained on another
            base, instead of refusing.
        observe: called with every event of the loop; without it a notebook shows the progress.
        say: called with lines about what was found and done.

    Raises:
        ConfigError: settings that contradict each other or the run that is resumed.
        OutputError: the folder is in use.
        TrainingError, StorageError, Interrupted: see `decal.train.loop`; and all of `prepare`'s.
    """
    set_workspace()
    say = say or (lambda line: None)
    observe = tidy(observe or _nearby())
    refuse_own_output(config)
    ready = partial(_prepare, config, check, allow_other_base, observe, say)
    if dry_run:
        say(f"{ready().total_steps:,} steps; dry run, nothing written")
        return None
    if not resume:  # before the wait for model and data, and again when the folder is made
        RunFolder.check_new(config.output, force=force)
        session = ready()
    with open_run(config, resume=resume, force=force) as run:
        if resume:
            session = ready()
        expected = planned(session)
        write_info(session, run, planned_info(expected))
        with session.training(), reporting(config, run, observe) as report:
            result = run_loop(job_of(session, run, report, resume))
        weights, scores = finish(session, run, result, observe)
    _say_memory(expected, result, say, observe)
    trainable, total = session.sizes()
    return RunResult(
        run=run.path,
        weights=weights,
        result=result,
        scores=scores,
        trainable_params=trainable,
        total_params=total,
        session=session,
    )


def _say_memory(expected: Peak, result: Result, say: Say, observe: Callable[[Event], None]) -> None:
    """What was planned and what was measured; a warning where they are far apart."""
    line, warning = verdict(expected, result.memory.bytes)
    say(line)
    if warning is not None:
        observe(Note(text=warning))


def _prepare(
    config: RunConfig,
    check: bool,
    allow_other_base: bool,
    observe: Callable[[Event], None],
    say: Say,
) -> Session:
    """The run, ready to begin; with `check` after a look at what is merely doubtful."""
    found = look(config)
    found.allow_other_base = allow_other_base
    for finding in before(found) if check and not found.problems else ():
        if finding.level == "problem":
            found.problems.append(finding.as_problem("--no-check trains anyway"))
        elif finding.level == "warning":
            observe(Note(text=finding.line()))
    return begin(found, say)


def _nearby() -> Callable[[Event], None]:
    """Who looks on where nobody was named: the notebook, if this runs in one."""
    send = live.notebook()
    return live.Live(send).observe if send is not None else lambda event: None


@contextmanager
def reporting(
    config: RunConfig, run: RunFolder, observe: Callable[[Event], None]
) -> Iterator[Callable[[Event], None]]:
    """The observer, after the trackers of `train.report_to`."""
    settings = config.model_dump(mode="json")

    def warn(text: str) -> None:
        observe(Note(text=text))

    with trackers.tracking(config.train.report_to, run.path, settings, warn) as tracking:

        def report(event: Event) -> None:
            tracking.observe(event)
            observe(event)

        yield report
