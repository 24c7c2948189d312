"""`decal plan`: what a training will need, before any of it is spent.

From config.json alone, on a skeleton without weights. A model is planned in the five ways that
people choose from; a run.yaml in the same ways with its own settings, its own one marked, and with
its rows where they can be read. `planned` is the same for a run whose model and rows are there.

Knows how to read models and rows; the formulas are in `plan/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from decal.config import (
    BaseConfig,
    ContinueConfig,
    DataConfig,
    FullConfig,
    LoraConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from decal.errors import BaseModelError, ConfigError, DecalError
from decal.kernels import native
from decal.model import hf
from decal.model.slots import slots_for
from decal.plan.calibrate import SECONDS, rates
from decal.plan.cards import RESERVED, card
from decal.plan.cheapest import Now, cheapest
from decal.plan.cost import UTILIZATION, operations, seconds_per_token
from decal.plan.memory import peak
from decal.plan.setup import Setup
from decal.plan.shapes import KNOWN, Shape, known, near
from decal.plan.structure import Trained, stored
from decal.plan.table import Limit, Method, Plan
from decal.plan.units import parse_memory
from decal.quant import describe
from decal.quant.base import Recipe
from decal.report import plots, trackers
from decal.runfile import load_run
from decal.train.loop import total_steps
from decal.train.memory import anonymous
from decal.verbs.lengths import lengths_of, load_of
from decal.verbs.load import as_recipe
from decal.verbs.structure import as_meta, structure_of, with_kept
from decal.verbs.target import read

WAYS: dict[str, tuple[str, QuantConfig]] = {
    "full": ("full", QuantConfig(format="none")),
    "lora": ("lora", QuantConfig(format="none")),
    "int8": ("lora", QuantConfig(format="int8")),
    "nf4": ("lora", QuantConfig(format="nf4", double=False)),
    "nf4 double": ("lora", QuantConfig(format="nf4")),
}
"""The ways that people choose from."""


def plan(
    what: str | Path | RunConfig,
    *,
    memory: str | None = None,
    device: str | None = None,
    seq: int = 2048,
    batch: int = 8,
    r: int = 16,
    targets: str | Sequence[str] = "all-linear",
    calibrate: bool = True,
) -> Plan:
    """What a training will need: memory by part, disk, operations and time.

    Args:
        what: a well-known model by name, a hub id, a folder, or a run.yaml (or its settings).
        memory: what there is, as `15GB` (10^9 bytes), `15GiB` or `24G` (2^30).
        device: a well-known GPU by name, instead of `memory`.
        seq, batch, r, targets: of a model: tokens of a sample, samples of a step, rank and target
            modules. A run.yaml has its own.
        calibrate: measure this machine's speed, which takes two seconds; else no times are given.

    Raises:
        BaseModelError: no such model, or no way to the hub.
        ConfigError: no such card, no amount of memory, or a run.yaml that cannot be read.
        TargetError: targets that the model does not have.
    """
    limit = _limit(memory, device)
    config, wanted = _settings(what, seq, batch, r, targets)
    return _Planner(config, wanted=wanted, limit=limit).plan(calibrate)


def _limit(memory: str | None, device: str | None) -> Limit | None:
    if memory is not None and device is not None:
        raise ConfigError("--memory and --device both say what there is", hint="give one of them")
    if device is not None:
        found = card(device)
        return Limit(found.name, found.bytes - RESERVED, found)
    return None if memory is None else Limit(memory, parse_memory(memory))


def _settings(
    what: str | Path | RunConfig, seq: int, batch: int, r: int, targets: str | Sequence[str]
) -> tuple[RunConfig, bool]:
    """The run, and whether it is one that was asked for; of a model, one is made up."""
    if isinstance(what, RunConfig):
        return what, True
    if str(what).endswith((".yaml", ".yml")):
        return load_run(Path(what)), True
    config = RunConfig(
        base=BaseConfig(path=str(what)),
        adapter=LoraConfig(
            r=r, target_modules=targets if isinstance(targets, str) else tuple(targets)
        ),
        data=DataConfig(path="none", max_length=seq),
        train=TrainConfig(batch_size=batch),
        output="none",
    )
    return config, False


RUN_IMPORTS = (plots, trackers)
"""What a run imports beyond what a plan needs: the process is measured with all of it."""


class _Planner:
    """One model and one run's settings, planned in several ways."""

    def __init__(self, config: RunConfig, *, wanted: bool, limit: Limit | None):
        self.config, self.wanted, self.limit = config, wanted, limit
        self.on_card = limit.card if limit is not None else None
        self.shape, self.model_config = model_config(config.base)
        self.skeleton = as_meta(self.model_config)
        self.device = "cuda" if self.on_card else hf.pick_device(config.base.device).type
        name = self.shape or Path(config.base.path).name
        self.structure = structure_of(self.skeleton, name, config.quant.skip_modules)
        self.lengths = lengths_of(config, rows=wanted)
        self.process = anonymous() if self.device == "cpu" else 0

    def plan(self, calibrate: bool) -> Plan:
        ways = dict(WAYS)
        own = self._own()
        if own is not None and own not in ways:
            ways[own] = ("lora", self.config.quant)
        adapter = self._trained("lora")
        dtype = self.config.base.dtype
        self.structure = with_kept(self.structure, self.skeleton, dtype, *self._counted())
        speeds = self._speeds(ways) if calibrate and self.device == "cpu" else {}
        methods = tuple(
            self._method(name, way, quant, adapter, speeds) for name, (way, quant) in ways.items()
        )
        return Plan(
            model=self.structure.name,
            parameters=self.structure.parameters,
            layers=len(self.structure.layers),
            dtype=dtype,
            device=self.device,
            adapter=self._adapter_text(adapter),
            rows=self._rows_text(),
            methods=methods,
            wanted=own,
            limit=self.limit,
            change=self._change(own),
            calibrated=bool(speeds),
        )

    def _own(self) -> str | None:
        """The name of the way that the run itself goes."""
        if not self.wanted:
            return None
        if isinstance(self.config.adapter, FullConfig):
            return "full"
        recipe = as_recipe(self.config.quant)
        same = [n for n, (way, q) in WAYS.items() if way == "lora" and as_recipe(q) == recipe]
        return same[0] if same else describe(recipe or Recipe(format="nf4"))

    def _counted(self) -> list[str]:
        return ["lora", "full"]

    def _trained(self, way: str, r: int | None = None) -> Trained:
        if way == "full":
            return Trained(parameters=self.structure.parameters, whole=True)
        asked = self.config.adapter
        if isinstance(asked, ContinueConfig):
            asked = read(asked.from_)[1].config
        lora = asked if isinstance(asked, LoraConfig) else LoraConfig()
        if r is not None:
            lora = lora.model_copy(update={"r": r, "rank_pattern": {}})
        slots = slots_for(self.skeleton, lora, new=True)
        ranks = {name: lora.rank_of(name) for name in slots.names}
        return Trained(ranks=ranks, parameters=slots.table.parameters)

    def _setup(self, way: str, quant: QuantConfig, trained: Trained, config: RunConfig) -> Setup:
        lora = config.adapter
        lengths = self.lengths.cut(config.data.max_length)
        return Setup(
            structure=self.structure,
            trained=trained,
            load=load_of(lengths, config),
            recipe=as_recipe(quant) if way == "lora" else None,
            dtype=config.base.dtype,
            checkpointing=config.train.gradient_checkpointing,
            dropout=getattr(lora, "lora_dropout", 0.05) > 0,
            optimizer=config.train.optimizer,
            device=self.device,
            native=native.isa() is not None,
            mapped=_mapped(self.model_config, config.base.dtype),
            process=self.process,
        )

    def _method(
        self,
        name: str,
        way: str,
        quant: QuantConfig,
        adapter: Trained,
        speeds: Mapping[str, float],
    ) -> Method:
        trained = self._trained("full") if way == "full" else adapter
        refused = self.structure.unpackable if as_recipe(quant) is not None else None
        setup = self._setup(way, quant, trained, self.config)
        share = sum(self.lengths.trained) / sum(self.lengths.tokens)
        length = round(sum(n * n for n in self.lengths.tokens) / sum(self.lengths.tokens))
        cost = operations(setup, length, share)
        rate, per_token = speeds.get("lora" if way == "full" else name), None
        if rate is not None:
            per_token = seconds_per_token(cost.total, rate)
        elif self.on_card is not None:
            per_token = cost.total / (UTILIZATION * 1e12 * self.on_card.teraflops)
        merged = stored(self.structure, None, "bfloat16").total
        return Method(
            name=name,
            way=way,
            recipe=setup.recipe,
            trained=trained.parameters,
            peak=peak(setup),
            checkpointed=peak(replace(setup, checkpointing=True)),
            checkpointing=setup.checkpointing,
            adapter_bytes=0 if way == "full" else 4 * trained.parameters,
            merged_bytes=merged,
            operations=cost.total,
            tokens_per_second=None if per_token is None else 1 / per_token,
            run_tokens=self._run_tokens(),
            refused=refused,
        )

    def _run_tokens(self) -> int:
        """Tokens of the whole run; of a model, of a thousand steps."""
        train, tokens = self.config.train, self.lengths.tokens
        mean = sum(tokens) / len(tokens)
        if not self.wanted:
            return round(1000 * train.batch_size * mean)
        if not self.lengths.known:
            steps = train.max_steps
            return 0 if steps is None else round(steps * train.batch_size * mean)
        steps = total_steps(-(-len(tokens) // train.batch_size), train)
        return round(steps * min(train.batch_size, len(tokens)) * mean)

    def _speeds(self, ways: Mapping[str, tuple[str, QuantConfig]]) -> dict[str, float]:
        formats = {
            name: as_recipe(quant)
            for name, (way, quant) in ways.items()
            if way == "lora" and not (as_recipe(quant) and self.structure.unpackable)
        }
        linears = [linear for layer in self.structure.layers for linear in layer.linears]
        widest = max(linears, key=lambda linear: linear.out * linear.columns, default=None)
        shape = (widest.out, widest.columns) if widest else (1024, 1024)
        return rates(formats, shape, hf.DTYPES[self.config.base.dtype], SECONDS)

    def _change(self, own: str | None) -> dict[str, str] | None:
        """The cheapest change that makes the run fit; of a model, one that starts from the least.

        None where nothing has to change, an empty one where nothing helps.
        """
        if self.limit is None or (own is None and not self.wanted and self._any_fits()):
            return None
        way, quant = ("lora", WAYS["nf4 double"][1]) if own is None else self._way(own)
        if self._needs(way, quant, {}) <= self.limit.bytes:
            return None
        formats = () if quant.format in ("nf4", "fp4") else ("int8", "nf4")
        if self.structure.unpackable or way == "full":
            formats = ()
        now = Now(
            micro_batch_tokens=self.config.train.micro_batch_tokens,
            longest=self.lengths.longest,
            checkpointing=self.config.train.gradient_checkpointing,
            formats=formats if quant.format != "int8" else ("nf4",),
            r=getattr(self.config.adapter, "r", None) if way == "lora" else None,
        )
        found = cheapest(now, lambda c: self._needs(way, quant, c), self.limit.bytes)
        return {} if found is None else dict(found)

    def _way(self, own: str) -> tuple[str, QuantConfig]:
        return WAYS.get(own, ("lora", self.config.quant))

    def _any_fits(self) -> bool:
        return any(
            self._needs(way, quant, {}) <= (self.limit.bytes if self.limit else 0)
            for way, quant in WAYS.values()
            if not (as_recipe(quant) and self.structure.unpackable)
        )

    def _needs(self, way: str, quant: QuantConfig, changes: Mapping[str, str]) -> int:
        """Bytes at the peak, with some settings changed."""
        config = self.config
        train: dict[str, Any] = {}
        if size := changes.get("train.micro_batch_tokens"):
            train["micro_batch_tokens"] = int(size)
        if "train.gradient_checkpointing" in changes:
            train["gradient_checkpointing"] = True
        data = {}
        if length := changes.get("data.max_length"):
            data["max_length"] = int(length)
        config = config.model_copy(
            update={
                "train": config.train.model_copy(update=train),
                "data": config.data.model_copy(update=data),
            }
        )
        if fmt := changes.get("quant"):
            quant = QuantConfig(format=fmt)  # type: ignore[arg-type]
        r = changes.get("adapter.r")
        trained = self._trained(way, None if r is None else int(r))
        return peak(self._setup(way, quant, trained, config)).bytes

    def _adapter_text(self, adapter: Trained) -> str:
        asked = self.config.adapter
        share = 100 * adapter.parameters / self.structure.parameters
        count = f"{adapter.parameters:,} trained ({share:.2f} %)"
        if not isinstance(asked, LoraConfig):
            return count
        targets = asked.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        return f"r {asked.r} on {named}: {count}"

    def _rows_text(self) -> str:
        train = self.config.train
        load = load_of(self.lengths, self.config)
        lengths = self.lengths.tokens
        where = f"longest of {len(lengths):,} rows" if self.lengths.known else "every sample"
        text = f"{train.batch_size} samples a step, {where} {self.lengths.longest:,} tokens"
        return f"{text}; at most {load.tokens:,} tokens at once"


def model_config(base: BaseConfig) -> tuple[str | None, Any]:
    """The name of a well-known model, if it is one, and its config.json as transformers reads it.

    Raises:
        BaseModelError: neither well known nor a folder, and not to be had from the hub.
    """
    folder = Path(expanduser(base.path)).is_dir()
    shape = None if folder else known(base.path)
    if shape is not None:
        name = next(n for n, s in KNOWN.items() if s is shape)
        return name, _of_shape(shape)
    try:
        found = hf.load_config(
            base.path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except DecalError as error:
        guess = None if folder else near(base.path)
        hint = f"did you mean `{guess}`?" if guess else error.hint
        raise BaseModelError(error.message, details=error.details, hint=hint) from error
    found.quantization_config = None
    del found.quantization_config
    return None, found


def _of_shape(shape: Shape) -> Any:
    return AutoConfig.for_model(shape.model_type, dtype="bfloat16", **shape.facts)


def _mapped(config: Any, dtype: str) -> bool:
    """Whether the weights lie in their files as the model computes with them."""
    return getattr(config, "dtype", None) in (hf.DTYPES[dtype], dtype)
