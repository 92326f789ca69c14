"""A recipe: everything that defines a run, as typed fields (`recipe_file` reads them from YAML)."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data.order import BLOCK_SAMPLES
from pretrain.clock import seconds_of
from pretrain.encoders.text import TextConfig
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.pictures import PictureConfig
from pretrain.objectives.texts import TextObjectiveConfig
from pretrain.optimizer_settings import AdamWConfig, AnyOptimizer
from pretrain.precision import spelled
from pretrain.warmup import BatchWarmup, ContextWarmup


class DataConfig(BaseModel):
    """Where samples come from."""

    model_config = ConfigDict(extra="forbid")

    train: str | list[str] | dict[str, float] | None = None
    """Folder or glob of shards, or a list of tars; or several, each with its weight, mixed in exact proportions."""
    validation: str | float | None = None
    """Held-out shards, or a share of `train` (pictures only). Text shards bring their own by default."""
    watched: dict[str, str] = Field(default_factory=dict)
    """Further held-out shards, by name, whose loss is recorded at each evaluation: what a run that goes on from
    trained weights may forget, for example."""
    canvas: int = Field(default=256, ge=1)
    """Side of the square that pictures are decoded onto, in pixels; larger ones are shrunk to fit."""
    workers: int = Field(default=2, ge=0)
    """Reading and decoding processes for each training process; cannot change what is trained."""
    lanes: int = Field(default=1, ge=1)
    """Pieces of the shards that are read side by side: with as many as nodes, each node reads only its share of the
    shards. Part of what the order is, so it stays what it was when a run goes on with other nodes."""
    shuffle_samples: int = Field(default=BLOCK_SAMPLES, ge=1)
    """Samples that are mixed at least; fewer need fewer shards at hand at a time (at least 16 are mixed)."""
    resident: bool = False
    """Decode all training pictures once and keep them on the device, for sets that fit; the batches stay the same."""
    damaged: int = Field(default=0, ge=0)
    """Damaged samples that a run replaces by others, all processes together, before it stops."""


class TrainConfig(BaseModel):
    """How long, how wide, how precise."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=256, gt=0)
    """Samples (pictures, rows) of one global batch, over all processes."""
    batch_warmup: BatchWarmup | None = None
    """Begin with smaller global batches; null for `batch_size` throughout."""
    context_warmup: ContextWarmup | None = None
    """Begin with shorter rows (text only); null for the encoder's context throughout."""
    steps: int | None = Field(default=None, gt=0)
    """Optimiser steps; give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training samples; give this or `steps`."""
    microbatch: int | None = Field(default=None, gt=0)
    """Most samples a process holds at once; the rest of its share is accumulated."""
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(spelled)] = "no"
    """Mixed precision, by Accelerate. `auto`: bf16 on a device that multiplies it (CUDA from compute capability 8.0,
    CPUs with avx512_bf16 or AMX), else no; decided once, when the run begins, and kept when it goes on elsewhere."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of an average of the encoder's weights, which is then evaluated and exported."""
    shard: bool = False
    """Cut weights, gradients and optimiser state over the processes (FSDP2), for models that no device trains whole;
    cannot change what is trained. An evaluation holds one float32 copy of the weights on each device beside;
    watch.evaluate_every=0 does without."""
    recompute: bool = False
    """Keep only the inputs of the encoder's blocks and compute the rest again in the backward pass: far less memory
    for about a third more arithmetic; cannot change what is trained."""
    compile: bool = False
    """torch.compile the objective."""
    deterministic: bool = False
    """Ask torch for deterministic kernels (a CPU run is exact without it)."""
    skips: int = Field(default=20, ge=0)
    """Bad steps in a row (loss or gradient not finite, or a spike) that are skipped before the run is rolled back."""
    rollbacks: int = Field(default=3, ge=0)
    """Times that a run goes back to a checkpoint and past the samples since, before it stops."""
    spike: float | None = Field(default=None, gt=0)
    """Robust z-score above the recent losses from which a step is bad; 8 is cautious. Without it none is."""
    spike_window: int = Field(default=128, ge=8)
    """Losses that a spike is compared with."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_runs(cls, values: Any) -> Any:
        """Recipes in the folders of older runs say whether views are compiled; now they always are."""
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "compile_views"}
        return values

    @model_validator(mode="after")
    def _grows_evenly(self) -> Self:
        if self.batch_warmup is not None and self.batch_size % self.batch_warmup.start:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of batch_warmup.start")
        return self

    def batch_size_at(self, position: int) -> int:
        """Samples of the global batch that begins at `position`."""
        return self.batch_size if self.batch_warmup is None else self.batch_warmup.size(position, self.batch_size)


class WatchConfig(BaseModel):
    """What is measured, kept and shown while a run goes on; changes nothing in what is trained."""

    model_config = ConfigDict(extra="forbid")

    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int | None = Field(default=None, ge=0)
    """Steps between two evaluations (and at the end); 0 for never; null for at most one sample looked at for
    every hundred trained on, which costs less than 2 % of the run."""
    evaluate_samples: int = Field(default=2048, ge=1)
    """Most held-out samples of one evaluation."""
    prompts: list[str] = Field(default_factory=list)
    """Beginnings that a next-token model continues at each evaluation, into samples.jsonl."""
    sample_tokens: int = Field(default=64, ge=1)
    """Most tokens of such a text."""
    knn_samples: int = Field(default=10_000, ge=0)
    """Most labelled training pictures in the bank of the online kNN probe; 0 for none."""
    knn_neighbours: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    knn_temperature: float = Field(default=0.07, gt=0)
    """A neighbour's vote is exp(similarity / temperature) (Wu et al. 2018, section 3.4)."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two checkpoints (and at the end)."""
    checkpoint_keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    checkpoint_keep_every: int = Field(default=0, ge=0)
    """Checkpoints of every so many steps are kept for good; 0 for none."""
    max_time: Annotated[float, BeforeValidator(seconds_of), Field(gt=0)] | None = None
    """Seconds, or "hours:minutes:seconds", from the start of the launcher to a saved stop; a scheduler's limit."""
    hang_factor: float = Field(default=30.0, ge=0)
    """Median step times without a step after which a run counts as hung; its stacks are written, and it ends. 0: never.
    The first step, evaluations and saves have ten times as long."""
    hang_seconds: float = Field(default=600.0, gt=0)
    """But never before this many seconds."""
    trackers: list[str] = Field(default_factory=list)
    """Accelerate's trackers: tensorboard, wandb, mlflow, …"""


Encoder = Annotated[VisionConfig | TextConfig, Field(discriminator="kind")]
ObjectiveConfig = Annotated[PictureConfig | TextObjectiveConfig, Field(discriminator="name")]
Optimizer = Annotated[AnyOptimizer, Field(discriminator="name")]


class RunRecipe(BaseModel):
    """What the loop reads of a recipe, whatever is trained."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Names the run's folder: letters, digits, `_`, `-` and dots."""
    seed: int = 0
    """Of the initial weights, the order of samples, views and masks."""
    optimizer: Optimizer = Field(default_factory=AdamWConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)

    def pieces(self, progress: float) -> int:
        """Rows that each row of a batch is cut into at `progress`."""
        return 1

    def identity(self) -> dict[str, Any]:
        """The parts that decide what is trained: what a checkpoint must agree with to be resumed.

        How the global batch is split does not count, nor how the same sums are computed (`compile`,
        `deterministic`, `shard`), which changes their rounding alone.
        """
        whole = self.model_dump(mode="json", exclude={"name", "watch"})
        for how in ("skips", "rollbacks", "spike", "spike_window", "microbatch"):
            del whole["train"][how]
        for how in ("shard", "recompute", "compile", "deterministic"):
            del whole["train"][how]
        return whole

    def hash(self) -> str:
        """Short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def with_precision(self, automatic: str) -> Self:
        """The recipe with `automatic` for `train.precision=auto`; itself where that is decided."""
        if self.train.precision != "auto":
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"precision": automatic})})


class Recipe(RunRecipe):
    """Everything that defines a pre-training run."""

    start: str | None = None
    """Folder of trained weights to start from: an export, or a transformers checkpoint of the same architecture."""
    data: DataConfig = Field(default_factory=DataConfig)
    encoder: Encoder
    objective: ObjectiveConfig

    @model_validator(mode="before")
    @classmethod
    def _unnamed(cls, tree: Any) -> Any:
        """An optimiser without a name is AdamW."""
        if isinstance(tree, dict) and isinstance(tree.get("optimizer"), dict) and "name" not in tree["optimizer"]:
            return tree | {"optimizer": {"name": "adamw"} | tree["optimizer"]}
        return tree

    def steps(self, samples: int) -> int:
        """Optimiser steps of the whole run over a dataset of `samples`."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        seen, full, warmup = self.train.epochs * samples, self.train.batch_size, self.train.batch_warmup
        return max(1, round(seen / full) if warmup is None else warmup.steps(seen, full))

    def pieces(self, progress: float) -> int:
        """More than one while short rows are trained on (`train.context_warmup`; text only)."""
        warmup = self.train.context_warmup
        return warmup.pieces(progress, self.encoder.context) if warmup and self.encoder.kind == "text" else 1

    def identity(self) -> dict[str, Any]:
        """The parts that decide what is trained; where the shards lie does not count (their fingerprint does)."""
        whole = super().identity()
        for where in ("train", "resident", "watched", "workers", "damaged"):
            del whole["data"][where]
        whole["start"] = self.start is not None
        if isinstance(self.data.validation, str):  # a share is cut off the training samples; other shards are not
            whole["data"]["validation"] = None
        return whole
