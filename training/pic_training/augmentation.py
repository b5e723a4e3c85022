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
from PIL import Image

from pic_daemon.images import Pixels, decode, to_pixels

cv2.setNumThreads(1)  # as many processes as cores do this at the same time

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
    train on go through `vary`. `resampling` names how pixels are resized: no choice, but
    by it a run is known that an earlier version began.
    """

    probability: float = 0.8
    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: float = 1.25
    side: tuple[int, int] = (48, 256)
    quality: tuple[int, int] = (10, 95)
    variety: bool = True
    resampling: str = "area, back by cubic"


def augment(image: Image.Image, draw: np.random.Generator, ranges: Augmentation) -> bytes:
    """Alter an RGB picture; returns the bytes of a JPEG file."""
    pixels, quality = alter(image, draw, ranges)
    return compress(pixels, quality or _UNCOMPRESSED)


def sample(
    image: Image.Image, draw: np.random.Generator, ranges: Augmentation, size: int
) -> Pixels:
    """An altered picture as the daemon would see it: uint8, shape (size, size, 3)."""
    pixels, quality = alter(image, draw, ranges)
    if quality is None:  # nothing for a codec to leave behind
        return to_pixels(Image.fromarray(pixels), size)
    return decode(compress(pixels, quality), size).pixels


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
        # One channel after the other takes half as long as indexing all three at once.
        pixels = np.stack([levels[c][pixels[..., c]] for c in range(3)], axis=-1)
    return pixels[:, ::-1] if mirrored else pixels


def alter(
    image: Image.Image, draw: np.random.Generator, ranges: Augmentation
) -> tuple[Pixels, int | None]:
    """An RGB picture cropped and resized, and the JPEG quality to save it at, if any.

    The picture is uint8, shape (H, W, 3).
    """
    pixels = np.asarray(image)
    if draw.random() < ranges.probability:
        pixels = _crop(pixels, draw, ranges)
    if draw.random() < ranges.probability:
        pixels = _resize(pixels, draw, ranges)
    quality = None
    if draw.random() < ranges.probability:
        quality = int(draw.integers(ranges.quality[0], ranges.quality[1] + 1))
    return pixels, quality


def compress(pixels: Pixels, quality: int) -> bytes:
    """The bytes of a JPEG file of RGB pixels, uint8, shape (H, W, 3)."""
    # The very pixels that Pillow's encoder leaves, in two thirds of its time.
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    file = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return bytes(file)


def _crop(pixels: Pixels, draw: np.random.Generator, ranges: Augmentation) -> Pixels:
    height, width = pixels.shape[:2]
    area = draw.uniform(*ranges.crop_area)
    stretch = ranges.crop_aspect ** draw.uniform(-1, 1)
    columns = min(width, max(1, round(width * np.sqrt(area * stretch))))
    rows = min(height, max(1, round(height * np.sqrt(area / stretch))))
    left = int(draw.integers(0, width - columns + 1))
    top = int(draw.integers(0, height - rows + 1))
    return pixels[top : top + rows, left : left + columns]


def _resize(pixels: Pixels, draw: np.random.Generator, ranges: Augmentation) -> Pixels:
    low, high = np.log(ranges.side)
    side = float(np.exp(draw.uniform(low, high)))
    back = draw.random() < 0.5
    height, width = pixels.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return pixels
    smaller = (max(1, round(width * factor)), max(1, round(height * factor)))
    # Pillow's bicubic filter took three times as long, most of a sample's whole time.
    pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    return (
        cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
        if back
        else pixels
    )
