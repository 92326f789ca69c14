"""What can be set about fine-tuning."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data.errors import UserError
from finetune.encoder import Augmentation, Pooling
from pretrain.precision import spelled

Strategy = Literal["knn", "linear", "frozen", "lora", "dora", "lp-ft", "gradual", "full", "scratch"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
"""Cheap to dear; `scratch`, which has most to learn, is the control."""


class Settings(BaseModel):
    """Settings of all strategies; each reads its own.

    *Trained* are the encoders of lora and all strategies after it; *stepped*, these and the head of frozen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Annotated[Literal["no", "bf16", "fp16", "auto"] | None, BeforeValidator(spelled)] = None
    """Arithmetic of the encoder; weights and head stay in float32. `auto`: bf16 where the device multiplies that.
    Where not given, `no` (float32), or what Accelerate's environment or this process has set already."""
    cpu: bool = False
    """Stay on the CPU where an accelerator is at hand."""
    inference_batch: int = Field(256, ge=1)
    """Samples a step when features are extracted."""
    pooling: Pooling | None = None
    """Of a text encoder's tokens: their mean, or the last one, the only one of a decoder's to have seen the whole text.
    Where not given, `last` for decoders of transformers, else `mean`."""

    k: int | None = Field(None, ge=1)
    """knn: neighbours that vote; chosen by leave-one-out on the training labels where not given."""
    temperature: float = Field(0.07, gt=0)
    """knn: smaller gives near neighbours more weight (DINO's protocol)."""
    strength: float | None = Field(None, gt=0)
    """linear, lp-ft: inverse L2 penalty (scikit-learn's C); chosen on inner splits where not given."""
    standardize: bool = True
    """linear, lp-ft: give every feature variance one; off for features that share a unit, such as raw pixels."""

    hidden: int | None = Field(None, ge=0)
    """frozen: width of the head's hidden layer, 0 for a linear head; chosen on an inner split where not given."""

    rank: int = Field(8, ge=1)
    """lora, dora: rows of each adapter's smaller side (Hu et al. 2022)."""
    alpha: float = Field(16.0, gt=0)
    """lora, dora: what an adapter adds is multiplied with alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """lora, dora: share of an adapter's inputs that is dropped while it trains."""
    target_modules: str | None = None
    """lora, dora: regular expression for the whole names of the modules that get adapters, such as
    `blocks.*(qkv|proj)`; where not given, all linear layers above the stem, or else its convolutions."""

    unfrozen_by: float = Field(0.5, gt=0, le=1)
    """gradual: share of the steps after which every layer trains (Howard and Ruder 2018)."""

    lr: float | None = Field(None, gt=0)
    """stepped: peak learning rate of the head and, scaled down by depth, of the encoder.
    Where not given, the best of a few on an inner split of the training labels (see `finetune.rates`)."""
    trial_share: float = Field(1.0, gt=0, le=1)
    """trained: share of the steps that each of those rates is tried for, by a whole schedule of that length."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """full, lp-ft, gradual: rate of each layer over that of the one above it (BEiT, MAE appendix A.1).
    Where not given, 0.75 for encoders of twelve layers or more, and nearer to 1 the fewer there are: with four, 0.917
    (see `finetune.layers.default_decay`)."""
    weight_decay: float = Field(0.05, ge=0)
    """stepped: AdamW's, on matrices only."""
    batch_size: int = Field(32, ge=1)
    """stepped: samples a step."""
    epochs: float = Field(5.0, gt=0)
    """stepped: passes over the labels, where that is more than `min_steps` steps."""
    min_steps: int = Field(300, ge=1)
    """stepped: few labels need many passes (Mosbach et al. 2021, section 6)."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """stepped: share of the steps over which the learning rate rises."""
    clip: float = Field(1.0, gt=0)
    """stepped: largest norm of the gradient."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """stepped: probability taken from the true class and spread over all."""
    crop: tuple[float, float] | None = (0.6, 1.0)
    """trained, images: least and largest share of the picture in a random crop; none without."""
    flip: float = Field(0.0, ge=0, le=1)
    """trained, images: share mirrored; 0.5 suits natural pictures, not digits or signs."""
    mixup: float = Field(0.0, ge=0, le=1)
    """trained, images: both parameters of mixup's Beta distribution (Zhang et al. 2018); 0 for none."""
    cutmix: float = Field(0.0, ge=0, le=1)
    """trained, images: the same of CutMix (Yun et al. 2019); one of the two a pair where both are on."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """trained: share of samples that skip the last block, the lower ones less (Huang et al. 2016).
    Where not given, what the encoder was pre-trained with."""
    balance: bool = False
    """trained: let every class count alike in the loss, whatever its share of the labels."""
    ema: float | None = Field(None, ge=0, lt=1)
    """trained: momentum of an average of the weights, which is then the model; none without."""
    patience: int | None = Field(None, ge=1)
    """trained: hold out a quarter of the labels, look at it ten times, keep the best state, and stop after so
    many looks without a better one. Without it all labels train, to the last step."""
    microbatch: int | None = Field(None, ge=1)
    """trained: most samples that a process holds at once; the rest of its share is accumulated."""
    checkpoint_every: int | None = Field(None, ge=1)
    """trained, with an output: steps between two checkpoints; a tenth of the steps where not given."""

    @property
    def trial(self) -> Settings:
        """For trying a learning rate: the same, over `trial_share` of the steps."""
        fewer = max(1, round(self.trial_share * self.min_steps))
        return self.model_copy(update={"min_steps": fewer, "epochs": self.trial_share * self.epochs})

    @property
    def augmentation(self) -> Augmentation | None:
        """Keyed views for training, or None for plain ones."""
        if self.crop is None and not self.flip:
            return None
        return Augmentation(scale=self.crop or (1.0, 1.0), flip=self.flip)


def settings_from(values: dict[str, Any]) -> Settings:
    """Validated settings; raises `UserError` with the nearest name for an unknown one."""
    for name in values:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(Settings.model_fields)}"
            raise UserError(f"fine-tuning has no setting {name!r}; {hint}")
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"setting {place}={first['input']!r} is not possible: {first['msg']}") from None
