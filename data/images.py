"""Encoded bytes -> a uint8 picture on a square canvas."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Allowed decoders; Pillow knows more, some of which run other programs."""
MOST_PIXELS = 100_000_000
"""A header that announces more is refused before anything is decoded (decompression bombs)."""

Image.MAX_IMAGE_PIXELS = None  # ours, checked below, comes first


class UnreadableImage(ValueError):
    """The bytes are no picture that we accept; the message says why."""


def open_image(payload: bytes, canvas: int | None = None) -> Image.Image:
    """Decode to an upright RGB Pillow image.

    Args:
        payload: an encoded file of one of `FORMATS`.
        canvas: if given, a larger picture is shrunk (antialiased) until both sides fit.

    Raises:
        UnreadableImage: unknown format, too many pixels, truncated or damaged.
    """
    try:
        image: Image.Image = Image.open(BytesIO(payload), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise UnreadableImage(f"{width}x{height} pixels are more than {MOST_PIXELS:,}")
        if canvas is not None and image.format == "JPEG" and max(width, height) >= 2 * canvas:
            # Decode at 1/2, 1/4 or 1/8 scale, never below the canvas.
            scale = canvas / max(width, height)
            image.draft("RGB", (round(width * scale), round(height * scale)))
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("RGB")
    except UnreadableImage:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(reason) from None
    if canvas is not None and max(image.size) > canvas:
        scale = canvas / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def decode(payload: bytes, canvas: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode onto a canvas.

    Returns:
        uint8 (3, canvas, canvas) with the picture at the top left and zeros elsewhere, and its
        (height, width) on the canvas. Larger pictures are shrunk to fit, smaller ones are not enlarged.

    Raises:
        UnreadableImage: see `open_image`.
    """
    pixels = np.asarray(open_image(payload, canvas)).transpose(2, 0, 1)
    height, width = pixels.shape[1:]
    if (height, width) == (canvas, canvas):
        return np.ascontiguousarray(pixels), (height, width)
    placed = np.zeros((3, canvas, canvas), dtype=np.uint8)
    placed[:, :height, :width] = pixels
    return placed, (height, width)
