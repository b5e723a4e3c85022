"""Whether one picture really is an altered copy of another, seen from the pixels.

Nothing here is learned from a catalog. Local features (SIFT) and a search over crops
and frames propose how the item may lie in the query, mirrored or not; the item is then
laid over the query by the best proposal, the alignment is refined, and the two are
compared where they overlap. A look-alike has the features, seldom the pixels.
"""

import io
import struct
from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.images import BLANK_LEVELS, Pixels

Floats = NDArray[np.float32]

PICTURE_SIDE = 200
"""Longest side in pixels that a picture given to `landmarks` should have, if it was larger.

Larger pictures are shrunk to it; more detail was not measured to help.
"""

_POINTS = 96
_DETAIL = 128  # longest side of the picture that is kept, px
_FRAME = 64  # longest side at which pixels are compared, px
_COARSE = 32  # longest side at which crops and frames are searched, px
_QUALITY = 90
_HEADER = struct.Struct("<4sHHI")
_MAGIC = b"PLM1"
_RATIO = 0.9
_NEAR = 5.0
_REVERSED = (0, 7, 6, 5, 4, 3, 2, 1)
_NCC = cv2.TM_CCOEFF_NORMED
_CROPS = (1.0, 0.94, 0.88, 0.82, 0.77, 0.72, 0.67)
_FRAMES = (1.05, 1.12, 1.2, 1.3, 1.4)
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 1e-4)
NAMES = (
    "of_query of_item most whole smooth trimmed edges local local20 local05 colour "
    "saturation gain inliers share spread size error"
).split()
WEIGHTS = np.array(
    [
        -19.442,
        -1.161,
        0.721,
        16.613,
        0.462,
        0.333,
        0.438,
        0.42,
        0.874,
        -0.068,
        -0.113,
        -0.857,
        0.191,
        0.841,
        0.665,
        3.829,
        -0.942,
        0.007,
        -0.097,
    ]
)


@dataclass(frozen=True)
class Landmarks:
    """What is kept of one picture to compare it by.

    `pixels` is uint8, shape (H, W, 3), RGB, its longest side at most 128 px. `points`
    is float32, shape (K, 4), K <= 96: x and y in those pixels, size in pixels, and
    direction in radians of each local feature; `features` is uint8, shape (K, 128),
    its SIFT descriptor.
    """

    pixels: Pixels
    points: Floats
    features: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """About 18 KB at most; `pixels` are kept as a JPEG of quality 90."""
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
        picture = file.getvalue()
        header = _HEADER.pack(_MAGIC, len(self.points), 0, len(picture))
        points = self.points.astype("<f2").tobytes()
        return header + picture + points + self.features.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError where `data` was not written by `to_bytes`."""
        try:
            magic, count, _, size = _HEADER.unpack_from(data)
            start = _HEADER.size + size
            if magic != _MAGIC or len(data) != start + count * (4 * 2 + 128):
                raise ValueError("these bytes are no landmarks")
            with Image.open(io.BytesIO(data[_HEADER.size : start]), formats=["JPEG"]) as im:
                pixels = np.asarray(im.convert("RGB"))
        except (struct.error, OSError) as error:
            raise ValueError("these bytes are no landmarks") from error
        points = np.frombuffer(data, "<f2", 4 * count, start).reshape(count, 4)
        features = np.frombuffer(data, np.uint8, 128 * count, start + 8 * count)
        return cls(pixels, points.astype(np.float32), features.reshape(count, 128))


def landmarks(picture: Image.Image) -> Landmarks:
    """From an upright RGB picture of any size."""
    full = np.asarray(picture.convert("RGB"))
    pixels = _shrunk(full, _DETAIL)
    if _blank(pixels):
        return Landmarks(pixels, np.zeros((0, 4), np.float32), np.zeros((0, 128), np.uint8))
    factor = PICTURE_SIDE / max(full.shape[:2])
    grey = _resized(cv2.cvtColor(full, cv2.COLOR_RGB2GRAY), factor)
    sift = cv2.SIFT_create(_POINTS, contrastThreshold=0.02)
    found, described = sift.detectAndCompute(grey, None)
    found, described = found[:_POINTS], described[:_POINTS] if len(found) else None
    back = max(pixels.shape[:2]) / PICTURE_SIDE
    points = np.array(
        [
            (p.pt[0] * back, p.pt[1] * back, p.size * back, np.radians(p.angle))
            for p in found
        ],
        np.float32,
    ).reshape(-1, 4)
    if described is None:
        described = np.zeros((0, 128), np.float32)
    return Landmarks(pixels, points, described.astype(np.uint8))


@dataclass(frozen=True)
class Evidence:
    """How well the item, laid over the query, explains it. `features` are float64."""

    features: NDArray[np.float64]


@dataclass(frozen=True)
class _View:
    """A query, perhaps mirrored: its pixels, and its local features as complex numbers.

    `places` are x + iy in those pixels; `turns` are size x exp(i direction).
    """

    pixels: Pixels
    places: NDArray[np.complex64]
    turns: NDArray[np.complex64]
    features: Floats


@dataclass(frozen=True)
class _Pose:
    """Where a query's pixels lie in the item's: 2 x 3, float32, x right and y down."""

    view: _View
    matches: "_Matches"
    matrix: Floats


def agreement(query: Landmarks, item: Landmarks) -> float:
    """How surely `query` is an altered copy of `item`, in [0, 1]; 0 for a blank picture."""
    found = evidence(query, item)
    if found is None:
        return 0.0
    logit = float(found @ WEIGHTS[1:] + WEIGHTS[0])
    return float(1 / (1 + np.exp(-logit)))


def evidence(query: Landmarks, item: Landmarks) -> NDArray[np.float64] | None:
    """What `agreement` weighs, float64, shape (N,), or None where nothing can be seen."""
    if _blank(query.pixels) or _blank(item.pixels):
        return None
    known = _view(item)
    poses = []
    for view in (_view(query), _mirrored(_view(query))):
        matches = _matches(view, known)
        poses += _by_features(view, matches)
        poses += _by_search(view, matches, known)
    best = max(poses, key=lambda pose: _fit(pose, known))
    return _compare(_refined(best, known), known)


def _view(picture: Landmarks) -> _View:
    x, y, size, direction = picture.points.T
    features = np.sqrt(picture.features.astype(np.float32))
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
    return _View(picture.pixels, x + 1j * y, size * np.exp(1j * direction), features)


def _mirrored(view: _View) -> _View:
    """Left and right swapped. SIFT's grid of 4 x 4 x 8 directions is swapped with them."""
    width = view.pixels.shape[1]
    pixels = np.ascontiguousarray(view.pixels[:, ::-1])
    features = view.features.reshape(-1, 4, 4, 8)[:, ::-1][..., _REVERSED].reshape(-1, 128)
    return _View(pixels, width - 1 - view.places.conj(), -view.turns.conj(), features)


@dataclass(frozen=True)
class _Matches:
    """Local features of a query, `here`, and of an item, `there`, that look alike."""

    here: NDArray[np.complex64]
    there: NDArray[np.complex64]
    turn: NDArray[np.complex64]


def _matches(view: _View, item: _View) -> _Matches:
    if not len(view.places) or len(item.places) < 2:
        nothing = np.zeros(0, np.complex64)
        return _Matches(nothing, nothing, nothing)
    alike = view.features @ item.features.T
    nearest = alike.argmax(axis=1)
    top = np.partition(alike, -2, axis=1)[:, -2:]
    kept = np.flatnonzero((1 - top[:, 1]) < _RATIO**2 * (1 - top[:, 0]))
    there = nearest[kept]
    return _Matches(
        view.places[kept], item.places[there], item.turns[there] / view.turns[kept]
    )


def _by_features(view: _View, matches: _Matches) -> list[_Pose]:
    """The similarity transform that most local features agree on.

    Each pair of matched features gives one by itself: where, how large, which way.
    """
    here, there, turn = matches.here, matches.there, matches.turn
    if not len(here):
        return []
    shift = there - turn * here
    near = np.abs(turn[:, None] * here + shift[:, None] - there) < _NEAR
    best = int(near.sum(axis=1).argmax())
    chosen, a, b = near[best], turn[best], shift[best]
    for _ in range(2):
        if chosen.sum() < 3:
            break
        u, v = here[chosen], there[chosen]
        du, dv = u - u.mean(), v - v.mean()
        a = (du.conj() @ dv) / max(float((du.conj() @ du).real), 1e-6)
        b = v.mean() - a * u.mean()
        chosen = np.abs(a * here + b - there) < _NEAR
    return [_Pose(view, matches, _matrix(a, b))]


def _inliers(pose: _Pose) -> int:
    """How many of the item's local features lie where the pose says."""
    here, there = pose.matches.here, pose.matches.there
    x, y = pose.matrix @ np.stack([here.real, here.imag, np.ones(len(here))])
    return len(set(there[np.abs(x + 1j * y - there) < _NEAR].tolist()))


def _matrix(a: complex, b: complex) -> Floats:
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]], np.float32)


def _by_search(view: _View, matches: _Matches, item: _View) -> list[_Pose]:
    """The best place of the query as a crop of the item, or of the item in a frame."""
    scale = _COARSE / max(item.pixels.shape[:2])
    known = _grey(_resized(item.pixels, scale))
    height, width = known.shape
    q_height, q_width = view.pixels.shape[:2]
    largest = min(width / q_width, height / q_height)  # item pixels per query pixel
    grey = _grey(view.pixels)
    best, found = -1.0, None
    for share in _CROPS:
        factor = largest * share
        size = (max(4, round(q_width * factor)), max(4, round(q_height * factor)))
        if size[0] > width or size[1] > height:
            size = (min(size[0], width), min(size[1], height))
        part = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        _, value, _, place = cv2.minMaxLoc(cv2.matchTemplate(known, part, _NCC))
        if value > best:
            best, found = value, (size[0] / q_width, place)
    framed = max(width / q_width, height / q_height)
    for share in _FRAMES:
        factor = framed * share
        size = (max(width, round(q_width * factor)), max(height, round(q_height * factor)))
        whole = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        _, value, _, place = cv2.minMaxLoc(cv2.matchTemplate(whole, known, _NCC))
        if value > best:
            best, found = value, (size[0] / q_width, (-place[0], -place[1]))
    if found is None:
        return []
    factor, place = found
    # Pixel centres: x_item + 0.5 = ((x_query + 0.5) * factor + place) / scale
    a = factor / scale
    shift = [(p / scale) + 0.5 * a - 0.5 for p in place]
    return [
        _Pose(view, matches, np.array([[a, 0, shift[0]], [0, a, shift[1]]], np.float32))
    ]


def _grey(pixels: Pixels) -> Floats:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _lay(pose: _Pose, item: _View, side: int) -> tuple[Pixels, Pixels, NDArray[np.bool_]]:
    """Query, item laid over it, and where they overlap, at most `side` px long."""
    query = _shrunk(pose.view.pixels, side)
    f = query.shape[1] / pose.view.pixels.shape[1]
    matrix = _centred(pose.matrix, 1 / f)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    pixels = item.pixels
    if scale > 1.2:
        smaller = _resized(pixels, max(1 / scale, 4 / min(pixels.shape[:2])))
        g = smaller.shape[1] / pixels.shape[1]
        matrix = _scaled(matrix, g)
        pixels = smaller
    size = (query.shape[1], query.shape[0])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(
        pixels, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    inside = cv2.warpAffine(
        np.full(pixels.shape[:2], 255, np.uint8), matrix, size, flags=flags
    )
    return query, laid, inside > 250


def _centred(matrix: Floats, factor: float) -> Floats:
    """For query pixels `factor` times as large."""
    out = matrix.copy()
    out[:, :2] *= factor
    out[:, 2] += matrix[:, :2] @ np.full(2, 0.5 * factor - 0.5, np.float32)
    return out


def _scaled(matrix: Floats, factor: float) -> Floats:
    """For item pixels resized by `factor`."""
    out = matrix * np.float32(factor)
    out[:, 2] += 0.5 * factor - 0.5
    return out


def _fit(pose: _Pose, item: _View) -> float:
    if not 0.1 < np.sqrt(abs(np.linalg.det(pose.matrix[:, :2]))) < 10:
        return -2.0
    query, laid, inside = _lay(pose, item, _COARSE)
    overlap = _overlap(pose, item, inside)
    if inside.sum() < 60:
        return -2.0
    value = _correlation(_grey(query)[inside], _grey(laid)[inside])
    return value * min(1.0, max(overlap) / 0.9)


def _overlap(pose: _Pose, item: _View, inside: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of the query, and of the item, that lies on the other."""
    of_query = float(inside.mean())
    area = abs(float(np.linalg.det(pose.matrix[:, :2])))
    height, width = pose.view.pixels.shape[:2]
    known = item.pixels.shape[0] * item.pixels.shape[1]
    return of_query, min(1.0, of_query * height * width * area / known)


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-3))


def _refined(pose: _Pose, item: _View) -> _Pose:
    query = _shrunk(pose.view.pixels, _FRAME)
    f = query.shape[1] / pose.view.pixels.shape[1]
    matrix = _centred(pose.matrix, 1 / f)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    g, pixels = 1.0, item.pixels
    if scale > 1.2:
        pixels = _resized(pixels, max(1 / scale, 4 / min(pixels.shape[:2])))
        g = pixels.shape[1] / item.pixels.shape[1]
        matrix = _scaled(matrix, g)
    try:
        _, better = cv2.findTransformECC(
            _grey(query), _grey(pixels), matrix.copy(), cv2.MOTION_AFFINE, _STEPS, None, 3
        )
    except cv2.error:  # it did not converge
        return pose
    better = _centred(_scaled(better, 1 / g), f)
    new = _Pose(pose.view, pose.matches, better.astype(np.float32))
    return new if _fit(new, item) > _fit(pose, item) else pose


def _compare(pose: _Pose, item: _View) -> NDArray[np.float64]:
    query, laid, inside = _lay(pose, item, _FRAME)
    of_query, of_item = _overlap(pose, item, inside)
    if inside.sum() < 100:
        return np.zeros(len(NAMES))
    q, k = _grey(query), _grey(laid)
    whole = _correlation(q[inside], k[inside])
    smooth_q, smooth_k = (cv2.GaussianBlur(p, (0, 0), 1.5) for p in (q, k))
    smooth = _correlation(smooth_q[inside], smooth_k[inside])
    # trimmed
    gain, offset = _line(smooth_k[inside], smooth_q[inside])
    error = np.abs(smooth_q - gain * smooth_k - offset)
    good = inside & (error <= np.quantile(error[inside], 0.85))
    gain, offset = _line(smooth_k[good], smooth_q[good])
    error = np.abs(smooth_q - gain * smooth_k - offset)
    spread = smooth_q[inside].std()
    trimmed = float((error[good] ** 2).mean() / (spread**2 + 1))
    gx = [cv2.Sobel(p, cv2.CV_32F, 1, 0) for p in (smooth_q, smooth_k)]
    gy = [cv2.Sobel(p, cv2.CV_32F, 0, 1) for p in (smooth_q, smooth_k)]
    core = cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    edges = _correlation(
        np.concatenate([gx[0][core], gy[0][core]]),
        np.concatenate([gx[1][core], gy[1][core]]),
    )
    # local
    n = 9
    box = lambda p: cv2.boxFilter(p, -1, (n, n))  # noqa: E731
    mq, mk = box(smooth_q), box(smooth_k)
    vq = box(smooth_q * smooth_q) - mq * mq
    vk = box(smooth_k * smooth_k) - mk * mk
    vqk = box(smooth_q * smooth_k) - mq * mk
    ssim = (2 * vqk * abs(gain) + 20) / (vq + vk * gain * gain + 20)
    local = ssim[core] if core.any() else np.zeros(1)
    colour, saturation = _colours(query, laid, good)
    height, width = query.shape[:2]
    return np.array(
        [
            of_query,
            of_item,
            max(of_query, of_item),
            -np.log(1.002 - whole),
            -np.log(1.002 - smooth),
            -np.log(trimmed + 0.002),
            -np.log(1.01 - edges),
            float(local.mean()),
            float(np.quantile(local, 0.2)),
            float(np.quantile(local, 0.05)),
            colour,
            saturation,
            np.log(max(gain, 0.05)),
            np.log1p(_inliers(pose)),
            _inliers(pose) / max(len(pose.matches.here), 1),
            np.log1p(spread),
            np.log(max(height, width) / _FRAME),
            float(np.mean(error[good])),
        ]
    )


def _colours(query: Pixels, laid: Pixels, where: NDArray[np.bool_]) -> tuple[float, float]:
    """Chroma that the item leaves unexplained, in levels; and the query's own chroma."""
    q, k = (cv2.blur(p, (5, 5))[where].astype(np.float32) for p in (query, laid))
    gains = np.clip(q.mean(axis=0) / np.maximum(k.mean(axis=0), 1), 0.6, 1.6)
    k = k * gains
    cq, ck = (p - p.mean(axis=1, keepdims=True) for p in (q, k))
    keep = np.clip((cq * ck).sum() / max(float((ck * ck).sum()), 1), 0, 1.5)
    return float(np.log1p(np.abs(cq - keep * ck).mean())), float(
        np.log1p(np.abs(cq).mean())
    )


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    dx = x - x.mean()
    gain = float((dx * (y - y.mean())).sum() / max(float((dx * dx).sum()), 1e-3))
    return gain, float(y.mean() - gain * x.mean())


def _shrunk(pixels: Pixels, side: int) -> Pixels:
    factor = side / max(pixels.shape[:2])
    return pixels if factor >= 1 else _resized(pixels, factor)


def _resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = pixels.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, size, interpolation=how)


def _blank(pixels: Pixels) -> bool:
    return bool(pixels.std(axis=(0, 1)).max() < BLANK_LEVELS)
