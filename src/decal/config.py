"""The settings of a run: one frozen model per section of run.yaml.

The docstring under each field is its documentation everywhere: in the YAML that `decal init`
writes and in the text of errors. This file knows no files, no torch and no models; a config object
never reaches into a class of another layer, callers hand on plain values.

Types are strict: `lr: "1e-4"` and `batch_size: true` are errors, not 0.0001 and 1. The one thing
that is converted is a `pathlib` path where text is expected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    "DataConfig",
    "FullConfig",
    "LoraConfig",
    "QuantConfig",
    "RunConfig",
    "TrainConfig",
]

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


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]


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

    format: Literal["none", "nf4"] = "none"
    """`none` keeps 16 bits; `nf4` is the 4-bit normal float of QLoRA."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale: a power of two from 32 to 4096."""
    double: bool = True
    """Quantize the scales too: 4.127 instead of 4.5 bits a weight at block size 64."""


class LoraConfig(Settings):
    """LoRA (Hu et al. 2021): W' = W + scaling * B A, with PEFT's names and meaning."""

    method: Literal["lora"] = "lora"
    """What is trained: `lora` adds low-rank adapters, `full` trains every weight."""
    r: int = Field(default=16, ge=1)
    """Rank: rows of A and columns of B."""
    lora_alpha: float = Field(default=None, gt=0, validate_default=False)  # type: ignore[assignment]
    """Scaling numerator: the update is scaled by lora_alpha / r. Left out: 2 * r."""
    lora_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of A's input that is dropped in training."""
    target_modules: Text | tuple[Text, ...] = "all-linear"
    """`all-linear`, `attention`, a regular expression for whole names, or a list of endings."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """Start of A: true is Kaiming uniform, `gaussian` is normal with deviation 1/r; B is zero."""

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, values: Any) -> Any:
        """The default of lora_alpha follows r, and a list of names may be any sequence."""
        if not isinstance(values, dict):
            return values
        r = values.get("r", 16)
        if values.get("lora_alpha") is None and isinstance(r, int) and not isinstance(r, bool):
            values = {**values, "lora_alpha": 2 * max(r, 1)}
        if isinstance(values.get("target_modules"), list | set | frozenset):
            values = {**values, "target_modules": tuple(values["target_modules"])}
        return values

    @property
    def scaling(self) -> float:
        """The factor of B A: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


class FullConfig(Settings):
    """Full fine-tuning: every weight is trained, nothing is added."""

    method: Literal["full"] = "full"
    """What is trained: `lora` adds low-rank adapters, `full` trains every weight."""


AdapterConfig = Annotated[LoraConfig | FullConfig, Field(discriminator="method")]


class DataConfig(Settings):
    """The rows to train on."""

    path: Text
    """A .jsonl file, or the id of a hub data set."""
    split: Text = "train"
    """Split of a hub data set; a file has none."""
    max_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens; longer ones are truncated, and that is reported."""
    eval: Annotated[float, Field(gt=0, lt=1)] | Text | None = 0.05
    """Share of the rows held out for evaluation, or a file of their own, or null for none."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many rows from the start; null uses all."""


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
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: cosine or linear down to zero, or constant."""
    warmup: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises from zero."""
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
    keep: Literal["best", "last"] = "best"
    """Which weights the run leaves: the best by evaluation loss, or the last."""
    seed: int = Field(default=0, ge=0)
    """Starting values, order of the data and dropout follow from it."""


def _adapter_section(value: Any) -> Any:
    value = _section("adapter")(value)
    if isinstance(value, dict) and "method" not in value:
        return {"method": "lora", **value}
    return value


def _quant_section(value: Any) -> Any:
    return _section("quant")("none" if value is None else value)


class RunConfig(Settings):
    """One run: run.yaml has exactly these seven keys."""

    base: Annotated[BaseConfig, BeforeValidator(_section("base"))]
    """The base model: a hub id or folder, or {path, revision, trust_remote_code, dtype, device}."""
    quant: Annotated[QuantConfig, BeforeValidator(_quant_section)] = QuantConfig()
    """How the base is stored: none or nf4, or {format, block_size, double}."""
    adapter: Annotated[AdapterConfig, BeforeValidator(_adapter_section)] = LoraConfig()
    """What is trained: {method: lora, r, lora_alpha, …} or {method: full}."""
    data: Annotated[DataConfig, BeforeValidator(_section("data"))]
    """The rows: a .jsonl file or hub data set, or {path, split, max_length, eval, limit}."""
    objective: Literal["sft"] = "sft"
    """What is learned: sft trains on the tokens of the assistant or of the completion."""
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
        return self
