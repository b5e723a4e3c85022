"""What is kept of one picture so that another can be laid over it.

A small copy of its pixels, and where its local features (SIFT) are and what they look
like: 4 to 21 KB, kept for every catalog item and made once for every query.
"""

import io
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.images import BLANK_LEVELS, Pixels

PICTURE_SIDE = 200
"""Longest side in pixels at which local features are sought.

A picture given to `landmarks` should have at least this much where the file does.
"""

FRAME = 64
"""Longest side of a query, in pixels, at which pixels are compared."""

COARSE = 32
"""Longest side, in pixels, of the tiny copies that are searched."""

_POINTS = 96
_DETAIL = 128  # longest side of the copy that is kept, px
_CONTRAST = 0.02  # half of OpenCV's default: catalog pictures are often smooth
_QUALITY = 80  # of the copy as it is stored
_OPPOSITE = [0, 7, 6, 5, 4, 3, 2, 1]  # SIFT's eight directions seen in a mirror
_MAGIC = b"PLM1"
_HEADER = struct.Struct("<4sII")
_POINT = np.dtype("<f2")

_TINY = 16  # side at which a picture is judged to have structure, px
# An orthonormal base of all even gradients over _TINY x _TINY pixels.
_STEP = np.arange(_TINY) - (_TINY - 1) / 2
_PLANE, _ = np.linalg.qr(
    np.stack(
        [np.ones(_TINY**2), np.tile(_STEP, _TINY), np.repeat(_STEP, _TINY)],
        axis=1,
    )
)

Floats = NDArray[np.float32]

cv2.setNumThreads(1)  # for pictures this small, more threads only cost


@dataclass(frozen=True)
class View:
    """A picture, perhaps mirrored, at several sizes, and its features as numbers.

    `places` are x + iy in `pixels`, `turns` are size * exp(i * direction); `features`
    is float32, shape (K, 128), each of length 1.
    """

    pixels: Pixels
    places: NDArray[np.complex64]
    turns: NDArray[np.complex64]
    features: Floats

    @cached_property
    def levels(self) -> tuple[Pixels, Pixels, Pixels]:
        """The pixels at full size, at FRAME and at COARSE."""
        frame = shrunk(self.pixels, FRAME)
        return self.pixels, frame, shrunk(frame, COARSE)

    @cached_property
    def greys(self) -> tuple[Floats, Floats, Floats]:
        """The levels' luminance, float32, 0..255."""
        full, frame, coarse = (
            cv2.cvtColor(level, cv2.COLOR_RGB2GRAY).astype(np.float32)
            for level in self.levels
        )
        return full, frame, coarse


@dataclass(frozen=True)
class Landmarks:
    """What is kept of one picture to compare it by.

    `pixels` is uint8, shape (H, W, 3), RGB, its longest side at most 128. `points` is
    float32, shape (K, 4), K <= 96: x and y of each local feature in those pixels, its
    size in pixels and its direction in radians. `features` is uint8, shape (K, 128):
    their SIFT descriptors.
    """

    pixels: Pixels
    points: Floats
    features: NDArray[np.uint8]

    @cached_property
    def blank(self) -> bool:
        """Whether there is nothing to compare: nearly uniform, or one even gradient."""
        tiny = cv2.resize(self.pixels, (_TINY, _TINY), interpolation=cv2.INTER_AREA)
        levels = tiny.reshape(-1, 3).astype(np.float64)
        left = levels - _PLANE @ (levels.T @ _PLANE).T
        return bool(left.std(axis=0).max() < BLANK_LEVELS)

    @cached_property
    def view(self) -> View:
        """The picture as it is."""
        x, y, size, direction = self.points.T
        features = np.sqrt(self.features.astype(np.float32))  # compared as in RootSIFT
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
        return View(self.pixels, x + 1j * y, size * np.exp(1j * direction), features)

    @cached_property
    def mirrored(self) -> View:
        """Left and right swapped, in SIFT's grid of 4 x 4 x 8 directions as well."""
        seen = self.view
        features = seen.features.reshape(-1, 4, 4, 8)[:, ::-1][..., _OPPOSITE]
        return View(
            np.ascontiguousarray(seen.pixels[:, ::-1]),
            seen.pixels.shape[1] - 1 - seen.places.conj(),
            -seen.turns.conj(),
            features.reshape(-1, 128),
        )

    def to_bytes(self) -> bytes:
        """For the index; the pixels as a JPEG of quality 80."""
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
        picture = file.getvalue()
        header = _HEADER.pack(_MAGIC, len(self.points), len(picture))
        points = self.points.astype(_POINT).tobytes()
        return header + picture + points + self.features.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError where `data` is not what `to_bytes` gave."""
        try:
            magic, count, size = _HEADER.unpack_from(data)
            points_at = _HEADER.size + size
            features_at = points_at + 4 * _POINT.itemsize * count
            if magic != _MAGIC or len(data) != features_at + 128 * count:
                raise ValueError("these bytes are no landmarks of this version")
            with Image.open(
                io.BytesIO(data[_HEADER.size : points_at]), formats=["JPEG"]
            ) as im:
                pixels = np.asarray(im.convert("RGB"))
        except (struct.error, OSError) as error:
            raise ValueError("these bytes are no landmarks") from error
        points = np.frombuffer(data, _POINT, 4 * count, points_at).reshape(count, 4)
        features = np.frombuffer(data, np.uint8, 128 * count, features_at)
        return cls(pixels, points.astype(np.float32), features.reshape(count, 128))


def landmarks(picture: Image.Image) -> Landmarks:
    """From an upright RGB picture of any size. A blank one has no local features."""
    full = np.asarray(picture)
    found = Landmarks(
        shrunk(full, _DETAIL), np.zeros((0, 4), np.float32), np.zeros((0, 128), np.uint8)
    )
    if found.blank:
        return found
    grey = _resized(cv2.cvtColor(full, cv2.COLOR_RGB2GRAY), PICTURE_SIDE)
    sift = cv2.SIFT_create(_POINTS, contrastThreshold=_CONTRAST)
    keypoints, features = sift.detectAndCompute(grey, None)
    if not keypoints:
        return found
    back = max(found.pixels.shape) / max(grey.shape)
    points = np.array(
        [
            (p.pt[0] * back, p.pt[1] * back, p.size * back, np.radians(p.angle))
            for p in keypoints
        ]
    )
    kept = slice(_POINTS)  # OpenCV may return a few more, of equal strength
    return Landmarks(
        found.pixels, points[kept].astype(np.float32), features[kept].astype(np.uint8)
    )


def shrunk(pixels: Pixels, side: int) -> Pixels:
    """The picture with its longest side at most `side` pixels."""
    return pixels if max(pixels.shape[:2]) <= side else _resized(pixels, side)


def _resized(pixels: Pixels, side: int) -> Pixels:
    factor = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * factor)) for length in pixels.shape[:2])
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), np.uint8)
