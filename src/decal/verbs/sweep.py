"""`decal sweep`: many candidates, one base, and every candidate an ordinary run.

Candidates that share base and rows are attached to one model and go through it together
(train/together.py); each has its run folder, its checkpoints and its adapter as if it had been
trained alone, and is held to what it would have been alone. What is not a candidate's own, the
grid and who is over, is in the sweep folder, so that a sweep that was killed goes on where each
candidate was.

More candidates than memory has room for are trained in waves over the base that is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from decal.config import RunConfig
from decal.errors import ConfigError
from decal.model.heap import give_back_freed
from decal.model.inject import adapters_of, detach
from decal.model.state import train_only
from decal.objectives import OBJECTIVES
from decal.plan.memory import Peak
from decal.runfile import dump_run, parse_run
from decal.store.run import RunFolder
from decal.store.sweep import SweepFolder
from decal.train.events import Event, Job, Note, Result
from decal.train.exact import set_workspace
from decal.train.halving import Halving
from decal.train.together import Judge, Outcome, train_together
from decal.verbs import joint, plateau
from decal.verbs.findings import before
from decal.verbs.grid import Candidate, candidate, candidates, groups, joinable, lines, shared
from decal.verbs.inputs import Inputs, look, look_again, row_seed
from decal.verbs.leaves import finish, job_of, open_run, tidy, write_info
from decal.verbs.loss import head_of
from decal.verbs.planned import planned, planned_info, verdict
from decal.verbs.report import gather, write_report
from decal.verbs.session import Say, Session, begin, beside
from decal.verbs.swept import SweepResult, Tried
from decal.verbs.train import reporting
from decal.verbs.waves import expected, waves

RANK, SEED = "adapter.r", "train.seed"
OVER = ("done", "stopped")
"""What failed is tried again when the sweep is resumed, from its last checkpoint."""

Observe = Callable[[str | None, Event], None]
"""Hears the name of a candidate, or None for all of them, and what happened."""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How a sweep chooses, beside its grid."""

    until_plateau: bool = False
    """Double r until the evaluation loss stops improving."""
    threshold: float | None = None
    """Share of the loss that counts as an improvement; None goes by two seeds."""
    halving: bool = False
    """End losing candidates early."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not (self.until_plateau and 0 < self.threshold < 1):
            raise ConfigError(
                f"a threshold of {self.threshold:g} means nothing here: it is a share between 0 and"
                " 1, and goes with --until-plateau",
                hint="--until-plateau --threshold 0.01",
            )

    def state(self) -> dict[str, Any]:
        """For sweep.json."""
        return dict(vars(self))


def sweep(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    *,
    until_plateau: bool = False,
    threshold: float | None = None,
    halving: bool = False,
    memory: int | None = None,
    samples: int = 0,
    resume: bool = False,
    force: bool = False,
    observe: Observe | None = None,
    say: Say | None = None,
) -> SweepResult:
    """Trains the candidates of a grid over one base, into `config.output`.

    Args:
        config: the run that candidates vary; each trains into a folder below its output.
        grid: dotted keys of settings and their values: {"adapter.r": [4, 8, 16]}.
        until_plateau: double r, from 4 or from the one value of adapter.r in the grid, until the
            evaluation loss stops improving.
        threshold: the share of the loss that counts as an improvement; without it two seeds of
            each rank are trained, and their difference is the noise.
        halving: end losing candidates early, never the last two.
        memory: bytes that may be taken; without it what is free.
        samples: so many evaluation rows are answered by the base and all candidates, for the
            report.
        resume: go on with the sweep of that folder; config, grid and ways must be the same.
        force: remove an earlier sweep there.
        observe: hears every candidate's events.
        say: called with lines about what was found and done.

    Raises:
        ConfigError: a grid that is none, or another than that of the sweep that is resumed.
        OutputError: the folder is in use.
        TrainingError: one candidate alone needs more than `memory`.
        StorageError, Interrupted: every candidate has its checkpoint.
        Whatever a run of the first candidate's settings raises before step 1.
    """
    set_workspace()
    ways = Ways(until_plateau=until_plateau, threshold=threshold, halving=halving)
    say = say or (lambda line: None)
    observe = observe or (lambda name, event: None)
    first = _first_round(config, grid, ways)
    for line in lines(config, grid):
        say(line)
    rows = _Rows()
    seen = [rows.looked_at(group) for group in groups(first)]
    for [(_, found), *_others] in seen:
        _refuse_problems(found, observe)
    if not resume:
        SweepFolder.check_new(config.output, force=force)
    with _opened(config, grid, ways, first, resume=resume, force=force) as folder:
        work = _Work(folder, config, ways, memory, observe, say)
        for inputs in seen:
            work.train(inputs)
        verdict = work.double(rows) if until_plateau else None
        advice = _reported(folder.path, samples, observe)
        tried = tuple(work.tried())
        return SweepResult(sweep=folder.path, tried=tried, verdict=verdict, advice=advice)


def _reported(sweep: Path, samples: int, observe: Observe) -> str:
    """Writes the report and gives what it recommends. The sweep is whole without it."""
    try:
        page, out = gather(sweep, samples=samples)
        write_report(page, out)
        return page.advice.text
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        text = f"the sweep is whole, but its report could not be written: {reason}"
        observe(None, Note(text=text))
        return ""


def _first_round(
    config: RunConfig, grid: Mapping[str, Sequence[Any]], ways: Ways
) -> list[Candidate]:
    if not ways.until_plateau:
        found = candidates(config, grid)
        if config.data.eval is None and ways.halving:
            raise ConfigError(
                "halving compares evaluations, but `data.eval` is null",
                hint="set `data.eval: 0.05`",
            )
        return found
    if set(grid) - {RANK} or len(grid.get(RANK, ())) > 1:
        raise ConfigError(
            "--until-plateau varies adapter.r by itself",
            hint="leave --grid out, or give it the rank to begin with: --grid adapter.r=8",
        )
    if config.data.eval is None:
        raise ConfigError(
            "--until-plateau goes by the evaluation loss, but `data.eval` is null",
            hint="set `data.eval: 0.05`",
        )
    [start] = grid.get(RANK, [plateau.FIRST])
    # Through the grid's own checks, so that a wrong rank is refused as there.
    candidates(config, {RANK: [start]})
    return [each for r in (start, 2 * start) for each in _of_rank(config, r, ways)]


def _of_rank(config: RunConfig, r: int, ways: Ways) -> list[Candidate]:
    """The runs that judge one rank: two seeds, or one where a threshold was named."""
    if ways.threshold is not None:
        return [candidate(config, {RANK: r})]
    seeds = [config.train.seed + i for i in range(plateau.SEEDS)]
    return [candidate(config, {RANK: r, SEED: seed}) for seed in seeds]


def _refuse_problems(found: Inputs, observe: Observe) -> None:
    """What `decal check` finds of a group's first candidate, as `decal train` does."""
    for finding in before(found):
        if finding.level == "problem":
            way_out = "train a run with --no-check to see it all the same"
            raise finding.as_problem(way_out).error
        if finding.level == "warning":
            observe(None, Note(text=finding.line()))


Looked = list[tuple[Candidate, Inputs]]


class _Rows:
    """What candidates begin with; base and data of a group, and the rows of a seed, read once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int | None], Inputs] = {}

    def looked_at(self, group: Sequence[Candidate]) -> Looked:
        """Of each candidate of a group; all problems of one are raised as one error."""
        looked: Looked = []
        for each in group:
            key = shared(each.config), row_seed(each.config)
            near = [found for known, found in self._seen.items() if known[0] == key[0]]
            known = self._seen.get(key, near[0] if near else None)
            found = look_again(known, each.config) if known else look(each.config)
            found.refuse()
            self._seen.setdefault(key, found)
            looked.append((each, found))
        return looked


def _opened(
    config: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    ways: Ways,
    first: Sequence[Candidate],
    *,
    resume: bool,
    force: bool,
) -> SweepFolder:
    asked = {"grid": {key: list(values) for key, values in grid.items()}, "ways": ways.state()}
    if not resume:
        state = {**asked, "candidates": [each.entry("waiting") for each in first]}
        return SweepFolder.create(config.output, dump_run(config), state, force=force)
    folder = SweepFolder.open(config.output)
    try:
        before = parse_run(folder.settings, name=str(folder.path / "sweep.yaml"))
        state = folder.read()
        known = {key: state.get(key) for key in asked}
        if before != config or known != asked:
            what = "settings" if before != config else "candidates"
            raise ConfigError(
                f"the sweep `{folder.path}` began with other {what}",
                hint="resume it with what it began with (sweep.yaml, sweep.json), or start over"
                " with --force",
            )
    except BaseException:
        folder.close()
        raise
    return folder


@dataclass
class _Work:
    """A sweep under way."""

    folder: SweepFolder
    config: RunConfig
    ways: Ways
    memory: int | None
    observe: Observe
    say: Say
    seen: set[str] = field(default_factory=set)
    """Candidates that were trained, or were over, in this sitting."""
    base: _Base | None = None
    """The one that is loaded."""

    def train(self, looked: Looked) -> None:
        """Trains those candidates of a group that are not over, wave by wave."""
        for each, _ in looked:
            self.seen.add(each.name)
            self._note(each, None)
        statuses = self._statuses()
        left = {e.name: (e, found) for e, found in looked if statuses[e.name] not in OVER}
        if not left:
            return
        names = [each.name for each, _ in looked]
        base = self._on_base(*next(iter(left.values())))
        together = [each for each, _ in left.values() if joinable(each.config)]
        for wave in waves(base.session, together, self.memory, self.say):
            self._wave(base, [left[each.name] for each in wave], names)
        for each, found in left.values():
            if not joinable(each.config):
                self._wave(base, [(each, found)], names)

    def _on_base(self, first: Candidate, found: Inputs) -> _Base:
        """The base of these candidates; another one is forgotten before it is loaded."""
        if self.base is None or self.base.key != shared(found.config):
            self.base = None
            gc.collect()
            give_back_freed()
            self.base = _Base(first, found, self.say)
        else:
            self.base.begin_with(first, found)
        return self.base

    def double(self, rows: _Rows) -> str:
        """Doubles the rank until that stops paying; says where, and why."""
        while True:
            losses = self._losses()
            verdict = plateau.verdict(losses, self.ways.threshold)
            if verdict is None:
                return "too few candidates came to an evaluation to compare ranks"
            self.say(verdict.why)
            if verdict.over:
                return f"r = {verdict.r}: {verdict.why}"
            r = 2 * max(losses)
            more = _of_rank(self.config, r, self.ways)
            if any(each.name in self.seen for each in more):
                return f"r = {verdict.r}: {verdict.why}; r = {r} failed"
            for group in groups(more):
                self.train(rows.looked_at(group))

    def tried(self) -> list[Tried]:
        """What became of each candidate."""
        found = []
        for entry in self.folder.read()["candidates"]:
            run = self.folder.path / entry["name"]
            result = RunFolder.look(run).info().get("result", {})
            found.append(
                Tried(
                    name=entry["name"],
                    settings=entry["settings"],
                    status=entry["status"],
                    why=entry.get("why"),
                    run=run,
                    result=result,
                )
            )
        return found

    def _losses(self) -> dict[int, dict[int, float]]:
        """Rank -> seed -> best evaluation loss, of those that came to one."""
        found: dict[int, dict[int, float]] = {}
        for each in self.tried():
            loss = each.result.get("best_eval_loss")
            if loss is not None and each.name in self.seen:
                seed = each.settings.get(SEED, self.config.train.seed)
                found.setdefault(each.settings[RANK], {})[seed] = loss
        return found

    def _wave(self, base: _Base, wave: Looked, names: Collection[str]) -> None:
        """Trains some side by side; `names` are these and those of the wave that are over."""
        with ExitStack() as stack:
            sessions = base.attach(wave)
            stack.callback(base.detach, list(sessions))
            runs: dict[str, RunFolder] = {}
            jobs: dict[str, Job] = {}
            peak = expected(base.session, [each for each, _ in wave])
            for each, _ in wave:
                resume = (Path(each.config.output) / "run.yaml").exists()
                run = stack.enter_context(open_run(each.config, resume=resume))
                alone = {"alone_bytes": planned(sessions[each.name]).reported}
                together = {**planned_info(peak), **alone, "together": len(wave)}
                write_info(sessions[each.name], run, together)
                self._note(each, "training")
                own: Callable[[Event], None] = partial(self.observe, each.name)
                if not jobs:  # one of them gives freed memory back for all
                    own = tidy(own)
                observe = stack.enter_context(reporting(each.config, run, own))
                runs[each.name] = run
                jobs[each.name] = job_of(sessions[each.name], run, observe, resume=True)
            judge = self._judge(sessions, names) if self.ways.halving else None
            with base.session.training():
                outcomes = train_together(
                    jobs,
                    partial(joint.losses, sessions),
                    tokens=self.config.train.micro_batch_tokens,
                    judge=judge,
                    observe=partial(self.observe, None),
                )
            self._say_memory(peak, outcomes.values())
            for each, _ in wave:
                outcome = outcomes[each.name]
                if isinstance(outcome, Result):
                    finish(
                        sessions[each.name],
                        runs[each.name],
                        outcome,
                        partial(self.observe, each.name),
                    )
                    self._note(each, "stopped" if outcome.halted else "done", outcome.stopped)
                else:
                    self._note(each, "failed", outcome.message)

    def _say_memory(self, peak: Peak, outcomes: Iterable[Outcome]) -> None:
        """What was planned for a wave and what it took."""
        measured = [o.memory.bytes for o in outcomes if isinstance(o, Result)]
        known = [size for size in measured if size is not None]
        line, warning = verdict(peak, max(known) if known else None)
        self.say(line)
        if warning is not None:
            self.observe(None, Note(text=warning))

    def _judge(self, sessions: Mapping[str, Session], names: Collection[str]) -> Judge:
        """Compares with those of the wave that are over, and with those of others that are done.

        Whoever is compared, and in what order, is the same when the sweep is resumed.
        """
        known = {}
        steps = {name: session.total_steps for name, session in sessions.items()}
        order = []
        for name, status in self._statuses().items():
            if name in sessions:
                order.append(name)
            elif status in OVER and (name in names or status == "done"):
                run = RunFolder.look(self.folder.path / name)
                steps[name] = run.info()["steps"]
                rows = [row for row in run.metrics() if "eval_loss" in row]
                known[name] = [(row["step"], row["eval_loss"]) for row in rows]
                order.append(name)
        return Halving(order, steps, known)

    def _statuses(self) -> dict[str, str]:
        """Of every candidate so far, in order."""
        return {entry["name"]: entry["status"] for entry in self.folder.read()["candidates"]}

    def _note(self, each: Candidate, status: str | None, why: str | None = None) -> None:
        """Writes down a candidate's status; with None only that there is such a candidate."""
        state = self.folder.read()
        known = {entry["name"]: i for i, entry in enumerate(state["candidates"])}
        if each.name not in known:
            state["candidates"].append(each.entry(status or "waiting", why))
        elif status is None:
            return
        else:
            state["candidates"][known[each.name]] = each.entry(status, why)
        self.folder.write(state)


class _Base:
    """The base of one group, with the adapters of a wave on it.

    Args:
        first: a candidate whose adapter is attached from the start.
        found: what that one begins with.
    """

    def __init__(self, first: Candidate, found: Inputs, say: Say):
        self.key = shared(found.config)
        """What its candidates have in common."""
        self._say = say
        self.session = begin(found, say, first.name)
        """The first candidate's, for what all have in common."""

    def begin_with(self, first: Candidate, found: Inputs) -> None:
        """Attaches another first candidate, after those of earlier waves have left."""
        self.session = beside(self.session, found, first.name)

    def attach(self, wave: Looked) -> dict[str, Session]:
        """Every candidate's session; all their adapters are on the one model, and trainable."""
        model = self.session.model
        sessions: dict[str, Session] = {}
        there = set(adapters_of(model))
        if leaving := there - {each.name for each, _ in wave}:
            self.detach(sorted(leaving))
        for each, found in wave:
            if each.name in there:
                sessions[each.name] = self.session
            else:
                sessions[each.name] = beside(self.session, found, each.name)
            own, _ = sessions[each.name].sizes()
            self._say(f"candidate {each.name}: {own:,} trainable parameters")
        train_only(model, frozenset(sessions))
        head = head_of(model, OBJECTIVES[self.session.config.objective])
        for session in sessions.values():  # one for all: an adapter on the head is in its way
            session.head = head
        return sessions

    def detach(self, names: Sequence[str]) -> None:
        """Takes these off again."""
        for name in names:
            detach(self.session.model, name)
        give_back_freed()
