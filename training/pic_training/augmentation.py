"""How a picture is altered on its way: cropped, resized, compressed.

Catalog and other images go through the same alterations with the same
probabilities, so that a network can learn nothing from the alteration itself.
Compression is that of a real JPEG file, decoded by the daemon's own decoder.
Decoys to train on are made into new ones besides, mirrored and recoloured: any change
leaves a decoy a decoy. Those that measure never are.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from pic_daemon.images import Pixels, plain_jpeg, to_pixels

cv2.setNumThreads(1)  # for pictures this small, more threads only cost

_UNCOMPRESSED = 95  # quality of a file that is not meant to lose anything

MIRRORED = 1 / 2
RECOLOURED = 1 / 3
BENT = 1 / 2
"""Shares of the decoys that `vary` mirrors, recolours and bends."""

BEND = 0.5
"""Greatest natural logarithm, either way, of the exponent that bends a channel."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges that each alteration draws from.

    Each of the three is applied with probability `probability`, on its own.
    Crop: a share `crop_area` of the picture's area, its aspect ratio changed by up to
    the factor `crop_aspect` either way, anywhere. Resize: the longer side becomes
    `side` pixels (log-uniform, never enlarged), and half of the time the picture is
    then enlarged back to the size it had. Compress: JPEG at `quality`; where this one
    is not applied and a file is wanted, it is saved at quality 95. `variety`: decoys to
    train on go through `vary`.
    """

    probability: float = 0.8
    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: float = 1.25
    side: tuple[int, int] = (48, 256)
    quality: tuple[int, int] = (10, 95)
    variety: bool = True


def augment(image: Image.Image, draw: np.random.Generator, ranges: Augmentation) -> bytes:
    """Alter an RGB picture; returns the bytes of a JPEG file."""
    altered, quality = _alter(np.array(image), draw, ranges)
    return compress(altered, quality or _UNCOMPRESSED)


def sample(
    pixels: Pixels, draw: np.random.Generator, ranges: Augmentation, size: int
) -> Pixels:
    """An altered picture, RGB, as the daemon would see it: uint8, shape (size, size, 3)."""
    altered, quality = _alter(pixels, draw, ranges)
    if quality is None:  # nothing for a codec to leave behind
        return to_pixels(Image.fromarray(altered), size)
    return to_pixels(plain_jpeg(compress(altered, quality), size), size)


def vary(pixels: Pixels, draw: np.random.Generator) -> Pixels:
    """A decoy made into one that no folder holds; uint8, shape (size, size, 3).

    It may be mirrored, its channels may change places, and each may be bent by an
    exponent of its own, as gamma does. A few thousand decoys are soon known by heart;
    unseen ones are then taken for catalog. Halves of two put together helped less,
    perhaps for their seam (bench/results/ablation.md).
    """
    mirrored, recoloured, bent = draw.random(3) < (MIRRORED, RECOLOURED, BENT)
    if recoloured:
        pixels = pixels[..., draw.permutation(3)]
    if bent:
        exponents = np.exp(draw.uniform(-BEND, BEND, (3, 1)))
        levels = ((np.arange(256) / 255) ** exponents * 255).round().astype(np.uint8)
        pixels = np.asarray(cv2.LUT(pixels, levels.T[None]), np.uint8)
    return pixels[:, ::-1] if mirrored else pixels


def _alter(
    pixels: Pixels, draw: np.random.Generator, ranges: Augmentation
) -> tuple[Pixels, int | None]:
    """RGB pixels cropped and resized, and the JPEG quality to save them at, if any."""
    if draw.random() < ranges.probability:
        pixels = _crop(pixels, draw, ranges)
    if draw.random() < ranges.probability:
        pixels = _resize(pixels, draw, ranges)
    quality = None
    if draw.random() < ranges.probability:
        quality = int(draw.integers(ranges.quality[0], ranges.quality[1] + 1))
    return pixels, quality


def compress(pixels: Pixels, quality: int) -> bytes:
    """The bytes of a JPEG file of RGB pixels, compressed as Pillow does it, but faster."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, file = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
    return bytes(file)


def _crop(pixels: Pixels, draw: np.random.Generator, ranges: Augmentation) -> Pixels:
    whole_height, whole_width = pixels.shape[:2]
    area = draw.uniform(*ranges.crop_area)
    stretch = ranges.crop_aspect ** draw.uniform(-1, 1)
    width = min(whole_width, max(1, round(whole_width * np.sqrt(area * stretch))))
    height = min(whole_height, max(1, round(whole_height * np.sqrt(area / stretch))))
    left = int(draw.integers(0, whole_width - width + 1))
    top = int(draw.integers(0, whole_height - height + 1))
    return pixels[top : top + height, left : left + width]


def _resize(pixels: Pixels, draw: np.random.Generator, ranges: Augmentation) -> Pixels:
    low, high = np.log(ranges.side)
    side = float(np.exp(draw.uniform(low, high)))
    back = draw.random() < 0.5
    height, width = pixels.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return pixels
    smaller = bicubic(pixels, max(1, round(height * factor)), max(1, round(width * factor)))
    return bicubic(smaller, height, width) if back else smaller


def bicubic(pixels: Pixels, height: int, width: int) -> Pixels:
    """RGB pixels resized by what Pillow calls BICUBIC; in a third of its time with AVX2, in
    twice as much without (bench/results/published-protocol.md)."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)[None]).permute(0, 3, 1, 2)
    resized = interpolate(image, (height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()
