"""The fast path for JPEGs: libjpeg-turbo on whole pictures, scaled while decoding, where that gives the right picture.

What it does not take (CMYK, cameras held sideways, damage, other formats) is `None`, and Pillow's to decide.
The pixels are Pillow's own, bit for bit, since both use libjpeg-turbo with its accurate settings.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray
from simplejpeg import decode_jpeg, decode_jpeg_header

_MAGIC = b"\xff\xd8\xff"
_EXIF, _XMP_ORIENTATION = b"Exif\0\0", b"tiff:Orientation"
_ORIENTATION = 0x0112
_SCAN = 0xDA
_SHORT = 2**13
"""Bytes of a file below which searching all of it is quicker than following its segments."""
_COLOURS = ("YCbCr", "Gray", "RGB")
FACTORS = (8, 4, 2)
"""Scales 1/8, 1/4 and 1/2 are the cheap ones of the inverse DCT."""


def jpeg_size(payload: bytes) -> tuple[int, int] | None:
    """Height and width in pixels of a JPEG for the fast path, else None; reads the header alone."""
    if not payload.startswith(_MAGIC):
        return None
    try:
        height, width, colour, _ = decode_jpeg_header(payload, strict=False)
    except Exception:  # a damaged header raises KeyError as well; Pillow says what is wrong
        return None
    return (height, width) if colour in _COLOURS and _is_upright(payload) else None


def decode_scaled(payload: bytes, size: tuple[int, int], least: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Decode at the smallest cheap scale that keeps at least the size `least`.

    Args:
        size: what `jpeg_size` said.

    Returns:
        uint8 (height, width, 3), or None where libjpeg-turbo found anything to complain about.
    """
    height, width = size
    factor = next((f for f in FACTORS if -(-height // f) >= least[0] and -(-width // f) >= least[1]), 1)
    try:
        if factor == 1:
            return decode_jpeg(payload)
        return decode_jpeg(payload, min_height=-(-height // factor), min_width=-(-width // factor))
    except Exception:
        return None


def _is_upright(payload: bytes) -> bool:
    """Whether nothing in the file asks for the picture to be turned."""
    end = len(payload) if len(payload) < _SHORT else _header_end(payload)
    if payload.find(_XMP_ORIENTATION, 0, end) >= 0:
        return False
    at = payload.find(_EXIF, 0, end)
    if at < 0:
        return end > 0
    if payload.find(_EXIF, at + 1, end) >= 0:
        return False
    try:
        return _exif_orientation(payload[at + len(_EXIF) : at + 2**16]) == 1
    except struct.error:
        return False


def _header_end(payload: bytes) -> int:
    """Where the segments before the first scan end (ITU T.81, annex B), 0 if they cannot be followed."""
    at = 2
    while at + 4 <= len(payload) and payload[at] == 0xFF:
        if payload[at + 1] == _SCAN:
            return at
        at += 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
    return 0


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in the first directory of a TIFF header (EXIF 2.32, section 4.6), None without one."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(entries):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
        if tag == _ORIENTATION:
            return value if (kind, count) == (3, 1) else None
    return 1
