"""Laws of decoding: every kind of picture in real folders becomes RGB on its canvas, or one reason why not."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.canvas import decode
from data.images import MOST_PIXELS, UnreadableImage, open_image, verify

RAMP = np.linspace(0, 255, 12 * 20).reshape(12, 20).astype(np.uint8)


def encoded(image: Image.Image, format: str, **arguments: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **arguments)
    return buffer.getvalue()


def decoded(payload: bytes, canvas: int = 20) -> np.ndarray:
    """The picture without its canvas, uint8 (height, width, 3)."""
    verify(payload)
    pixels, (height, width) = decode(payload, canvas)
    assert pixels.shape == (3, canvas, canvas)
    assert not pixels[:, height:].any()
    assert not pixels[:, :, width:].any()
    return pixels[:, :height, :width].transpose(1, 2, 0)


GREY = np.repeat(RAMP[:, :, None], 3, axis=2)
COLOUR = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 77)], axis=2)


@pytest.mark.parametrize(
    ("payload", "expected", "tolerance"),
    [
        pytest.param(encoded(Image.fromarray(RAMP), "PNG"), GREY, 0, id="grey"),
        pytest.param(encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"), GREY, 0, id="16-bit grey"),
        pytest.param(encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"), GREY, 0, id="16-bit TIFF"),
        pytest.param(encoded(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"), GREY, 0, id="32-bit TIFF"),
        pytest.param(encoded(Image.fromarray(RAMP > 99), "PNG"), (GREY > 99) * np.uint8(255), 0, id="1 bit"),
        pytest.param(encoded(Image.fromarray(RAMP).convert("P"), "PNG"), GREY, 0, id="palette"),
        pytest.param(encoded(Image.fromarray(RAMP).convert("P"), "GIF"), GREY, 0, id="GIF"),
        pytest.param(encoded(Image.fromarray(COLOUR), "BMP"), COLOUR, 0, id="BMP"),
        pytest.param(encoded(Image.fromarray(COLOUR).convert("RGBA"), "PNG"), COLOUR, 0, id="RGBA"),
        pytest.param(encoded(Image.fromarray(RAMP).convert("LA"), "PNG"), GREY, 0, id="grey with alpha"),
        pytest.param(encoded(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR, 0, id="WebP"),
        pytest.param(encoded(Image.fromarray(COLOUR), "JPEG", quality=98, subsampling=0), COLOUR, 8, id="JPEG"),
        pytest.param(encoded(Image.fromarray(GREY).convert("CMYK"), "JPEG", quality=98), GREY, 8, id="CMYK JPEG"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(payload: bytes, expected: np.ndarray, tolerance: int) -> None:
    found = decoded(payload)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_cameras_that_were_held_sideways(orientation: int, upright) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        payload = encoded(Image.fromarray(COLOUR), format, exif=exif.tobytes())
        assert np.array_equal(decoded(payload), upright(COLOUR))


def test_damaged_exif_says_nothing_about_the_pixels() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    payload = encoded(Image.fromarray(COLOUR), "JPEG", quality=98, subsampling=0, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the EXIF
        assert np.abs(decoded(payload).astype(int) - COLOUR).max() <= 8


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(["PNG", "JPEG", "WEBP"]))
@settings(max_examples=80, deadline=None)
def test_pictures_fit_their_canvas_and_keep_their_shape(height: int, width: int, canvas: int, format: str) -> None:
    payload = picture(1, height, width, format)
    _, (h, w) = decode(payload, canvas)
    if max(height, width) <= canvas:
        assert (h, w) == (height, width)  # smaller ones are not enlarged
        assert np.array_equal(decoded(payload, canvas), np.asarray(open_image(payload)))
        return
    assert max(h, w) == canvas
    scale = canvas / max(height, width)
    # Within the rounding of the size, and of the scaled JPEG decode before it.
    assert abs(h - max(1, height * scale)) <= 1.5
    assert abs(w - max(1, width * scale)) <= 1.5


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (2, 3000)])
def test_extreme_shapes_keep_both_sides(format: str, size: tuple[int, int]) -> None:
    height, width = decode(picture(0, *size, format), 16)[1]
    assert min(height, width) == 1
    assert max(height, width) == 16


def test_shrinking_is_antialiased_for_every_format() -> None:
    """A one-pixel checkerboard becomes its mean, not one of its colours."""
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for format in ("PNG", "JPEG"):
        small = decoded(encoded(Image.fromarray(board), format), 32)
        assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() < 12


def test_a_scaled_jpeg_decode_looks_like_the_full_one() -> None:
    smooth = Image.fromarray(picture_of_waves(400, 300))
    payload = encoded(smooth, "JPEG", quality=95)
    full = np.asarray(open_image(payload).resize((24, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decoded(payload, 32).astype(int) - full).mean() < 2


def picture_of_waves(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 60), np.cos(y / 50), np.sin((x + y) / 70)]
    return np.stack([(127 + 120 * wave) for wave in waves], axis=2).astype(np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_truncated_files_are_refused_by_all_three(format: str, share: float) -> None:
    payload = picture(3, 64, 64, format)
    payload = payload[: int(len(payload) * share)]
    for reader in (verify, open_image, lambda p: decode(p, 8)):
        with pytest.raises(UnreadableImage):
            reader(payload)


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_verify_passes_can_be_decoded_and_nothing_else_is_raised(format: str, data: st.DataObject) -> None:
    payload = bytearray(picture(2, 24, 24, format))
    for _ in range(data.draw(st.integers(1, 5))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata
        try:
            verify(bytes(payload))
        except UnreadableImage:
            return
        decode(bytes(payload), 16)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header announces more than its few bytes hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (MOST_PIXELS + 1, 1)])
def test_bombs_are_refused_by_their_header(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reader in (verify, open_image):
            with pytest.raises(UnreadableImage, match="pixels"):
                reader(bomb(width, height))


def test_pillows_own_limit_is_left_as_it_is() -> None:
    # It guards whatever else runs in a user's process.
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("payload", [b"", b"hello, world", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff", b"II*\0"])
def test_what_is_no_picture_is_refused(payload: bytes) -> None:
    for reader in (verify, open_image):
        with pytest.raises(UnreadableImage, match=r"."):
            reader(payload)


def test_only_allowed_formats_are_opened() -> None:
    for format in ("PPM", "ICO", "TGA", "PDF"):
        with pytest.raises(UnreadableImage, match="not a picture"):
            verify(encoded(Image.fromarray(COLOUR), format))
