"""What a user would pick instead: perceptual hashes with nearest neighbour."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

try:
    import pdqhash
except ImportError:  # needs a compiler to install, so it is no dependency
    pdqhash = None

Bits = NDArray[np.uint8]

_PDQ_QUALITY = 50  # below it PDQ's authors advise to discard a hash


@dataclass(frozen=True)
class Peer:
    """A perceptual hash: `hash` gives its packed bits, uint8, or None for no hash."""

    name: str
    hash: Callable[[Image.Image], Bits | None]


def _phash(image: Image.Image) -> Bits:
    return np.packbits(imagehash.phash(image).hash.ravel())


def _dhash(image: Image.Image) -> Bits:
    return np.packbits(imagehash.dhash(image).hash.ravel())


def _pdq(image: Image.Image) -> Bits | None:
    bits, quality = pdqhash.compute(np.asarray(image))
    return np.packbits(bits.astype(bool)) if quality >= _PDQ_QUALITY else None


def peer_versions() -> dict[str, str]:
    """Of what need not be installed; `report.versions` has the others."""
    return {"pdqhash": version("pdqhash")} if pdqhash else {}


def peers() -> list[Peer]:
    """The hashes that are installed here; PDQ wants ``pip install pdqhash``."""
    found = [Peer("pHash", _phash), Peer("dHash", _dhash)]
    return [*found, Peer("PDQ", _pdq)] if pdqhash else found


def nearest(
    hashes: Sequence[Bits | None], catalog: Sequence[Bits | None]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each hash, the share of bits equal to the nearest catalog hash's, in [0, 1], and
    that one's position in `catalog`.

    A picture without a hash resembles nothing: 0, at -1.
    """
    shares, positions = np.zeros(len(hashes)), np.full(len(hashes), -1)
    places = np.array([n for n, bits in enumerate(catalog) if bits is not None])
    if not len(places):
        return shares, positions
    known = np.stack([bits for bits in catalog if bits is not None])
    for number, bits in enumerate(hashes):
        if bits is not None:
            differing = np.bitwise_count(known ^ bits).sum(axis=1)
            best = int(differing.argmin())
            shares[number] = 1 - differing[best] / (8 * len(bits))
            positions[number] = places[best]
    return shares, positions
