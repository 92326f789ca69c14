"""What may be done to a picture before it is stored: a smaller size, another quality."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from data.errors import UserError
from data.images import open_image, verify

DEFAULT_QUALITY = 90
"""Of JPEGs that are made because a picture was shrunk, unless another is asked for."""


class Stored(NamedTuple):
    """A picture as it goes into a shard."""

    payload: bytes
    extension: str
    remade: bool
    """Whether these are other bytes than the file's."""


@dataclass(frozen=True)
class Remaking:
    """Shrink pictures whose shorter side is longer than `shorter_side`; encode as JPEG of `quality` (1 to 95).

    Without `quality` pictures that need not be shrunk keep their bytes; with it all are encoded anew. Neither
    set: every picture is stored as it is.
    """

    shorter_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        """Raises `UserError` for a size or quality that makes no sense."""
        if self.shorter_side is not None and self.shorter_side < 1:
            raise UserError(f"pictures cannot be shrunk to {self.shorter_side} pixels; give at least 1 (--resize)")
        if self.quality is not None and not 1 <= self.quality <= 95:
            raise UserError(f"JPEG knows no quality of {self.quality}; give 1 to 95 (--quality)")

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest; empty where nothing is done."""
        if self.shorter_side is None and self.quality is None:
            return {}
        quality = self.quality or DEFAULT_QUALITY
        return {"remade": {"shorter_side": self.shorter_side, "jpeg_quality": quality, "all": self.quality is not None}}

    def __call__(self, payload: bytes, extension: str) -> Stored:
        """Check that a picture can be decoded, and remake it where it is asked for.

        A remade picture is upright and RGB: its EXIF rotation is carried out, transparency and profile are gone.
        Raises `data.images.UnreadableImage` for what cannot be decoded.
        """
        if self.shorter_side is None and self.quality is None:
            verify(payload)
            return Stored(payload, extension, False)
        image = open_image(payload)
        shorter = min(image.size)
        shrink = self.shorter_side is not None and shorter > self.shorter_side
        if not shrink and self.quality is None:
            return Stored(payload, extension, False)
        if shrink and self.shorter_side is not None:
            width, height = (max(1, round(side * self.shorter_side / shorter)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=self.quality or DEFAULT_QUALITY)
        return Stored(buffer.getvalue(), "jpg", True)
