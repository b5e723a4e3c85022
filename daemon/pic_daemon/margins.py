"""Where the even margins of a picture end: a border, a frame, a bar, empty background.

A margin is made of lines, from an edge inwards, that are nearly all of one colour. Each
line has its own, so that bars and borders of several colours count; and a fifth of it may
differ, so that a title in a bar does not end the margin.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.images import Pixels
from pic_daemon.landmarks import shrunk

_SIDE = 128  # longest side, in pixels, of the copy that is looked at
_EVEN = 8  # levels by which a line's pixels may differ from its median: JPEG's noise
_SHARE = 0.8  # of a line's pixels that must be even
_LEAST = 0.35  # share of a side that must be left; less is no picture in a margin
_WORTH = 0.04  # share of the area below which a margin changes nothing


def within_margins(picture: Image.Image) -> Image.Image | None:
    """The part of an RGB picture within its margins; None where that is nearly all.

    None as well where hardly anything would be left.
    """
    box = _inner(shrunk(np.asarray(picture), _SIDE))
    if box is None:
        return None
    left, top, right, bottom = box
    if (right - left) * (bottom - top) > 1 - _WORTH:
        return None
    width, height = picture.size
    return picture.crop(
        (round(left * width), round(top * height), round(right * width),
         round(bottom * height))
    )  # fmt: skip


def _inner(pixels: Pixels) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom of what is within the margins, as shares of the sides."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = 0, 0, width, height
    before = None
    while before != (left, top, right, bottom):  # a bar is even once the border is gone
        before = left, top, right, bottom
        first, last = _margins(pixels[top:bottom, left:right])
        top, bottom = top + first, bottom - last
        first, last = _margins(pixels[top:bottom, left:right].swapaxes(0, 1))
        left, right = left + first, right - last
        if bottom - top < _LEAST * height or right - left < _LEAST * width:
            return None
    return left / width, top / height, right / width, bottom / height


def _margins(lines: Pixels) -> tuple[int, int]:
    """How many lines at the beginning and at the end are even; all of them at each."""
    levels = lines.astype(np.int16)
    differ = np.abs(levels - np.median(levels, axis=1, keepdims=True)).max(axis=2)
    even: NDArray[np.bool_] = (differ <= _EVEN).mean(axis=1) >= _SHARE
    if even.all():
        return len(even), len(even)
    return int(np.argmin(even)), int(np.argmin(even[::-1]))
