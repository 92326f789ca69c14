"""Shifted copies of picture sets: noise, blur, contrast, brightness and JPEG artefacts, in five stated severities.

Kinds and strengths are those of CIFAR-10-C and ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking neural
network robustness to common corruptions and perturbations", section 3, and its code): the former's for pictures whose
shorter side is below 64 pixels, the latter's for others. Noise is drawn from the sample's key, so the same set comes
out wherever and in whatever order it is made.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data.dataset import ShardedDataset
from data.errors import UserError
from data.images import UnreadableImage, open_image
from data.keyed import hash_texts, uniform
from data.shards import DatasetWriter

Corruption = Literal["noise", "blur", "contrast", "brightness", "jpeg"]
CORRUPTIONS: tuple[Corruption, ...] = ("noise", "blur", "contrast", "brightness", "jpeg")
SEVERITIES = 5
SMALL = 64
"""Shorter side in pixels below which a picture has the strengths of CIFAR-10-C."""
_STRENGTHS: dict[Corruption, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""Of severities 1 to 5, for small pictures and for others: standard deviations (of values in [0, 1]; of pixels),
contrast that is left, added brightness, JPEG quality."""
_AT_ONCE = 256
Pixels = NDArray[np.uint8]
_Values = NDArray[np.float64]


def corrupted(image: Image.Image, kind: Corruption, severity: int, key: int) -> Image.Image:
    """An RGB picture as it looks under a corruption of severity 1 to 5; `key` (64 bits) decides its noise."""
    strength = _STRENGTHS[kind][min(image.size) >= SMALL][severity - 1]
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    if kind == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(strength))
        return Image.open(buffer).convert("RGB")
    values = np.asarray(image, dtype=np.float64) / 255
    changed = _RULES[kind](values, strength, key)
    return Image.fromarray(np.round(255 * np.clip(changed, 0, 1)).astype(np.uint8))


def corrupt(
    source: str | Path, out: Path, kind: str, severity: int, *, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Write a corrupted copy of a set of pictures, as PNG, with the same keys, labels and classes.

    Returns:
        `samples`, `classes`, `unreadable` ((key, reason) pairs), and what was done.

    Raises:
        UserError: no pictures at `source`, an unknown kind or severity, `out` exists.
    """
    chosen = _kind(kind)
    if not 1 <= severity <= SEVERITIES:
        raise UserError(f"there is no severity {severity}; give 1 (mild) to {SEVERITIES}")
    dataset = ShardedDataset(source, context=1)
    if dataset.kind != "images":
        raise UserError(f"{source} holds {dataset.kind}; only pictures can be corrupted")
    about = {"kind": chosen, "severity": severity, "seed": seed, "source": dataset.fingerprint}
    unreadable: list[tuple[str, str]] = []
    ids = dataset.all_ids()
    with DatasetWriter(out, "images", 10_000, overwrite) as writer:
        writer.extra = {"classes": dataset.classes, "corruption": about}
        for start in range(0, len(ids), _AT_ONCE):
            part = ids[start : start + _AT_ONCE]
            payloads, labels = dataset.pictures(part)
            names = [dataset.key(int(i)) for i in part]
            keys = hash_texts(seed, names).astype(np.int64)
            for name, payload, label, key in zip(names, payloads, labels.tolist(), keys.tolist(), strict=True):
                try:
                    buffer = io.BytesIO()
                    corrupted(open_image(payload), chosen, severity, key).save(buffer, "PNG", compress_level=1)
                except (OSError, UnreadableImage) as error:
                    unreadable.append((name, str(error)))
                    continue
                writer.add(name, {"png": buffer.getvalue()}, label)
    return {
        "samples": len(ids) - len(unreadable),
        "classes": dataset.classes,
        "corruption": about,
        "unreadable": unreadable,
    }


def _kind(name: str) -> Corruption:
    for known in CORRUPTIONS:
        if known == name:
            return known
    raise UserError(f"there is no corruption {name!r}; choose one of {', '.join(CORRUPTIONS)}")


def _noise(values: _Values, deviation: float, key: int) -> _Values:
    """Gaussian, independent for every pixel and channel (Box and Muller 1958)."""
    pairs = uniform(torch.tensor([key]), "corruption", (2, math.ceil(values.size / 2)))[0].double().numpy()
    radius, angle = np.sqrt(-2 * np.log1p(-pairs[0])), 2 * np.pi * pairs[1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: values.size]
    return values + deviation * normal.reshape(values.shape)


def _contrast(values: _Values, left: float, key: int) -> _Values:
    mean = values.mean(axis=(0, 1), keepdims=True)
    return (values - mean) * left + mean


def _brightness(values: _Values, added: float, key: int) -> _Values:
    """Added to the value of HSV: hue and saturation stay."""
    value = values.max(axis=2, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, values * brighter / np.maximum(value, 1e-12), brighter)


_RULES: dict[Corruption, Callable[[_Values, float, int], _Values]] = {
    "noise": _noise,
    "contrast": _contrast,
    "brightness": _brightness,
}
