"""Encoded bytes -> an upright RGB picture, by Pillow: every format and oddity that we accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Allowed decoders; Pillow knows more, some of which run other programs."""
MOST_PIXELS = 100_000_000
"""A header that announces more is refused before anything is decoded (decompression bombs)."""


class UnreadableImage(ValueError):
    """The bytes are no picture that we accept; the message says why."""


class UnreadableAt(UnreadableImage):
    """The picture at `place` of a batch cannot be read."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def verify(payload: bytes) -> None:
    """Decode and forget: passes exactly what `open_image` can read, at less cost.

    A JPEG is decoded at an eighth of its size, which still reads every one of its bytes.

    Raises:
        UnreadableImage: unknown format, too many pixels, truncated or damaged.
    """
    with _refusing():
        image = _open(payload)
        if image.format == "JPEG":
            image.draft("RGB", (1, 1))
        image.load()


def open_image(payload: bytes, canvas: int | None = None) -> Image.Image:
    """Decode to an upright RGB Pillow image.

    Args:
        payload: an encoded file of one of `FORMATS`.
        canvas: if given, a larger picture is shrunk (antialiased) until both sides fit.

    Raises:
        UnreadableImage: unknown format, too many pixels, truncated or damaged.
    """
    with _refusing():
        image = _open(payload)
        if image.format == "JPEG" and canvas is not None and max(image.size) >= 2 * canvas:
            # Decode at 1/2, 1/4 or 1/8 scale, never below the canvas.
            image.draft("RGB", inside(image.size, canvas))
        image.load()
        with suppress(Exception):  # damaged EXIF says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        image = image.convert("RGB")
        if canvas is not None and max(image.size) > canvas:
            image = image.resize(inside(image.size, canvas), Image.Resampling.BICUBIC)
    return image


def _open(payload: bytes) -> Image.Image:
    """The picture's header, its pixels not yet decoded."""
    image = Image.open(BytesIO(payload), formats=FORMATS)
    check_pixels(image.height, image.width)
    return image


def check_pixels(height: int, width: int) -> None:
    """Raises `UnreadableImage` for a picture of more than `MOST_PIXELS`."""
    if width * height > MOST_PIXELS:
        raise UnreadableImage(f"{width}x{height} pixels are more than {MOST_PIXELS:,}")


def picture_size(payload: bytes) -> tuple[int, int]:
    """Height and width, in pixels, of the upright picture, from its header; raises `UnreadableImage`."""
    with _refusing():
        image = _open(payload)
        turned = False
        with suppress(Exception):  # damaged EXIF says nothing about the pixels
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def inside(size: tuple[int, int], canvas: int) -> tuple[int, int]:
    """The largest size of the same aspect within the canvas; no side vanishes."""
    scale = canvas / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever a decoder raises becomes `UnreadableImage`.

    Damaged files make Pillow raise nearly anything (struct.error, ZeroDivisionError, KeyError, …), and one
    of them among millions must not end a run.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not a picture") from None
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None
