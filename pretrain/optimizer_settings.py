"""A recipe's `optimizer`: one typed section an optimiser, and the rates that follow from it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain import schedules

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """What every optimiser has: a rate, a decay, and how both move."""

    model_config = ConfigDict(extra="forbid")

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate; of the recipe's global batch unless `lr_scaling` says otherwise."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """`linear`: lr * batch / lr_batch (Goyal et al. 2017, section 2.1); `sqrt`: its root (Krizhevsky 2014)."""
    lr_batch: int = Field(default=256, gt=0)
    """Global batch that `lr` was stated for; counts only with `lr_scaling`."""
    schedule: Literal["cosine", "wsd", "constant", "linear", "step"] = "cosine"
    """What the rate does after its warm-up; `wsd` stays level and falls at the end."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of training over which the rate rises from zero."""
    final: float = Field(default=0.0, ge=0)
    """Rate at the end, as a share of the peak (cosine, linear, wsd)."""
    decay: float = Field(default=0.2, ge=0, le=1)
    """Share of training over which `wsd` falls."""
    decay_shape: schedules.Shape = "sqrt"
    """How `wsd` falls: as one minus a square root, or linearly."""
    milestones: list[Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=lambda: [1 / 3, 2 / 3])
    """Shares of training at which `step` multiplies the rate with `factor`."""
    factor: float = Field(default=0.1, gt=0, le=1)
    """What `step` multiplies with."""
    weight_decay: float = Field(default=0.05, ge=0)
    """At the start; spares biases, norms, embeddings and tokens."""
    weight_decay_end: float | None = Field(default=None, ge=0)
    """At the end, reached by half a cosine (DINO, section 3.2); null keeps it constant."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Rate of a layer of the encoder over that of the layer above it (Clark et al. 2020; BEiT)."""

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} add up to more than the whole training")
        return self

    def peak(self, batch_size: int) -> float:
        """The highest rate, for a global batch of `batch_size` samples."""
        ratio = batch_size / self.lr_batch
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.lr_scaling]

    def rate(self, progress: float, batch_size: int) -> float:
        """The learning rate at `progress`, the share of training done."""
        peak = self.peak(batch_size)
        match self.schedule:
            case "cosine":
                return schedules.warmup_cosine(progress, peak, self.warmup, peak * self.final)
            case "linear":
                return schedules.warmup_linear(progress, peak, self.warmup, peak * self.final)
            case "wsd":
                final = peak * self.final
                return schedules.warmup_stable_decay(progress, peak, self.warmup, self.decay, final, self.decay_shape)
            case "step":
                return schedules.warmup_steps(progress, peak, self.warmup, self.milestones, self.factor)
            case "constant":
                return schedules.warmup_constant(progress, peak, self.warmup)

    def decay_at(self, progress: float) -> float:
        """The weight decay at `progress`."""
        end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return schedules.cosine(progress, self.weight_decay, end)


class AdamWConfig(OptimizerConfig):
    """Loshchilov and Hutter 2019; torch's, fused."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


class LambConfig(OptimizerConfig):
    """You et al. 2020, for large batches; timm's. Its weight decay is part of the update that it scales."""

    name: Literal["lamb"] = "lamb"
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the denominator."""


class SGDConfig(OptimizerConfig):
    """Momentum as in torch, weight decay as an L2 penalty."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate; of the recipe's global batch unless `lr_scaling` says otherwise."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """At the start; spares biases, norms, embeddings and tokens."""
    momentum: Share = 0.9
    """Decay of the running gradient."""
    nesterov: bool = False
    """Look ahead by one step of momentum."""

    @model_validator(mode="after")
    def _looks_ahead(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class LarsConfig(OptimizerConfig):
    """You et al. 2017: SGD whose step is a share of each matrix's norm; timm's. Vectors get plain SGD."""

    name: Literal["lars"] = "lars"
    lr: float = Field(default=0.3, gt=0)
    """Peak learning rate; of the recipe's global batch unless `lr_scaling` says otherwise."""
    weight_decay: float = Field(default=1e-6, ge=0)
    """At the start; spares biases, norms, embeddings and tokens."""
    momentum: Share = 0.9
    """Decay of the running gradient."""
    trust: float = Field(default=0.001, gt=0)
    """Length of a step at rate 1 as a share of the weights' norm (equation 6)."""
    vector_scale: float = Field(default=1.0, gt=0)
    """Rate of biases and norms over `lr` (Barlow Twins, section 2.2)."""


class MuonConfig(OptimizerConfig):
    """Jordan et al. 2024: orthogonalised momentum for hidden matrices, AdamW for all the rest."""

    name: Literal["muon"] = "muon"
    momentum: Share = 0.95
    """Decay of the matrices' running gradient (with Nesterov's look ahead)."""
    iterations: int = Field(default=5, ge=1)
    """Newton-Schulz iterations."""
    scaling: Literal["rms", "shape"] = "rms"
    """`rms`: updates as large as AdamW's, 0.2 * sqrt(longer side), so that one `lr` and one decay serve both
    (Liu et al. 2025, section 2.2). `shape`: sqrt(max(1, rows / columns)), Jordan's own."""
    adamw_scale: float = Field(default=1.0, gt=0)
    """Rate of AdamW's parameters over `lr`."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's."""


AnyOptimizer = AdamWConfig | LambConfig | SGDConfig | LarsConfig | MuonConfig
