"""Where the even margins of a picture end: a border, a frame, a bar, empty background.

A margin is made of lines, from an edge inwards, that are nearly all of one colour. Each
line has its own, so that bars and borders of several colours count; and a few lines that
are not even do not end a margin where it goes on behind them in the colour that it had: a
title in a bar, a line of text below a picture.
"""

import numpy as np
from PIL import Image

from pic_daemon.images import Pixels
from pic_daemon.landmarks import shrunk

_SIDE = 128  # longest side, in pixels, of the copy that is looked at
_EVEN = 12  # levels by which a line's pixels may differ from its median: JPEG's noise
_SHARE = 0.95  # of a line's pixels that must be even
TITLE = 0.08  # share of a side that lines which are not even may take up
LEAST = 0.15  # share of a side that must be left; less is no picture in a margin
WORTH = 0.04  # share of the area below which a margin changes nothing


def within_margins(picture: Image.Image) -> Image.Image | None:
    """The part of an RGB picture within its margins; None where that is nearly all.

    None as well where hardly anything would be left.
    """
    box = _inner(shrunk(np.asarray(picture), _SIDE))
    if box is None:
        return None
    left, top, right, bottom = box
    if (right - left) * (bottom - top) > 1 - WORTH:
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
        rows = pixels[top:bottom, left:right]
        top, bottom = top + _margin(rows), bottom - _margin(rows[::-1])
        if bottom - top < LEAST * height:
            return None
        columns = pixels[top:bottom, left:right].swapaxes(0, 1)
        left, right = left + _margin(columns), right - _margin(columns[::-1])
        if right - left < LEAST * width:
            return None
    return left / width, top / height, right / width, bottom / height


def _margin(lines: Pixels) -> int:
    """How many lines at the beginning are margin; `lines` is uint8, shape (N, L, 3)."""
    count, colour = 0, None
    for number, line in enumerate(lines):
        skipped = number - count
        if skipped > (0 if colour is None else TITLE * len(lines)):
            break
        levels = np.sort(line.astype(np.int16), axis=0)
        # The median; numpy's own takes as long as all the rest.
        middle = (levels[(len(line) - 1) // 2] + levels[len(line) // 2]) / 2
        uneven = (np.abs(line - middle) > _EVEN).any(axis=1)
        even = np.count_nonzero(uneven) <= (1 - _SHARE) * len(line)
        goes_on = not skipped or np.abs(middle - colour).max() <= _EVEN
        if even and goes_on:
            count, colour = number + 1, middle
    return count
