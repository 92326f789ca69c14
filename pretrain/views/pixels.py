"""What happens to views on a CPU behind the crop, compiled by numba: one view at a time, so that it stays in the cache.

Functions here do to pixels what those of `color.py` and `blur.py` do to tensors, and round after the same operations
in the same order, whatever the processor. The first call compiles for some seconds and keeps the result in numba's
cache folder: `__pycache__` beside this file, where that can be written to. It is made anew when this file changes, and
no other is looked at: so all that is compiled stands here, constants included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Number: TypeAlias = Any
"""float32 (or the sum of grey, int64): numba finds out."""
Plane: TypeAlias = NDArray[np.float32]
"""One colour of a picture, its rows one behind the other: (side * side,)."""
Function = TypeVar("Function", bound=Callable[..., Any])

_f = np.float32
_ZERO, _HALF, _ONE, _TWO, _THREE, _FOUR, _SIX = (_f(n) for n in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0))
_RED, _GREEN, _BLUE, _BYTE, _SIXTH = (_f(n) for n in (0.2989, 0.587, 0.114, 1 / 255, 1 / 6))
_STEPS = 2.0**20
_PART = 2048
"""Pixels of a plane that are blurred to the end before the next ones: they stay in the smallest cache."""


def _compiled(function: Function) -> Function:
    """Compiled together with what calls it. Without `fastmath`, so no operation is left out or moved."""
    made: Function = njit(nogil=True, error_model="numpy")(function)
    return made


def _kept(function: Function) -> Function:
    """Compiled, and kept on disk where there is a folder for it."""
    try:
        made: Function = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder that can be written to
        return _compiled(function)
    return made


@_kept
def view_of_bytes(
    pixels: NDArray[np.uint8],
    n: int,
    jitter: NDArray[np.float32],
    flags: NDArray[np.bool_],
    weights: NDArray[np.float32],
    mean: NDArray[np.float32],
    scale: NDArray[np.float32],
    out: NDArray[np.float32],
    scratch: NDArray[np.float32],
) -> None:
    """View number `n` of N: mirror, jitter, grey, blur, solarise, normalise.

    Args:
        pixels: uint8 (side, side, 3), contiguous.
        jitter: float32 (N, 4): factors of brightness, contrast and saturation, shift of hue; (1, 1, 1, 0) for none.
        flags: bool (N, 3): flip, grey, solarise.
        weights: float32 (N, radius + 1) of the blur, at distances from 0.
        mean, scale: float32 (3,); scale is one over the standard deviation.
        out: float32 (N, 3, side * side), where the view is written.
        scratch: float32 (4, `room`), whose contents are lost.
    """
    side, w = len(pixels), _taps(weights[n])
    middle = (len(w) - 1) * side
    red, green, blue = _places(out[n], scratch, middle, side)
    if flags[n, 0]:
        r, g, b = _places(out[n], scratch, 0 if middle else side, side)
        total = _from_bytes(pixels.reshape(-1), r, g, b, jitter[n, 0])
        _mirrored(red, r, side)
        _mirrored(green, g, side)
        _mirrored(blue, b, side)
    else:
        total = _from_bytes(pixels.reshape(-1), red, green, blue, jitter[n, 0])
    _rest(red, green, blue, total, jitter[n], flags[n], w, mean, scale, out[n], scratch, side)


@_kept
def views_of_crops(
    crops: NDArray[np.float32],
    jitter: NDArray[np.float32],
    flags: NDArray[np.bool_],
    weights: NDArray[np.float32],
    mean: NDArray[np.float32],
    scale: NDArray[np.float32],
    out: NDArray[np.float32],
    scratch: NDArray[np.float32],
    side: int,
) -> None:
    """All views of crops that are already made, and mirrored: float32 (N, 3, side * side) in [0, 1]; the other
    arguments are those of `view_of_bytes`."""
    for n in range(len(crops)):
        w = _taps(weights[n])
        red, green, blue = _places(out[n], scratch, (len(w) - 1) * side, side)
        total = _from_planes(crops[n], red, green, blue, jitter[n, 0])
        _rest(red, green, blue, total, jitter[n], flags[n], w, mean, scale, out[n], scratch, side)


def room(side: int, radius: int) -> int:
    """Numbers that a plane of scratch space holds, for blurs of at most this radius."""
    return (side * (side + 2 * max(4, radius + 1)) + 15) // 16 * 16


@_compiled
def _places(out: Any, scratch: Any, middle: int, side: int) -> tuple[Plane, Plane, Plane]:
    """Where planes are worked on: in scratch space from `middle` on if that is not 0, else where they end up."""
    if middle:
        stop = middle + side * side
        return scratch[0][middle:stop], scratch[1][middle:stop], scratch[2][middle:stop]
    return out[0][:], out[1][:], out[2][:]


@_compiled
def _rest(
    red: Plane,
    green: Plane,
    blue: Plane,
    total: Number,
    jitter: Any,
    flags: Any,
    w: Plane,
    mean: Any,
    scale: Any,
    out: Any,
    scratch: Any,
    side: int,
) -> None:
    """What comes behind the brightness, into `out`; that is where the planes are, unless there is a blur."""
    blurs, grey, invert = len(w) > 1, flags[1], flags[2]
    if jitter[1] != _ONE or jitter[2] != _ONE or jitter[3] != _ZERO:
        if not (grey or blurs):
            _jittered(red, green, blue, total, jitter, invert, mean, scale)
            return
        _jittered(red, green, blue, total, jitter, False, np.zeros(3, np.float32), np.ones(3, np.float32))
    if grey:
        _greyed(red, green, blue)
    for c in range(3):
        if blurs:
            _blurred(out[c], scratch[c], scratch[3], side, w)
        _ended(out[c], invert, mean[c], scale[c])


# Colour, as in color.py.


@_compiled
def _from_bytes(pixels: Any, red: Plane, green: Plane, blue: Plane, factor: Number) -> Number:
    """Planes of this brightness out of interleaved bytes; returns the sum of their grey, in steps."""
    total = np.int64(0)
    for n in range(len(red)):
        r = _bright(_f(pixels[3 * n]) * _BYTE, factor)
        g = _bright(_f(pixels[3 * n + 1]) * _BYTE, factor)
        b = _bright(_f(pixels[3 * n + 2]) * _BYTE, factor)
        red[n], green[n], blue[n] = r, g, b
        total += np.int32(_grey(r, g, b) * _f(_STEPS))
    return total


@_compiled
def _from_planes(crop: Any, red: Plane, green: Plane, blue: Plane, factor: Number) -> Number:
    """The same out of planes."""
    total = np.int64(0)
    given_red, given_green, given_blue = crop[0], crop[1], crop[2]
    for n in range(len(red)):
        r, g, b = _bright(given_red[n], factor), _bright(given_green[n], factor), _bright(given_blue[n], factor)
        red[n], green[n], blue[n] = r, g, b
        total += np.int32(_grey(r, g, b) * _f(_STEPS))
    return total


@_compiled
def _mirrored(out: Plane, plane: Plane, side: int) -> None:
    for y in range(side):
        row, given = out[y * side : (y + 1) * side], plane[y * side : (y + 1) * side]
        for x in range(side):
            row[x] = given[side - 1 - x]


@_compiled
def _jittered(
    red: Plane, green: Plane, blue: Plane, total: Number, jitter: Any, invert: bool, mean: Any, scale: Any
) -> None:
    """Contrast, saturation and hue, then the end of a view."""
    contrast, saturation, shift = jitter[1], jitter[2], jitter[3]
    rest = (_ONE - contrast) * (_f(total) * _f(1.0 / (_STEPS * len(red))))
    turn, turns = _SIX * shift, shift != _ZERO
    mean_red, mean_green, mean_blue = mean[0], mean[1], mean[2]
    scale_red, scale_green, scale_blue = scale[0], scale[1], scale[2]
    for n in range(len(red)):
        r, g = _unit(contrast * red[n] + rest), _unit(contrast * green[n] + rest)
        b = _unit(contrast * blue[n] + rest)
        other = (_ONE - saturation) * _grey(r, g, b)
        r, g, b = _unit(saturation * r + other), _unit(saturation * g + other), _unit(saturation * b + other)
        if turns:
            r, g, b = _turned(r, g, b, turn)
        red[n] = _end(r, invert, mean_red, scale_red)
        green[n] = _end(g, invert, mean_green, scale_green)
        blue[n] = _end(b, invert, mean_blue, scale_blue)


@_compiled
def _turned(r: Number, g: Number, b: Number, turn: Number) -> tuple[Number, Number, Number]:
    """Colour circle turned by so many sixths."""
    top, low = r if r > g else g, r if r < g else g
    top, low = top if top > b else b, low if low < b else b
    chroma = top - low
    inverse = _ONE / (chroma if chroma > _ZERO else _ONE)
    sixths = _TWO + (b - r) * inverse if top == g else _FOUR + (r - g) * inverse
    sixths = (g - b) * inverse if top == r else sixths
    place = sixths + turn
    place = place - _SIX * np.floor(place * _SIXTH)
    return (
        top - chroma * _unit(_TWO - abs(place - _THREE)),
        top - chroma * _unit(abs(place - _TWO) - _ONE),
        top - chroma * _unit(abs(place - _FOUR) - _ONE),
    )


@_compiled
def _greyed(red: Plane, green: Plane, blue: Plane) -> None:
    for n in range(len(red)):
        grey = _grey(red[n], green[n], blue[n])
        red[n], green[n], blue[n] = grey, grey, grey


@_compiled
def _ended(plane: Plane, invert: bool, mean: Number, scale: Number) -> None:
    for n in range(len(plane)):
        plane[n] = _end(plane[n], invert, mean, scale)


@_compiled
def _end(x: Number, invert: bool, mean: Number, scale: Number) -> Number:
    """Solarised and normalised."""
    if invert:
        x = _ONE - x if x >= _HALF else x
    return (x - mean) * scale


@_compiled
def _bright(x: Number, factor: Number) -> Number:
    x = x * factor
    return x if x < _ONE else _ONE


@_compiled
def _grey(r: Number, g: Number, b: Number) -> Number:
    return _RED * r + _GREEN * g + _BLUE * b


@_compiled
def _unit(x: Number) -> Number:
    x = x if x > _ZERO else _ZERO
    return x if x < _ONE else _ONE


# Blur, as in blur.py: distances from the middle are added up in their order.


@_compiled
def _taps(weights: Plane) -> Plane:
    """Weights without distances that count nothing, of which there are then 0, 4, 6, 8 …"""
    reach = 0
    for k in range(1, len(weights)):
        reach = k if weights[k] > _ZERO else reach
    reach = max(4, (reach + 1) // 2 * 2) if reach else 0
    taps = np.zeros(reach + 1, np.float32)
    for k in range(min(len(weights), reach + 1)):
        taps[k] = weights[k]
    return taps


@_compiled
def _blurred(out: Plane, wide: Plane, spare: Plane, side: int, w: Plane) -> None:
    """Blur the plane in `wide`, which has room for `reach` rows above and below, into `out`."""
    reach = len(w) - 1
    middle, width = reach * side, side + 2 * reach
    before, after = np.empty(reach, np.int64), np.empty(reach, np.int64)
    for k in range(reach):
        before[k], after[k] = _continued(-1 - k, side), _continued(side + k, side)
        above, below = wide[middle - (k + 1) * side :], wide[middle + (side + k) * side :]
        first, last = wide[middle + before[k] * side :], wide[middle + after[k] * side :]
        for x in range(side):
            above[x], below[x] = first[x], last[x]
    _weighed(out, wide, middle, side, w)
    for y in range(side):
        row, longer = out[y * side : (y + 1) * side], spare[y * width : (y + 1) * width]
        inner = longer[reach:]
        for x in range(side):
            inner[x] = row[x]
        for k in range(reach):
            longer[reach - 1 - k], inner[side + k] = row[before[k]], row[after[k]]
    rows = wide[: side * width - 2 * reach]
    _weighed(rows, spare, reach, 1, w)
    for y in range(side):
        row, blurred = out[y * side : (y + 1) * side], rows[y * width :]
        for x in range(side):
            row[x] = blurred[x]


@_compiled
def _continued(place: int, side: int) -> int:
    """The pixel that stands for one at `place`, which may lie outside: reflection, as often as it takes."""
    if side == 1:
        return 0
    place = abs(place) % (2 * (side - 1))
    return min(place, 2 * (side - 1) - place)


@_compiled
def _weighed(out: Plane, x: Plane, start: int, step: int, w: Plane) -> None:
    """Blur along an axis on which neighbours lie `step` apart; `out` begins where x[start] lies."""
    for done in range(0, len(out), _PART):
        part = out[done : done + _PART]
        _near(part, x, start + done, step, w)
        for k in range(5, len(w), 2):
            _far(part, x, start + done, k, step, w)


@_compiled
def _near(out: Plane, x: Plane, at: int, step: int, w: Plane) -> None:
    """The middle and the four nearest distances."""
    w0, w1, w2, w3, w4 = w[0], w[1], w[2], w[3], w[4]
    centre, a1, b1, a2, b2 = x[at:], x[at - step :], x[at + step :], x[at - 2 * step :], x[at + 2 * step :]
    a3, b3, a4, b4 = x[at - 3 * step :], x[at + 3 * step :], x[at - 4 * step :], x[at + 4 * step :]
    for n in range(len(out)):
        near = w0 * centre[n] + w1 * (a1[n] + b1[n]) + w2 * (a2[n] + b2[n])
        out[n] = near + w3 * (a3[n] + b3[n]) + w4 * (a4[n] + b4[n])


@_compiled
def _far(out: Plane, x: Plane, at: int, k: int, step: int, w: Plane) -> None:
    """Two more distances, from `k` on."""
    w1, w2 = w[k], w[k + 1]
    a1, b1 = x[at - k * step :], x[at + k * step :]
    a2, b2 = x[at - (k + 1) * step :], x[at + (k + 1) * step :]
    for n in range(len(out)):
        out[n] = out[n] + w1 * (a1[n] + b1[n]) + w2 * (a2[n] + b2[n])
