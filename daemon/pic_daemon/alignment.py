"""How one picture may lie in another: cropped, framed, turned, mirrored, resized.

Two ways propose a place. Local features that look alike agree on a turn, a scale and a
shift, where there is enough structure. A search over the crops and frames of tiny
copies needs none. The better proposal is then refined until the pixels fit best.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pic_daemon.images import Pixels
from pic_daemon.landmarks import Floats, View

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
_Number = TypeVar("_Number", np.uint8, np.float32)

_RATIO = 0.9  # a feature's nearest may be this near to its second nearest (Lowe's test)
_NEAR = 5.0  # how far a feature may lie from where the others say, pixels of 128
_CROPS = (
    1.0,
    0.94,
    0.88,
    0.82,
    0.77,
    0.72,
    0.67,
)  # side of a crop, down to 45% of the area
_FRAMES = (1.05, 1.12, 1.2, 1.3, 1.4)  # side of a frame around the item
_GOOD = 0.85  # share of the overlap that counts: text or a logo may hide the rest
_SCALES = (0.1, 10.0)  # item pixels per query pixel that are believed
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 1e-4)


@dataclass(frozen=True)
class Pose:
    """Where the pixels of a view of the query lie in the item: float64, shape (3, 3)."""

    view: View
    matrix: Matrix

    @cached_property
    def scale(self) -> float:
        """Item pixels per query pixel."""
        (a, b), (c, d) = self.matrix[:2, :2]
        return float(abs(a * d - b * c) ** 0.5)


def align(views: tuple[View, ...], item: View) -> tuple[Pose, float]:
    """The pose of the best view in the item, and how well it fits: at most 1."""
    poses = []
    for seen in views:
        poses += _by_features(seen, item)
        poses.append(_by_search(seen, item))
    fits = [_fit(pose, item) for pose in poses]
    best = int(np.argmax(fits))
    return poses[best], fits[best]


def refined(pose: Pose, item: View) -> Pose:
    """The pose moved to where luminance correlates best (ECC), if that is better."""
    level = _level(pose, item, 1)
    start = _between(pose, item, 1, level)[:2].astype(np.float32)
    try:
        _, found = cv2.findTransformECC(
            pose.view.greys[1], item.greys[level], start, cv2.MOTION_AFFINE, _STEPS, None, 3
        )
    except cv2.error:  # it did not converge
        return pose
    inner = np.vstack([found, [0, 0, 1]])
    outer = _resize(item.levels[level], item.pixels) @ inner
    moved = Pose(pose.view, outer @ _resize(pose.view.pixels, pose.view.levels[1]))
    return moved if _fit(moved, item) > _fit(pose, item) else pose


def lay(pose: Pose, item: View) -> tuple[Pixels, Mask]:
    """The item seen in the query's place, at most FRAME pixels long, and where it is."""
    source = _level(pose, item, 1)
    return _warp(pose, item, item.levels[source], 1, source)


def overlap(pose: Pose, item: View, inside: Mask) -> tuple[float, float]:
    """The share of the query that lies on the item, and of the item on the query."""
    share = float(inside.mean())
    area = share * pose.view.greys[0].size * pose.scale**2
    return share, min(1.0, area / item.greys[0].size)


def line(x: Floats, y: Floats) -> tuple[float, float]:
    """Gain and offset that bring `x` nearest to `y`, by least squares."""
    mean = float(x.mean())
    dx = x - mean
    gain = float(dx @ y) / max(float(dx @ dx), 1e-3)
    return gain, float(y.mean()) - gain * mean


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's, of two arrays of the same shape; near 0 where one is flat."""
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b) / float(np.sqrt(float(a @ a) * float(b @ b) + 1))


def _by_features(seen: View, item: View) -> list[Pose]:
    """The turn, scale and shift that most pairs of features agree on, if any.

    Each pair proposes one by itself: where, how large, which way.
    """
    if not len(seen.places) or len(item.places) < 2:
        return []
    far, nearest = cv2.batchDistance(seen.features, item.features, cv2.CV_32F, K=2)
    kept = np.flatnonzero(far[:, 0] < _RATIO * far[:, 1])
    if not len(kept):
        return []
    pair = nearest[kept, 0]
    here, there = seen.places[kept], item.places[pair]
    turn = item.turns[pair] / seen.turns[kept]
    shift = there - turn * here
    near = np.abs(turn[:, None] * here + shift[:, None] - there) < _NEAR
    best = int(near.sum(axis=1).argmax())
    chosen, a, b = near[best], turn[best], shift[best]
    for _ in range(2):  # least squares over those that agree
        if chosen.sum() < 3:
            break
        u, v = here[chosen], there[chosen]
        centred = u - u.mean()
        a = np.vdot(centred, v - v.mean()) / max(
            float(np.vdot(centred, centred).real), 1e-6
        )
        b = v.mean() - a * u.mean()
        chosen = np.abs(a * here + b - there) < _NEAR
    matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag], [0, 0, 1]])
    return [Pose(seen, matrix)]


def _by_search(seen: View, item: View) -> Pose:
    """The best place of the query as a crop of the item, or of the item in a frame."""
    known, query = item.greys[2], seen.greys[1]
    height, width = known.shape
    across, down = width / query.shape[1], height / query.shape[0]
    best, matrix = -2.0, np.eye(3)
    for share in (*_CROPS, *_FRAMES):
        inner = share <= 1
        factor = share * (min(across, down) if inner else max(across, down))
        w, h = (max(4, round(length * factor)) for length in query.shape[::-1])
        w, h = (min(w, width), min(h, height)) if inner else (max(w, width), max(h, height))
        part = cv2.resize(query, (w, h), interpolation=cv2.INTER_AREA)
        larger, smaller = (known, part) if inner else (part, known)
        alike = cv2.matchTemplate(larger, smaller, cv2.TM_CCOEFF_NORMED)
        _, value, _, (x, y) = cv2.minMaxLoc(alike)
        if value > best:
            best, matrix = value, _resize(query, part)
            matrix[:2, 2] += (x, y) if inner else (-x, -y)
    whole = _resize(known, item.pixels) @ matrix @ _resize(seen.pixels, query)
    return Pose(seen, whole)


def _resize(source: Floats | Pixels, target: Floats | Pixels) -> Matrix:
    """From a picture's pixels to the same picture's at another size, centre to centre."""
    x, y = target.shape[1] / source.shape[1], target.shape[0] / source.shape[0]
    return np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])


def _level(pose: Pose, item: View, level: int) -> int:
    """The item's level whose pixels are nearest in size to those of the query's level."""
    wanted = pose.scale * pose.view.pixels.shape[1] / pose.view.levels[level].shape[1]
    sizes = [item.pixels.shape[1] / known.shape[1] for known in item.levels]
    return int(np.argmin([abs(np.log(wanted / size)) for size in sizes]))


def _between(pose: Pose, item: View, level: int, source: int) -> Matrix:
    """From the pixels of the query's level to those of the item's level."""
    outer = _resize(item.pixels, item.levels[source]) @ pose.matrix
    return outer @ _resize(pose.view.levels[level], pose.view.pixels)


def _warp(
    pose: Pose, item: View, pixels: NDArray[_Number], level: int, source: int
) -> tuple[NDArray[_Number], Mask]:
    """Pixels of the item's level `source` in the query's place, and where there are any."""
    matrix = _between(pose, item, level, source)[:2]
    size = pose.view.greys[level].shape[::-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    edge = cv2.BORDER_REPLICATE
    laid = cv2.warpAffine(pixels, matrix, size, flags=flags, borderMode=edge)
    full = np.full(pixels.shape[:2], 255, np.uint8)
    return laid, cv2.warpAffine(full, matrix, size, flags=flags) > 250


def _fit(pose: Pose, item: View) -> float:
    """Correlation of the tiny copies, less where little of both overlaps; -2 for absurd."""
    if not _SCALES[0] < pose.scale < _SCALES[1]:
        return -2.0
    source = _level(pose, item, 2)
    laid, inside = _warp(pose, item, item.greys[source], 2, source)
    if inside.sum() < 60:
        return -2.0
    query, known = pose.view.greys[2][inside], laid[inside]
    gain, offset = line(known, query)
    error = np.abs(query - gain * known - offset)
    good = error <= np.partition(error, int(_GOOD * len(error)))[int(_GOOD * len(error))]
    value = correlation(query[good], known[good])
    return value * min(1.0, max(overlap(pose, item, inside)) / 0.9)
