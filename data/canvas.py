"""Encoded bytes -> a uint8 picture on a square canvas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from data.images import UnreadableAt, UnreadableImage, check_pixels, inside, open_image
from data.jpeg import decode_scaled, jpeg_size


def decode(payload: bytes, canvas: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode onto a canvas.

    Returns:
        uint8 (3, canvas, canvas) with the picture at the top left and zeros elsewhere, and its
        (height, width) on the canvas. Larger pictures are shrunk to fit, smaller ones are not enlarged.

    Raises:
        UnreadableImage: see `open_image`.
    """
    placed = np.zeros((3, canvas, canvas), dtype=np.uint8)
    return placed, place(payload, placed)


def place(payload: bytes, canvas: NDArray[np.uint8]) -> tuple[int, int]:
    """Decode to the top left of a `canvas` (3, side, side), zero elsewhere; see `decode`."""
    side = canvas.shape[1]
    pixels = _fitting(payload, side)
    height, width = pixels.shape[:2]
    canvas[:, :height, :width] = pixels.transpose(2, 0, 1)
    canvas[:, height:] = 0
    canvas[:, :height, width:] = 0
    return height, width


def _fitting(payload: bytes, side: int) -> NDArray[np.uint8]:
    """The picture (h, w, 3), neither side longer than `side`."""
    size = jpeg_size(payload)
    if size is None:
        return np.asarray(open_image(payload, side))
    check_pixels(*size)
    if max(size) <= side:
        pixels = decode_scaled(payload, size, size)
        return pixels if pixels is not None else np.asarray(open_image(payload, side))
    width, height = inside((size[1], size[0]), side)
    pixels = decode_scaled(payload, size, (height, width))
    if pixels is None:
        return np.asarray(open_image(payload, side))
    if pixels.shape[:2] == (height, width):
        return pixels
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = interpolate(picture, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return small[0].permute(1, 2, 0).numpy()


class CanvasDecoder:
    """Decodes each picture onto a square canvas of its own: what a `Loader` with a `canvas` does."""

    def __init__(self, canvas: int) -> None:
        self.canvas = canvas

    def __call__(self, payloads: Sequence[bytes], keys: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (b, 3, canvas, canvas) and int64 (b, 2) heights and widths; raises `UnreadableAt`."""
        # Interleaved in memory, as decoders give pixels and as crops on a CPU want them.
        pixels = np.empty((len(payloads), self.canvas, self.canvas, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
        sizes = []
        for number, payload in enumerate(payloads):
            try:
                sizes.append(place(payload, pixels[number]))
            except UnreadableImage as error:
                raise UnreadableAt(number, str(error)) from None
        return torch.from_numpy(pixels), torch.tensor(sizes, dtype=torch.int64).reshape(len(sizes), 2)
