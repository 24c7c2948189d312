"""Everything that must stand before step 1: model, adapter, data, and what is said about them.

`prepare` spends no training time and writes nothing; `decal train --dry-run` ends after it. What
can be found without weights is found in inputs.py before any are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decal.adapters import DropoutKey, Routing, current_routing, routed
from decal.config import FullConfig, RunConfig
from decal.data.batch import Batch
from decal.data.pack import Batches, LayoutName, make_batches
from decal.data.sample import Sample
from decal.errors import QuantError
from decal.model import attention, heads, last_hidden, switches
from decal.model.heap import keeping_freed
from decal.model.inject import adapters_of, fused_line, trainable_line, trainable_parameters
from decal.model.size import bits_per_weight
from decal.model.targets import TargetTable
from decal.model.unquantized import left_unquantized
from decal.objectives import OBJECTIVES, classify
from decal.quant import describe
from decal.train.loop import total_steps
from decal.verbs.inputs import (
    ADAPTER,
    Inputs,
    look,
    make_trainable,
    rates,
    refuse_beyond_context,
    refuse_other_vocabulary,
    trained,
)
from decal.verbs.load import load_base
from decal.verbs.loss import batch_losses, head_of, likeliest
from decal.verbs.same_base import hashing

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Session:
    """A run that could begin now."""

    config: RunConfig
    model: Any
    tokenizer: Any
    samples: list[Sample]
    batches: Batches
    eval_batches: list[Batch]
    flattening: attention.Flattening
    """Whether batches are flattened, and what was measured for it."""
    head: last_hidden.PlainHead | None
    """The head, where the loss needs no logits as a whole."""
    rates: dict[str, float]
    """Factors on the learning rate by parameter name; see `model/rates.py`."""
    table: TargetTable | None
    """What the adapter came to; None where every weight is trained."""
    bits_per_weight: float
    """Of the base alone, as stored."""
    adapter: str = ADAPTER
    """The adapter's name on the model, which others may be attached to as well."""

    @property
    def flat(self) -> bool:
        """Whether batches are flattened; padded where flattening changes the model's logits."""
        return self.flattening.works

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; see `inputs.trained`."""
        return trained(self.model, self.adapter)

    def sizes(self) -> tuple[int, int]:
        """Parameters that are trained, and those of the model with them alone."""
        trainable, total = trainable_parameters(self.model)
        own = sum(p.numel() for p in self.parameters.values())
        return own, total - trainable + own

    def loss(self, batch: Batch, epoch: int | None) -> tuple[Tensor, int]:
        """Sum of the token losses of a micro-batch, and its trained tokens.

        `epoch` None is evaluation: no dropout.
        """
        objective = OBJECTIVES[self.config.objective]
        learning = epoch is not None
        if self.model.training != learning:
            self.model.train(learning)
        batch = batch.to(self.model.device)
        keep = objective.trained_positions(batch)
        if objective.POOLS:
            rows = keep * batch.input_ids.shape[1]
        else:
            rows = attention.head_rows(batch, keep)
        with routed(self._routing(batch, epoch, rows)):
            losses = batch_losses(self.model, batch, objective, self.head)
            return losses.sum(), batch.trained

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """How well the evaluation rows are predicted; nothing without any.

        `eval_accuracy` is the share of rows, all of whose trained tokens are the likeliest ones
        (so that greedy decoding would write them), and `eval_token_accuracy` that of the tokens.
        For a classifier it is the share of labels that are right, and `eval_macro_f1` comes with
        it.
        """
        objective = OBJECTIVES[self.config.objective]
        if not self.eval_batches:
            return {}
        predicted: list[int] = []
        wanted: list[int] = []
        rows: list[int] = []
        self.model.eval()
        with attention.flat_attention(self.model) if self.flat else nullcontext():
            for batch in self.eval_batches:
                batch = batch.to(self.model.device)
                keep = objective.trained_positions(batch)
                with routed(self._routing(batch, None, keep)):
                    predicted += likeliest(self.model, batch, objective, self.head).tolist()
                wanted += objective.targets(batch).tolist()
                rows += batch.sample_ids.flatten()[keep].tolist() if not objective.POOLS else []
        if objective.POOLS:
            found = classify.scores(predicted, wanted)
            return {f"eval_{name}": value for name, value in found.items()}
        return _shares(predicted, wanted, rows)

    def _routing(self, batch: Batch, epoch: int | None, head: Tensor) -> Routing | None:
        """Adapter and dropout of one pass; `head` are the rows of the batch that reach the head."""
        settings = adapters_of(self.model).get(self.adapter)
        if settings is None:
            return None
        key = None
        if epoch is not None and settings.lora_dropout > 0:
            ids, positions = batch.sample_ids.flatten(), batch.positions.flatten()
            key = DropoutKey(self.config.train.seed, epoch, ids, positions, head)
        return Routing(((self.adapter, 1.0),), key)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.batches.steps_per_epoch, self.config.train)

    @contextmanager
    def training(self) -> Iterator[None]:
        """The model as the loop needs it: no dropout of its own, attention, checkpointing."""
        with ExitStack() as stack:
            stack.enter_context(keeping_freed())
            stack.enter_context(switches.without_dropout(self.model))
            if self.flat:
                stack.enter_context(attention.flat_attention(self.model))
            if self.config.train.gradient_checkpointing:
                stack.enter_context(switches.checkpointed(self.model, _recompute_contexts))
            before = self.model.training
            stack.callback(self.model.train, before)
            self.model.train()
            yield


def _shares(predicted: list[int], wanted: list[int], rows: list[int]) -> dict[str, float]:
    """Of tokens that are right, and of rows that have no wrong one."""
    wrong = {row for p, w, row in zip(predicted, wanted, rows, strict=True) if p != w}
    right = sum(p == w for p, w in zip(predicted, wanted, strict=True))
    count = len(set(rows))
    return {
        "eval_accuracy": (count - len(wrong)) / count,
        "eval_token_accuracy": right / len(wanted),
    }


def _recompute_contexts() -> tuple[Any, Any]:
    """Recomputation in backward sees the routing of its forward, whatever runs by then."""
    routing = current_routing()
    return routed(routing), routed(routing)


def prepare(config: RunConfig, say: Say) -> Session:
    """Loads base and data and attaches the adapter; says what it found.

    Raises:
        BaseModelError, DataError, TargetError, QuantError: what the settings name is not there, or
            would train nothing or the wrong thing. Several problems come in one error.
    """
    return begin(look(config), say)


def begin(found: Inputs, say: Say, adapter: str = ADAPTER) -> Session:
    """Loads the weights for what was found, and attaches the adapter; raises as `prepare`.

    `adapter` is what it is called on the model.
    """
    found.refuse()
    config, rows, encoded = found.config, found.rows, found.encoded
    assert rows is not None
    assert encoded is not None
    for line in encoded.lines():
        say(line)
    base = config.base
    with hashing(base.path) as keep_fingerprint:
        model, tokenizer = load_base(
            base.path,
            quant=config.quant,
            dtype=base.dtype,
            device=base.device,
            labels=rows.classes,
            tokenizer=found.tokenizer,
            **found.place,
        )
        model.decal_base = replace(model.decal_base, revision=base.revision)  # as it was asked for
        keep_fingerprint(model)
    bits = bits_per_weight(model)
    _say_base(model, bits, config, say)
    if found.skeleton is None:
        refuse_other_vocabulary(model, encoded.train)
        refuse_beyond_context(model, [*encoded.train, *encoded.eval])
    if encoded.chat_template is not None:
        tokenizer.chat_template = encoded.chat_template
        model.decal_base = replace(model.decal_base, chat_template=encoded.chat_template)

    table = _make_trainable(model, found, say, adapter)
    say(trainable_line(model))
    fused = fused_line(model)
    if fused is not None:
        say(fused)

    pools = OBJECTIVES[config.objective].POOLS
    flattening = attention.Flattening(False) if pools else attention.flattening(model)
    flat = flattening.works
    if not flat and not pools:
        say("flattened batches change this model's logits, so padded ones are used")
    return Session(
        config=config,
        model=model,
        tokenizer=tokenizer,
        samples=encoded.train,
        batches=_batches(config, encoded.train, flat),
        eval_batches=_eval_batches(config, encoded.eval, flat),
        flattening=flattening,
        head=head_of(model, OBJECTIVES[config.objective]),
        rates=rates(trained(model, adapter), config),
        table=table,
        bits_per_weight=bits,
        adapter=adapter,
    )


def beside(session: Session, found: Inputs, adapter: str) -> Session:
    """Another candidate on the model of `session`: rows, and an adapter, of its own.

    `head` is none until all candidates are attached. Raises as `attach`.
    """
    config, encoded = found.config, found.encoded
    assert encoded is not None
    table = _make_trainable(session.model, found, lambda line: None, adapter)
    same = encoded.train is session.samples
    return replace(
        session,
        config=config,
        samples=encoded.train,
        batches=_batches(config, encoded.train, session.flat),
        eval_batches=(
            session.eval_batches if same else _eval_batches(config, encoded.eval, session.flat)
        ),
        head=None,
        rates=rates(trained(session.model, adapter), config),
        table=table,
        adapter=adapter,
    )


def _make_trainable(model: Any, found: Inputs, say: Say, name: str) -> TargetTable | None:
    """As `make_trainable`, on a model with weights."""
    config, going_on = found.config, found.going_on
    new = model.decal_base.new
    heads.start(model, new, config.train.seed)
    if isinstance(config.adapter, FullConfig) and model.decal_base.recipe is not None:
        raise QuantError(
            f"base `{config.base.path}` is stored as {describe(model.decal_base.recipe)}, and"
            " quantized weights cannot be trained",
            hint="use adapter.method lora, or `decal dequantize` the base first",
        )
    if going_on is not None:
        say(f"going on with adapter {going_on.source}")
    table = make_trainable(
        model, config, going_on, new, name=name, allow_other_base=found.allow_other_base
    )
    if table is None:
        say("full fine-tuning: every weight is trained")
    for line in table.lines() if table is not None else ():
        say(line)
    return table


def _batches(config: RunConfig, samples: list[Sample], flat: bool) -> Batches:
    return Batches(
        samples=samples,
        batch_size=config.train.batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.train.seed,
        layout="flat" if flat else "padded",
    )


def _eval_batches(config: RunConfig, samples: list[Sample], flat: bool) -> list[Batch]:
    layout: LayoutName = "flat" if flat else "padded"
    return make_batches(samples, config.train.micro_batch_tokens, layout=layout)


def _say_base(model: Any, bits: float, config: RunConfig, say: Say) -> None:
    stored = "16-bit" if config.base.dtype != "float32" else "32-bit"
    if model.decal_base.recipe is not None:
        stored = describe(model.decal_base.recipe)
    say(
        f"base: {config.base.path} ({type(model).__name__}), {stored},"
        f" {bits:.2f} bits per weight, computes in {config.base.dtype}"
        f" on {model.device}"
    )
    for line in left_unquantized(model):
        say(f"  {line}")
