"""Which pictures are copies of each other, as far as decoys and splits must know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# A copy: perceptual hashes (64 bits) this near, and 32 x 32 thumbnails this alike
# (mean absolute difference in levels). The hash alone would also take another
# colour of the same product for a copy; the thumbnail keeps those as decoys.
_HASH_DISTANCE = 10
_LEVELS = 10.0
_THUMBNAIL = 32


@dataclass(frozen=True)
class Look:
    """What a picture is compared by: pHash, 64 bits, and a thumbnail, uint8 (32, 32, 3)."""

    hash: int
    thumbnail: NDArray[np.uint8]


def look_of(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    small = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    bits = imagehash.phash(image).hash.ravel()
    number = int("".join("1" if bit else "0" for bit in bits), 2)
    return Look(number, np.asarray(small))


def first_copies(looks: Sequence[Look], among: Sequence[Look]) -> Iterator[int | None]:
    """For each of `looks` the position in `among` of the first that looks the same."""
    hashes = _hashes(among)
    for look in looks:
        near = np.flatnonzero(_near(look, hashes)).tolist()
        yield next((n for n in near if _alike(look, among[n])), None)


def groups_of(looks: dict[str, Look]) -> dict[str, str]:
    """Name of each picture -> smallest name of those it is linked to, copy by copy."""
    names, all_looks = list(looks), list(looks.values())
    hashes = _hashes(all_looks)
    group = np.arange(len(names))
    for number, look in enumerate(all_looks):
        # Only across groups: thousands of frames of one scene are millions of pairs.
        for near in np.flatnonzero(_near(look, hashes) & (group != group[number])).tolist():
            if group[near] != group[number] and _alike(look, all_looks[near]):
                group[group == group[near]] = group[number]
    smallest: dict[int, str] = {}
    for name, number in zip(names, group.tolist(), strict=True):
        smallest[number] = min(name, smallest.get(number, name))
    return {name: smallest[n] for name, n in zip(names, group.tolist(), strict=True)}


def _hashes(looks: Sequence[Look]) -> NDArray[np.uint64]:
    return np.array([look.hash for look in looks], dtype=np.uint64)


def _near(look: Look, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    near: NDArray[np.bool_] = (
        np.bitwise_count(hashes ^ np.uint64(look.hash)) <= _HASH_DISTANCE
    )
    return near


def _alike(one: Look, other: Look) -> bool:
    difference = one.thumbnail.astype(np.int16) - other.thumbnail
    return bool(np.abs(difference).mean() <= _LEVELS)
