"""Laws of the fast paths of decoding: the pictures are Pillow's, and crops are those of the whole picture."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import picture_of_waves
from torch import Tensor

from data.canvas import decode
from data.crops import CropDecoder, crop_boxes, upright_size
from data.images import MOST_PIXELS, UnreadableAt, UnreadableImage, open_image
from data.jpeg import jpeg_size


def jpeg(pixels: np.ndarray, mode: str = "RGB", **arguments: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **arguments)
    return buffer.getvalue()


def oriented(pixels: np.ndarray, orientation: int, **arguments: Any) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    return jpeg(pixels, exif=exif.tobytes(), **arguments)


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from(["RGB", "L"]),
    st.integers(20, 98),
    st.integers(0, 2),
    st.booleans(),
)
@settings(deadline=None)
def test_a_jpeg_is_pillows_bit_for_bit(
    height: int, width: int, mode: str, quality: int, subsampling: int, progressive: bool
) -> None:
    noise = np.random.Generator(np.random.Philox(height * 61 + width)).integers(0, 256, (height, width, 3), np.uint8)
    payload = jpeg(noise, mode, quality=quality, subsampling=subsampling, progressive=progressive)
    assert jpeg_size(payload) == (height, width)
    pixels, (h, w) = decode(payload, 60)
    assert np.array_equal(pixels[:, :h, :w].transpose(1, 2, 0), np.asarray(open_image(payload)))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_of_damaged_jpegs_pillow_decides(data: st.DataObject) -> None:
    """Read as Pillow reads it, or refused as Pillow refuses it; never a third thing."""
    payload = bytearray(picture(2, 24, 24, "JPEG"))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = np.asarray(open_image(bytes(payload)))
        except UnreadableImage:
            expected = None
        if expected is not None and max(expected.shape) <= 64:
            pixels, (height, width) = decode(bytes(payload), 64)
            assert np.array_equal(pixels[:, :height, :width].transpose(1, 2, 0), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decoy", [False, True])
def test_cameras_held_sideways(orientation: int, decoy: bool) -> None:
    pixels = picture_of_waves(40, 30)
    # The marker of EXIF may also stand somewhere in a comment.
    payload = oriented(pixels, orientation, quality=95, **({"comment": b"Exif\0\0"} if decoy else {}))
    expected = np.asarray(open_image(payload))
    assert upright_size(payload) == expected.shape[:2] == ((40, 30) if orientation < 5 else (30, 40))
    found, (height, width) = decode(payload, 40)
    assert np.array_equal(found[:, :height, :width].transpose(1, 2, 0), expected)
    assert (jpeg_size(payload) is not None) == (orientation == 1 and not decoy)


@pytest.mark.parametrize("orientation", [1, 6])
def test_long_files_are_searched_up_to_their_first_scan(orientation: int) -> None:
    payload = oriented(picture_of_waves(700, 600), orientation, quality=98)
    assert len(payload) > 2**14
    assert jpeg_size(payload) == ((700, 600) if orientation == 1 else None)
    assert upright_size(payload) == ((700, 600) if orientation == 1 else (600, 700))
    # What stands behind the header says nothing; a header that cannot be followed is Pillow's to read.
    assert jpeg_size(payload + b"Exif\0\0" + b"tiff:Orientation") == jpeg_size(payload)
    assert jpeg_size(payload[:2] + b"\xff" + payload[2:]) is None


def cropped(payload: bytes, boxes: list[list[int]], side: int) -> Tensor:
    out = torch.empty((len(boxes), 3, side, side), dtype=torch.uint8)
    crop_boxes(payload, np.array(boxes), out, "bilinear")
    return out


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(jpeg(picture_of_waves(90, 70), quality=95), id="JPEG"),
        pytest.param(jpeg(picture_of_waves(90, 70), "L", quality=95), id="grey"),
        pytest.param(jpeg(picture_of_waves(90, 70), "CMYK", quality=95), id="CMYK"),
        pytest.param(oriented(picture_of_waves(70, 90), 6, quality=95), id="sideways"),
        pytest.param(picture(1, 90, 70), id="PNG"),
        pytest.param(picture(1, 90, 70, "WEBP"), id="WebP"),
    ],
)
def test_crops_are_those_of_the_whole_picture(payload: bytes) -> None:
    assert upright_size(payload) == (90, 70)
    boxes = [[0, 0, 90, 70], [10, 5, 40, 60], [89, 69, 1, 1], [3, 4, 32, 32]]
    whole = open_image(payload)
    for (top, left, height, width), found in zip(boxes, cropped(payload, boxes, 32), strict=True):
        box = whole.crop((left, top, left + width, top + height))
        expected = np.asarray(box.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
        assert np.abs(found.numpy() - expected).max() <= 1


def test_large_boxes_of_large_jpegs_are_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a scale where each box keeps the pixels asked for, with nearly the same result."""
    payload = jpeg(picture_of_waves(800, 640), quality=95)
    decoded = []

    def recording(*arguments: Any) -> Any:
        pixels = decode_scaled(*arguments)
        decoded.append(pixels.shape)
        return pixels

    from data.jpeg import decode_scaled

    monkeypatch.setattr("data.crops.decode_scaled", recording)
    whole = open_image(payload)
    for box, shape in (
        ([0, 0, 800, 640], (100, 80, 3)),
        ([100, 37, 300, 301], (200, 160, 3)),
        ([11, 13, 128, 130], (400, 320, 3)),
        ([11, 0, 127, 640], (800, 640, 3)),
    ):
        top, left, height, width = box
        found = cropped(payload, [box], 64)[0].numpy().astype(int)
        expected = whole.crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(found - np.asarray(expected).transpose(2, 0, 1)).mean() < 3
        assert decoded.pop() == shape
    cropped(payload, [[0, 0, 800, 640], [0, 0, 64, 64]], 64)  # the smallest box decides
    assert decoded.pop() == (800, 640, 3)


def test_a_decoder_of_crops_draws_boxes_from_sizes_and_keys() -> None:
    payloads = [picture(n, 20 + n, 30 + n) for n in range(3)]
    asked = {}

    def boxes(keys: Tensor, sizes: Tensor) -> Tensor:
        asked["keys"], asked["sizes"] = keys, sizes
        return torch.stack([torch.tensor([[0, 0, *size], [1, 2, 8, 8]]) for size in sizes.tolist()])

    keys = torch.arange(3)
    crops, sizes = CropDecoder(8, boxes, "bilinear")(payloads, keys)
    assert crops.shape == (3, 2, 3, 8, 8)
    assert sizes.tolist() == asked["sizes"].tolist() == [[20 + n, 30 + n] for n in range(3)]
    assert asked["keys"] is keys
    for n, payload in enumerate(payloads):
        assert np.array_equal(crops[n, 1].permute(1, 2, 0), np.asarray(open_image(payload))[1:9, 2:10])
    with pytest.raises(UnreadableAt) as caught:
        CropDecoder(8, boxes)([payloads[0], payloads[1][:-60], payloads[2]], keys)
    assert caught.value.place == 1
    with pytest.raises(UnreadableAt):
        CropDecoder(8, boxes)([b"no picture"], keys[:1])


def test_bombs_are_refused_by_the_header_of_a_jpeg() -> None:
    payload = bytearray(jpeg(picture_of_waves(16, 16)))
    at = payload.index(b"\xff\xc0") + 5
    payload[at : at + 4] = (65_000).to_bytes(2, "big") * 2
    assert MOST_PIXELS < 65_000**2
    for reader in (upright_size, lambda p: decode(p, 16), lambda p: cropped(p, [[0, 0, 9, 9]], 8)):
        with pytest.raises(UnreadableImage, match="pixels"):
            reader(bytes(payload))
