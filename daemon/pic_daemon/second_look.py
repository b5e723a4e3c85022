"""What lies within the even margins of a network's inputs, found for a batch at once.

`margins` looks closely at one larger picture. Here thousands come in a second, and in 64
pixels hardly more may be left of a bar than its title. A margin is made of lines, from an
edge inwards, in which the green channel, most of the luminance, hardly deviates. A few
that do, a title or where a bar ends, do not end it. Another even colour right behind it
does: the plain background of a product in a frame stays with it, and so does a frame
within a frame.
Figures: bench/results/evaluation.md.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from pic_daemon.images import Pixels
from pic_daemon.margins import LEAST, TITLE, WORTH

_EVEN = 5.0  # levels, the standard deviation up to which a line is even
_STEP = 4.0  # levels from one even line to the next, beyond which a margin ends
_ROUNDS = 2  # the sides are even once the bars are gone, and then perhaps more bars

_AT_ONCE = 32  # images, of which a core's cache holds the sums at 64 pixels

_Ints = NDArray[np.int64]


def second_looks(images: Pixels) -> dict[int, Pixels]:
    """What is within the margins of those images that have some, by their number.

    `images` uint8 (N, S, S, 3), RGB; what is found is stretched to the same size.
    """
    size, found = images.shape[1], {}
    framed = _even_at_an_edge(images[..., 1])
    boxes = zip(framed, _boxes(images[framed, ..., 1]), strict=True)
    for number, (top, bottom, left, right) in boxes:
        height, width = bottom - top, right - left
        worth = height * width <= (1 - WORTH) * size**2
        if worth and min(height, width) >= LEAST * size:
            within = images[number, top:bottom, left:right]
            # Enlarged, where Pillow's filter does the same and takes seven times as long.
            found[number] = np.asarray(cv2.resize(within, (size, size)), np.uint8)
    return found


def _even_at_an_edge(green: Pixels) -> list[int]:
    """Which of (N, S, S) have an outermost line that is even: no others have margins."""
    edges = np.stack([green[:, 0], green[:, -1], green[..., 0], green[..., -1]])
    edges = edges.astype(np.int32)
    mean, square = edges.mean(axis=-1), (edges * edges).mean(axis=-1)
    even: list[int] = np.flatnonzero(_is_even(mean, square).any(axis=0)).tolist()
    return even


def _is_even(mean: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(square - mean * mean <= _EVEN**2)


def _boxes(green: Pixels) -> list[list[int]]:
    """Top, bottom, left and right of what is within margins, in each of (N, S, S)."""
    parts = range(0, len(green), _AT_ONCE)
    return [box for n in parts for box in _inner(green[n : n + _AT_ONCE]).tolist()]


def _inner(green: Pixels) -> _Ints:
    """The same, shape (N, 4)."""
    count, size = green.shape[:2]
    lines = np.stack([green, green.swapaxes(1, 2)]).astype(np.int32)  # rows and columns
    # Sums over any part of a line, of levels and of their squares, by two look-ups.
    sums = np.zeros((2, 2, count, size, size + 1), np.int32)
    np.cumsum(lines, axis=-1, out=sums[0, ..., 1:])
    np.cumsum(lines * lines, axis=-1, out=sums[1, ..., 1:])
    spans = np.tile([0, size], (2, count, 1))
    for turn in range(2 * _ROUNDS):
        along, across = turn % 2, 1 - turn % 2
        even, level = _even(sums[:, along], *spans[across].T)
        # The far margin is the near one of the lines in their other order.
        margins = _margin(
            np.concatenate([even, even[:, ::-1]]),
            np.concatenate([level, level[:, ::-1]]),
            np.concatenate([spans[along], size - spans[along][:, ::-1]]),
        )
        spans[along] += np.stack([margins[:count], -margins[count:]], axis=1)
    return np.concatenate(spans, axis=1)


def _even(
    sums: NDArray[np.int32], begin: _Ints, end: _Ints
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which lines of each image are even between two places, and their level, (N, S)."""
    images, length = np.arange(len(begin)), np.maximum(1, end - begin)[:, None]
    mean, square = (
        (part[images, :, end] - part[images, :, begin]) / length for part in sums
    )
    return _is_even(mean, square), mean


def _margin(even: NDArray[np.bool_], level: NDArray[np.float64], spans: _Ints) -> _Ints:
    """How many lines from the first of a span on are margin, (N,); `spans` (N, 2)."""
    lines, first, last = np.arange(even.shape[1]), spans[:, :1], spans[:, 1:]
    before = first - 1
    latest = np.where(even, lines, before)
    latest = np.maximum(np.maximum.accumulate(latest, axis=1), before)
    passed_over = np.where(latest > before, TITLE * (last - first), 0)
    ends = lines - latest > passed_over
    steps = np.abs(np.diff(level, axis=1)) > _STEP
    ends[:, 1:] |= even[:, 1:] & even[:, :-1] & steps & (lines[1:] > first)
    ends[:, -1] = True
    end = np.maximum(0, ends.argmax(axis=1) - 1)[:, None]
    return np.asarray((np.take_along_axis(latest, end, axis=1) - before)[:, 0])
