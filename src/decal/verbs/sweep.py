"""`decal sweep`: many candidates, one base, and every candidate an ordinary run.

Candidates that share base and rows are attached to one model and go through it together
(train/together.py); each has its run folder, its checkpoints and its adapter as if it had been
trained alone, and is held to what it would have been alone. What is not a candidate's own, the
grid and who is over, is in the sweep folder, so that a sweep that was killed goes on where each
candidate was.

More candidates than memory has room for are trained in waves over the base that is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from decal.config import RunConfig
from decal.errors import ConfigError
from decal.model.heap import give_back_freed
from decal.model.inject import adapters_of, detach
from decal.model.state import train_only
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
from decal.verbs.grid import Candidate, candidate, candidates, groups, joinable, lines
from decal.verbs.inputs import Inputs, look, look_again
from decal.verbs.leaves import finish, job_of, open_run, tidy, write_info
from decal.verbs.planned import planned, planned_info, verdict
from decal.verbs.report import gather, write_report
from decal.verbs.session import Say, Session, begin, beside
from decal.verbs.swept import SweepResult, Tried
from decal.verbs.waves import expected, waves

RANK, SEED = "adapter.r", "train.seed"
OVER = ("done", "stopped", "failed")

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
    seen = [_looked_at(group) for group in groups(first)]
    if not resume:
        SweepFolder.check_new(config.output, force=force)
    with _opened(config, grid, ways, first, resume=resume, force=force) as folder:
        work = _Work(folder, config, ways, memory, observe, say)
        for inputs in seen:
            work.train(inputs)
        verdict = work.double(seen[0]) if until_plateau else None
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


Looked = list[tuple[Candidate, Inputs]]


def _looked_at(group: Sequence[Candidate]) -> Looked:
    """What each candidate of a group begins with; all problems of one are raised as one error."""
    first, *others = group
    found = look(first.config)
    found.refuse()
    looked = [(first, found)]
    for each in others:
        again = look_again(found, each.config)
        again.refuse()
        looked.append((each, again))
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

    def train(self, looked: Looked) -> None:
        """Trains those candidates of a group that are not over, wave by wave."""
        for each, _ in looked:
            self._note(each, None)
        left = [(e, found) for e, found in looked if self._entry(e.name)["status"] not in OVER]
        if not left:
            return
        for finding in before(left[0][1]):
            if finding.level == "problem":
                raise finding.as_problem("train a run with --no-check to see it all the same").error
            if finding.level == "warning":
                self.observe(None, Note(text=finding.line()))
        base = _Base(*left[0], self.say)
        inputs = {each.name: found for each, found in left}
        together = [each for each, _ in left if joinable(each.config)]
        alone = [[each] for each, _ in left if not joinable(each.config)]
        for wave in [*waves(base.session, together, self.memory, self.say), *alone]:
            self._wave(base, [(each, inputs[each.name]) for each in wave])

    def double(self, looked: Looked) -> str:
        """Doubles the rank until that stops paying; says where, and why."""
        while True:
            verdict = plateau.verdict(self._losses(), self.ways.threshold)
            if verdict is None:
                return "too few candidates came to an evaluation to compare ranks"
            self.say(verdict.why)
            if verdict.over:
                return f"r = {verdict.r}: {verdict.why}"
            more = _of_rank(self.config, 2 * max(self._losses()), self.ways)
            found = looked[0][1]
            self.train([(each, look_again(found, each.config)) for each in more])

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

    def _losses(self) -> dict[int, list[float]]:
        """Rank -> best evaluation losses of its seeds."""
        found: dict[int, list[float]] = {}
        for each in self.tried():
            loss = each.result.get("best_eval_loss")
            if loss is not None:
                found.setdefault(each.settings[RANK], []).append(loss)
        return found

    def _wave(self, base: _Base, wave: Looked) -> None:
        with ExitStack() as stack:
            sessions = base.attach(wave)
            stack.callback(base.detach, list(sessions))
            runs = {}
            peak = expected(base.session, [each for each, _ in wave])
            for each, _ in wave:
                session = sessions[each.name]
                resume = (Path(each.config.output) / "run.yaml").exists()
                runs[each.name] = stack.enter_context(open_run(each.config, resume=resume))
                alone = {"alone_bytes": planned(session).reported, "together": len(wave)}
                write_info(session, runs[each.name], {**planned_info(peak), **alone})
                self._note(each, "training")
            judge = self._judge(sessions) if self.ways.halving else None
            with base.session.training():
                outcomes = train_together(
                    self._jobs(sessions, runs),
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
                    self.observe(each.name, Note(text=f"{each.name} failed: {outcome}"))

    def _say_memory(self, peak: Peak, outcomes: Iterable[Outcome]) -> None:
        """What was planned for a wave and what it took."""
        measured = [o.memory.bytes for o in outcomes if isinstance(o, Result)]
        known = [size for size in measured if size is not None]
        line, warning = verdict(peak, max(known) if known else None)
        self.say(line)
        if warning is not None:
            self.observe(None, Note(text=warning))

    def _jobs(
        self, sessions: Mapping[str, Session], runs: Mapping[str, RunFolder]
    ) -> dict[str, Job]:
        """Every candidate as a training. One of them gives freed memory back for all."""
        first = next(iter(sessions))
        jobs = {}
        for name, session in sessions.items():
            observe: Callable[[Event], None] = partial(self.observe, name)
            if name == first:
                observe = tidy(observe)
            jobs[name] = job_of(session, runs[name], observe, resume=True)
        return jobs

    def _judge(self, sessions: Mapping[str, Session]) -> Judge:
        """Compares with those that are over, too."""
        known = {}
        for entry in self.folder.read()["candidates"]:
            if entry["status"] == "done":
                rows = RunFolder.look(self.folder.path / entry["name"]).metrics()
                known[entry["name"]] = [
                    (row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row
                ]
        steps = {name: session.total_steps for name, session in sessions.items()}
        for name in known:
            steps.setdefault(name, max(steps.values()))
        return Halving([*known, *sessions], steps, known)

    def _entry(self, name: str) -> dict[str, Any]:
        entries: list[dict[str, Any]] = self.folder.read()["candidates"]
        return next(entry for entry in entries if entry["name"] == name)

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
        self._say = say
        self.session = begin(found, say, first.name)
        """The first candidate's, for what all have in common."""

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
        return sessions

    def detach(self, names: Sequence[str]) -> None:
        """Takes these off again."""
        for name in names:
            detach(self.session.model, name)
        give_back_freed()
