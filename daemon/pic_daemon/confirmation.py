"""Whether one picture really is an altered copy of another, seen from the pixels.

Nothing here is learned from a catalog. The item is laid over the query where it fits
best, and the two are compared where they overlap, once a change of light and colour
that holds for the whole picture is allowed for. A look-alike shares the features and
the outline; it seldom shares the pixels.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from pic_daemon.alignment import Mask, Pose, align, correlation, lay, line, overlap, refined
from pic_daemon.images import Pixels
from pic_daemon.landmarks import Floats, Landmarks, View

EVIDENCE = ("overlap", "explained", "edges", "local", "colour", "contrast")
"""What is weighed; `evidence` says how each is measured."""

WEIGHTS = np.array([-14.80, 2.56, 1.40, 1.46, 3.27, -0.86, -1.37])
"""Intercept, then one for each of EVIDENCE.

A logistic regression (bench/confirmation.py --fit, 2026-11-24): 360 copies of catalog
pictures, cropped, resized or compressed, against 2,895 look-alikes, each with the five
catalog pictures nearest to it; both kinds weighed alike.
"""

_PLAUSIBLE = 0.8  # no copy fits less: 1 of 2,430 did, and 71% of 38,445 look-alike pairs
_CLEAR = 0.85  # share of the overlap that is weighed: text or a logo may hide the rest
_SOFT = 1.5  # standard deviation of the blur that hides compression, px
_LEAST = 100  # pixels, of at most 64 x 64, that two pictures must share
_NOISE = 20.0  # variance, in levels squared, below which a spot has no structure


def agreement(query: Landmarks, item: Landmarks) -> float:
    """How surely `query` is an altered copy of `item`, in [0, 1].

    Exactly 0 where one has no structure, or where no pose of it fits the other.
    """
    found = evidence(query, item)
    if found is None:
        return 0.0
    return float(1 / (1 + np.exp(-(found @ WEIGHTS[1:] + WEIGHTS[0]))))


def evidence(query: Landmarks, item: Landmarks) -> NDArray[np.float64] | None:
    """What `agreement` weighs, float64, one number for each name in EVIDENCE.

    overlap: -log(1.05 - share), of the query or of the item, that lies on the other.
    explained: -log of the share of the query's luminance that the item does not
    explain. edges: -log(1 - correlation) of the slopes. local: structure in common,
    [-1, 1], that four fifths of the spots exceed. colour: log of the chroma, in levels,
    that a change of light and saturation does not explain. contrast: log of the
    query's standard deviation, in levels. None where nothing can be compared.
    """
    if query.blank or item.blank:
        return None
    pose, fit = align((query.view, query.mirrored), item.view)
    if fit < _PLAUSIBLE:
        return None
    return _compared(refined(pose, item.view), item.view)


def _compared(pose: Pose, item: View) -> NDArray[np.float64] | None:
    query = pose.view.levels[1]
    laid, inside = lay(pose, item)
    core = _inner(inside, 5)  # a frame around the item must not be blurred into it
    if core.sum() < _LEAST:
        return None
    grey = cv2.cvtColor(laid, cv2.COLOR_RGB2GRAY).astype(np.float32)
    q, k = (cv2.GaussianBlur(g, (0, 0), _SOFT) for g in (pose.view.greys[1], grey))
    good, gain = _unhidden(q, k, core)
    rest = q[good] - k[good] * gain
    contrast = float(q[core].std())
    explained = float(rest.var()) / (contrast**2 + 1)
    clear = _inner(good, 3)
    clear = clear if clear.sum() >= _LEAST // 2 else good
    edges = correlation(_slopes(q)[:, clear].ravel(), _slopes(k)[:, clear].ravel())
    deep = _inner(inside, 11)
    local = _local(q, k * abs(gain))[deep if deep.sum() >= _LEAST // 2 else core]
    return np.array(
        [
            -np.log(1.05 - max(overlap(pose, item, inside))),
            -np.log(explained + 0.002),
            -np.log(1.01 - edges),
            np.quantile(local, 0.2),
            np.log1p(_colour(query, laid, good)),
            np.log1p(contrast),
        ]
    )


def _inner(mask: Mask, side: int) -> Mask:
    """The pixels around which `side` x `side` pixels are all within the mask."""
    return np.asarray(cv2.erode(mask.astype(np.uint8), np.ones((side, side))), bool)


def _unhidden(q: Floats, k: Floats, where: Mask) -> tuple[Mask, float]:
    """The pixels that the item explains best, and its gain in luminance over them."""
    gain, offset = line(k[where], q[where])
    error = np.abs(q - gain * k - offset)
    good = where & (error <= np.quantile(error[where], _CLEAR))
    return good, line(k[good], q[good])[0]


def _slopes(grey: Floats) -> Floats:
    return np.stack([cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)])


def _local(q: Floats, k: Floats) -> Floats:
    """Twice the covariance over the sum of variances, in 9 x 9 pixels around each."""
    side = (9, 9)
    q_mean, k_mean = cv2.blur(q, side), cv2.blur(k, side)
    both = cv2.blur(q * k, side) - q_mean * k_mean
    spread = cv2.blur(q * q + k * k, side) - q_mean * q_mean - k_mean * k_mean
    return np.asarray((2 * both + _NOISE) / (spread + _NOISE), np.float32)


def _colour(query: Pixels, laid: Pixels, where: Mask) -> float:
    """Mean chroma, in levels, that one gain per channel and one saturation leave over."""
    q, k = (cv2.blur(p, (5, 5))[where].astype(np.float32) for p in (query, laid))
    k *= np.clip(q.mean(axis=0) / np.maximum(k.mean(axis=0), 1), 0.6, 1.6)
    q -= q.mean(axis=1, keepdims=True)
    k -= k.mean(axis=1, keepdims=True)
    kept = np.clip(np.vdot(q, k) / max(float(np.vdot(k, k)), 1.0), 0, 1.5)
    return float(np.abs(q - kept * k).mean())
