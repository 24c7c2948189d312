"""The settings of a run: one frozen model per section of run.yaml.

The docstring under each field is its documentation everywhere: in the YAML that `decal init`
writes and in the text of errors. This file knows no files, no torch and no models; a config object
never reaches into a class of another layer, callers hand on plain values.

Types are strict: `lr: "1e-4"` and `batch_size: true` are errors, not 0.0001 and 1. The one thing
that is converted is a `pathlib` path where text is expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from decal.problems import config_error

__all__ = [
    "SHORTHAND",
    "AdapterConfig",
    "BaseConfig",
    "ContinueConfig",
    "DataConfig",
    "FullConfig",
    "LoraConfig",
    "QuantConfig",
    "RunConfig",
    "TrainConfig",
    "by_pattern",
    "fits",
]

Value = TypeVar("Value")
Dtype = Literal["float32", "bfloat16", "float16"]

SHORTHAND = {"base": "path", "quant": "format", "adapter": "method", "data": "path"}
"""Sections that may be given as one text, and the key which that text stands for."""


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, PurePath) else value


def _section(name: str) -> Callable[[Any], Any]:
    """Writes the shorthand of section `name` out: "nf4" -> {"format": "nf4"}."""

    def write_out(value: Any) -> Any:
        value = _text(value)
        return {SHORTHAND[name]: value} if isinstance(value, str) else value

    return write_out


def _listed(value: Any) -> Any:
    """Any sequence of names as the tuple that a frozen section holds."""
    return tuple(value) if isinstance(value, list | set | frozenset) else value


def _expressions(value: Any) -> Any:
    """Raises ValueError where a key is no regular expression."""
    for pattern in value if isinstance(value, Mapping) else ():
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ValueError(f"`{pattern}` is no regular expression: {error}") from None
    return value


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_listed)]
PatternKeys = BeforeValidator(_expressions)


class Settings(BaseModel):
    """Frozen, keyword-only, and unknown names are errors.

    Raises:
        ConfigError: naming every setting that is unknown, missing or of the wrong type.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self), type(self).__name__) from None

    # Sections inside sections are then validated without this constructor, so that the problems
    # of all of them come in one error.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class BaseConfig(Settings):
    """The base model: what is loaded, and never trained unless `adapter.method` is full."""

    path: Text
    """Hub id or folder of the base model."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null is the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off by default: that code can do anything."""
    dtype: Dtype = "bfloat16"
    """What the base computes in: bfloat16, float16 or float32."""
    device: Text = "auto"
    """`auto` takes the GPU if there is one, else the CPU; or a torch device name."""


class QuantConfig(Settings):
    """How the frozen linear layers of the base are stored."""

    format: Literal["none", "nf4", "fp4", "int8"] = "none"
    """`none` keeps 16 bits; `nf4` is QLoRA's 4-bit normal float, `fp4` a 4-bit float with two bits
    of exponent, `int8` is LLM.int8: a scale per row, and no blocks."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale: a power of two from 32 to 4096."""
    double: bool = True
    """Quantize the scales too: 4.127 instead of 4.5 bits a weight at block size 64."""
    skip_modules: Names = ()
    """Modules that stay 16-bit besides the head, by the ends of their names."""


class LoraConfig(Settings):
    """LoRA (Hu et al. 2021): W' = W + scaling * B A, with PEFT's names and meaning."""

    method: Literal["lora"] = "lora"
    """What is trained: `lora` adds low-rank adapters, `full` trains every weight, `continue` goes
    on with an adapter."""
    r: int = Field(default=16, ge=1)
    """Rank: rows of A and columns of B."""
    lora_alpha: float = Field(default=None, gt=0, validate_default=False)  # type: ignore[assignment]
    """Scaling numerator: the update is scaled by lora_alpha / r. Left out: 2 * r."""
    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of A's input that is dropped in training."""
    target_modules: Text | Names = "all-linear"
    """`all-linear`, `attention`, a regular expression for whole names, or a list of endings."""
    exclude_modules: Text | Names | None = None
    """Modules to leave out of target_modules: a regular expression or a list of endings."""
    layers_to_transform: int | Annotated[tuple[int, ...], BeforeValidator(_listed)] | None = None
    """Numbers of the layers to adapt, from 0; null adapts all."""
    layers_pattern: Text | Names | None = None
    """Name of the list of layers (`layers`, `h`) for layers_to_transform; null finds it."""
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], PatternKeys] = {}
    """Other ranks for some modules: {end of the name or regular expression: r}."""
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0)]], PatternKeys] = {}
    """Other lora_alphas for some modules: {end of the name or regular expression: alpha}."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """Start of A: true is Kaiming uniform, `gaussian` is normal with deviation 1/r; B is zero."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base to train: `none`, `all`, or `lora_only` for those of target modules."""
    lora_bias: bool = False
    """Give B a bias of its own, scaled like B A."""
    modules_to_save: Names = ()
    """Modules to train whole and keep in the adapter, by the ends of their names: heads,
    embeddings."""

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        """The default of lora_alpha follows r; null is an empty pattern, as in PEFT's files."""
        if not isinstance(values, dict):
            return values
        values = {
            key: value
            for key, value in values.items()
            if value is not None or key not in ("rank_pattern", "alpha_pattern", "modules_to_save")
        }
        r = values.get("r", 16)
        if values.get("lora_alpha") is None and isinstance(r, int) and not isinstance(r, bool):
            values = {**values, "lora_alpha": 2 * max(r, 1)}
        return values

    @property
    def scaling(self) -> float:
        """The factor of B A where no pattern says otherwise; see `scaling_of`."""
        return _scaling(self.lora_alpha, self.r, self.use_rslora)

    def rank_of(self, module: str) -> int:
        """The rank on the module of this full name."""
        return by_pattern(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """The factor of B A on a module: alpha / r, or alpha / sqrt(r), of the module's own."""
        alpha = by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return _scaling(alpha, self.rank_of(module), self.use_rslora)


def _scaling(alpha: float, r: int, rank_stabilized: bool) -> float:
    return float(alpha / (r**0.5 if rank_stabilized else r))


def fits(pattern: str, module: str) -> bool:
    """Whether a regular expression fits a module's name or an end of it after a dot, as in PEFT."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def by_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that fits the module."""
    return next((value for pattern, value in patterns.items() if fits(pattern, module)), default)


class FullConfig(Settings):
    """Full fine-tuning: every weight is trained, nothing is added.

    The base's own dropout is off here too: torch draws its masks per micro-batch, so the result
    would depend on how a step is cut.
    """

    method: Literal["full"] = "full"
    """What is trained: `lora` adds low-rank adapters, `full` trains every weight, `continue` goes
    on with an adapter."""


class ContinueConfig(Settings):
    """Training goes on with an adapter that is there; all its settings are taken from it."""

    model_config = ConfigDict(
        validate_by_alias=True, validate_by_name=True, serialize_by_alias=True
    )

    method: Literal["continue"] = "continue"
    """What is trained: `lora` adds low-rank adapters, `full` trains every weight, `continue` goes
    on with an adapter."""
    from_: Text = Field(alias="from")
    """Run or adapter folder; rank, alpha and target modules are its own. It is not changed."""


AdapterConfig = Annotated[LoraConfig | FullConfig | ContinueConfig, Field(discriminator="method")]


class DataConfig(Settings):
    """The rows to train on."""

    path: Text
    """A file (.jsonl, .json, .parquet, .csv, .tsv, .txt), or the id of a hub data set."""
    name: Text | None = None
    """Configuration of a hub data set that has several."""
    split: Text = "train"
    """Split of a hub data set; a file has none."""
    layout: Literal[
        "auto", "messages", "sharegpt", "prompt-completion", "alpaca", "text", "labels"
    ] = "auto"
    """What the columns mean: `messages`, `sharegpt` (conversations), `prompt-completion`, `alpaca`
    (instruction, input, output), `text` (all of it is trained), `labels` (text and label), or
    `auto` to find it in the first row."""
    columns: dict[str, Text] = {}
    """Columns made from others by templates, for data that fits no layout:
    {prompt: "Sort this: {text}", completion: "{label}"}."""
    system: Text | None = None
    """A system message for every chat that has none of its own."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained: `all`, or the `last`."""
    max_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens; what happens to longer ones says overflow."""
    overflow: Literal["truncate", "drop"] = "truncate"
    """`truncate` cuts longer samples on the right, `drop` leaves them out; both are reported."""
    eval: Annotated[float, Field(gt=0, lt=1)] | Text | None = 0.05
    """Share of the rows held out for evaluation, or a file or split of their own, or null."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many rows, the first ones after shuffling; null uses all."""
    shuffle: bool = False
    """Shuffle the rows (by train.seed) before limit and eval take their part."""
    streaming: bool = False
    """Read a hub data set row by row instead of downloading it; needs limit."""


class TrainConfig(Settings):
    """How the trainable parameters are trained."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per optimizer step, however they are cut into micro-batches."""
    micro_batch_tokens: int = Field(default=4096, ge=8)
    """Most tokens in one forward pass; lowers memory, never changes the result."""
    schedule: Literal["cosine", "linear", "constant", "inverse-sqrt"] = "cosine"
    """Learning rate after warm-up: cosine or linear down to zero, constant, or inverse-sqrt (falls
    with the square root of the step)."""
    warmup: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises from zero."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """`adamw`; `adamw8bit` keeps its state in 8 bits and `paged_adamw8bit` lets it leave the GPU,
    so it needs one (both through bitsandbytes, which must be installed)."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    """LoRA+ (Hayou et al. 2024): B's learning rate over A's. 16 is usual, 1 is plain LoRA."""
    lr_pattern: Annotated[dict[str, Annotated[float, Field(gt=0)]], PatternKeys] = {}
    """Factors on the learning rate of some modules: {end of the name or regular expression:
    factor}."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null is ten times a run, and at the end."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null is with every evaluation."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a lower loss; null never does."""
    keep: Literal["best", "last"] = "best"
    """Which weights the run leaves: the best by evaluation loss, or the last."""
    seed: int = Field(default=0, ge=0)
    """Starting values, order of the data and dropout follow from it."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_listed)] = ()
    """Write the metrics there too: tensorboard, wandb. Their packages must be installed."""


def _adapter_section(value: Any) -> Any:
    value = _section("adapter")(value)
    if isinstance(value, dict) and "method" not in value:
        return {"method": "continue" if "from" in value else "lora", **value}
    return value


def _quant_section(value: Any) -> Any:
    return _section("quant")("none" if value is None else value)


class RunConfig(Settings):
    """One run: run.yaml has exactly these seven keys."""

    base: Annotated[BaseConfig, BeforeValidator(_section("base"))]
    """The base model: a hub id or folder, or {path, revision, trust_remote_code, dtype, device}."""
    quant: Annotated[QuantConfig, BeforeValidator(_quant_section)] = QuantConfig()
    """How the base is stored: none, nf4, fp4 or int8, or {format, block_size, double, …}."""
    adapter: Annotated[AdapterConfig, BeforeValidator(_adapter_section)] = LoraConfig()
    """What is trained: {method: lora, r, lora_alpha, …}, {from: FOLDER} to go on with an adapter,
    or {method: full}."""
    data: Annotated[DataConfig, BeforeValidator(_section("data"))]
    """The rows: a file or hub data set, or {path, split, layout, max_length, eval, …}."""
    objective: Literal["sft", "classify"] = "sft"
    """What is learned: sft trains on the tokens of the assistant or of the completion, classify
    trains a head that names the label of a text."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    output: Text
    """The run folder: settings, metrics, checkpoints and the adapter go there."""

    if TYPE_CHECKING:  # the sections may be given as texts and mappings too

        def __init__(self, **values: Any) -> None: ...

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        if self.adapter.method == "full" and self.quant.format != "none":
            raise ValueError(
                f"adapter.method full trains every weight, but quant {self.quant.format} freezes "
                "them: choose adapter.method lora or quant none"
            )
        if self.data.streaming and self.data.limit is None:
            raise ValueError("data.streaming needs data.limit: rows are read until it is reached")
        return self
