"""The recipe as data: frozen pydantic models, unknown keys forbidden. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$", max_length=80)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=80)]
"""Name of a step or data set: no dots, so that `STEP.attribute` has one reading."""
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
"""A list of texts; a single text stands for a list of one."""
NonEmptyTexts = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=str | Annotated[list[str], Field(min_length=1)]),
]


class Strict(BaseModel):
    """Base of all recipe models: frozen, no unknown keys. The loader validates strictly: "3" is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Strict):
    """Where the model comes from and which head it gets."""

    source: str | None = Field(None, description="hub id | directory | package:NAME/PATH")
    config: dict[str, Any] | None = Field(
        None, description="transformers config as a mapping with model_type; plans without the source"
    )
    task: str | None = Field(
        None, description="transformers task, chooses the Auto class; default feature-extraction"
    )
    labels: Positive | None = Field(None, description="number of labels of the head")
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _has_origin(self) -> ModelSpec:
        if self.source is None and self.config is None:
            raise ValueError("give `source` (hub id, directory, package:NAME/PATH) or `config`")
        return self


class DataSpec(Strict):
    """One data set. `source` is text | csv | json | parquet | builtin:python-docs | a hub id."""

    source: str
    files: str | list[str] | dict[str, str | list[str]] | None = None
    name: str | None = Field(None, description="configuration of a hub data set, e.g. sst2 of glue")
    split: dict[str, str] | None = Field(None, description="our split -> the source's split name")
    text: Texts = Field(default_factory=lambda: ["text"], description="one or two text columns")
    label: str | None = None
    max_length: Positive = 128
    delimiter: str = ","
    quoting: bool = Field(True, description="csv: false reads quote characters as text")
    limit: Positive | dict[str, Positive] | None = Field(None, description="first rows of a split only")
    validation_fraction: Fraction = Field(
        0.0, description="share of train set aside where no validation split is"
    )


class Scope(Strict):
    """What a pass touches; every pass takes these keys beside its own options."""

    targets: Texts = Field(default_factory=list)
    exclude: Texts = Field(default_factory=list)
    count: Positive | None = None


SCOPE_KEYS = tuple(Scope.model_fields)


class PassCall(Strict):
    """One pass of a compress step: its name, its scope and its options as written."""

    name: str
    scope: Scope
    options: dict[str, Any]


class LossSpec(Strict):
    """One loss term of a distillation."""

    kind: Literal["task", "kl", "soft-ce", "mse", "mae", "cosine", "relation"]
    at: str = Field(
        "logits", description="a tap: logits, sentence, embeddings, hidden, ffn.output, ... or an FQN"
    )
    weight: float | list[tuple[Fraction, float]] = Field(
        1.0, description="a number, or points [progress, weight] joined by straight lines"
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    layers: Literal["uniform", "last"] | list[tuple[int, int]] | None = Field(
        None, description="pairs [student, teacher]; default one to one, or uniform where depths differ"
    )
    heads: Positive | None = Field(
        None, description="relation: into so many heads both widths are split; default those of the teacher"
    )


class CalibrationSpec(Strict):
    """The rows that passes measure a model on, before they rewrite it."""

    data: str
    split: str = "train"
    rows: Positive = Field(512, description="so many rows, drawn by seed")
    batch_size: Positive = 32
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Training(Strict):
    """Options of the one training loop."""

    data: str
    split: str = "train"
    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None
    batch_size: Positive = 32
    accumulate: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    labels: Positive | None = Field(None, description="give the head this many labels, newly initialised")
    freeze: Texts = Field(default_factory=list, description="targets whose parameters do not train")
    checkpoint_every: Positive = Field(200, description="optimiser steps between checkpoints")
    evaluate_every: Positive | None = Field(None, description="optimiser steps between evaluations")
    during: list[PassCall] = Field(
        default_factory=list, description="passes that work while the step trains, and are settled at its end"
    )

    @model_validator(mode="after")
    def _has_length(self) -> Training:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either `epochs` or `max_steps`")
        return self


class Compress(Strict):
    """Apply passes to a model, in order."""

    model: str
    passes: Annotated[list[PassCall], Field(min_length=1)]
    calibrate: CalibrationSpec | None = Field(
        None, description="rows for passes that want to know what flows through a module"
    )


class Finetune(Training):
    """Train a model on labelled data."""

    model: str


class Distill(Training):
    """Train a student to follow a teacher."""

    student: str
    teacher: str
    losses: Annotated[list[LossSpec], Field(min_length=1)]
    copy_from_teacher: Texts = Field(
        default_factory=list, description="targets whose weights start from the teacher's, e.g. '@head'"
    )
    cache_teacher: bool = Field(False, description="store teacher outputs on disk for repeated epochs")


class Reconstruct(Strict):
    """Fit a compressed model to its teacher block after block, without a pass through the whole model.

    A block gets its inputs from the blocks before it, already fitted, and the teacher's outputs as targets.
    """

    student: str
    teacher: str
    data: str
    split: str = "train"
    rows: Positive = Field(2048, description="so many rows, drawn by seed; no labels are read")
    epochs: Annotated[float, Field(gt=0)] = 3.0
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Evaluate(Strict):
    """Measure models on data."""

    models: NonEmptyTexts
    data: str
    split: str = "validation"
    metrics: NonEmptyTexts
    against: str | None = Field(None, description="reference model of fidelity")
    batch_size: Positive = 32


class Export(Strict):
    """Write a model as a Hugging Face directory."""

    model: str
    to: str | None = Field(None, description="directory; default steps/NAME of the run")
    dtype: Literal["fp32", "bf16", "fp16"] | None = None


Action = Compress | Finetune | Distill | Reconstruct | Evaluate | Export
STEP_KINDS: dict[str, type[Action]] = {
    "compress": Compress,
    "finetune": Finetune,
    "distill": Distill,
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "export": Export,
}


class Recipe(Strict):
    """A whole recipe, resolved: `extends`, `--set` and `for_each` are already applied."""

    kroncc: Literal[1]
    name: Name
    model: ModelSpec
    data: dict[Word, DataSpec] = Field(default_factory=dict)
    steps: dict[Word, Action]
    expect: dict[str, str] = Field(default_factory=dict)


def inputs_of(action: Action) -> tuple[str, ...]:
    """Return the names of the models a step takes, in order."""
    match action:
        case Compress() | Finetune() | Export():
            return (action.model,)
        case Distill() | Reconstruct():
            return (action.student, action.teacher)
        case Evaluate():
            return (*action.models, *([action.against] if action.against else []))
