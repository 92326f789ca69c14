"""Encoded bytes -> uint8 crops, one picture at a time: the cheap way to crop large pictures on a CPU.

A crop that ends up small needs few of a large JPEG's pixels, so the file is decoded at 1/2, 1/4 or 1/8 scale
where every box still has at least the pixels asked for; then the box alone is resized, antialiased, on uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from data.images import UnreadableAt, UnreadableImage, check_pixels, open_image, picture_size
from data.jpeg import FACTORS, decode_scaled, jpeg_size

Boxes = Callable[[Tensor, Tensor], Tensor]
"""(keys int64 (b,), sizes int64 (b, 2)) -> boxes int64 (b, 4) or (b, v, 4): top, left, height, width in pixels."""
Interpolation = Literal["bilinear", "bicubic"]


class CropDecoder:
    """Decodes each picture once and cuts its boxes out, resized to `size` squares.

    As `decode` of a `Loader`, batches hold uint8 (b, 3, size, size) pictures, or (b, v, 3, size, size) where
    `boxes` gives `v` boxes a sample, and the pictures' own sizes, from which the boxes were drawn.
    """

    def __init__(self, size: int, boxes: Boxes, interpolation: Interpolation = "bicubic") -> None:
        self.size, self.boxes, self.interpolation = size, boxes, interpolation

    def __call__(self, payloads: Sequence[bytes], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Crops and sizes; raises `UnreadableAt`."""
        sizes = torch.empty((len(payloads), 2), dtype=torch.int64)
        for place, payload in enumerate(payloads):
            try:
                sizes[place, 0], sizes[place, 1] = upright_size(payload)
            except UnreadableImage as error:
                raise UnreadableAt(place, str(error)) from None
        boxes = self.boxes(keys, sizes)
        crops = torch.empty((*boxes.shape[:-1], 3, self.size, self.size), dtype=torch.uint8)
        table = boxes.reshape(len(payloads), -1, 4).numpy()
        for place, payload in enumerate(payloads):
            try:
                crop_boxes(payload, table[place], crops[place].view(-1, *crops.shape[-3:]), self.interpolation)
            except UnreadableImage as error:
                raise UnreadableAt(place, str(error)) from None
        return crops, sizes


def upright_size(payload: bytes) -> tuple[int, int]:
    """Height and width of a picture as it is meant to be seen, from its header.

    Raises:
        UnreadableImage: no picture, or too many pixels.
    """
    size = jpeg_size(payload)
    if size is None:
        return picture_size(payload)
    check_pixels(*size)
    return size


def crop_boxes(payload: bytes, boxes: NDArray[np.int64], out: Tensor, interpolation: Interpolation = "bicubic") -> None:
    """Cut `boxes` out of one encoded picture and resize them, antialiased, into `out`.

    Where the picture is decoded at 1/f scale, a box is rounded to whole pixels there: each side moves by at
    most f/2 pixels of the original.

    Args:
        boxes: (v, 4): top, left, height, width in pixels of the upright picture (`upright_size`).
        out: uint8 (v, 3, size, size), written to.

    Raises:
        UnreadableImage: see `data.images.open_image`.
    """
    side = out.shape[-1]
    pixels, factor = _decode_for(payload, int(boxes[:, 2:].min()), side)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    height, width = pixels.shape[:2]
    for place, (top, left, tall, wide) in enumerate(boxes.tolist()):
        if factor > 1:
            top, tall = _rounded(top, tall, factor, height)
            left, wide = _rounded(left, wide, factor, width)
        box = picture[:, :, top : top + tall, left : left + wide]
        if (tall, wide) == (side, side):
            out[place] = box[0]
        else:
            out[place] = interpolate(box, (side, side), mode=interpolation, antialias=True, align_corners=False)[0]


def _decode_for(payload: bytes, shortest: int, side: int) -> tuple[NDArray[np.uint8], int]:
    """Upright pixels (h, w, 3) and the factor by which they are smaller than the original."""
    size = jpeg_size(payload)
    if size is not None:
        check_pixels(*size)
        factor = next((f for f in FACTORS if shortest >= f * side), 1)
        pixels = decode_scaled(payload, size, (-(-size[0] // factor), -(-size[1] // factor)))
        if pixels is not None:
            return pixels, factor
    return np.array(open_image(payload)), 1


def _rounded(start: int, length: int, factor: int, most: int) -> tuple[int, int]:
    """An interval in pixels of the scaled picture, never empty nor beyond its end."""
    first = min(round(start / factor), most - 1)
    return first, max(1, min(round((start + length) / factor), most) - first)
