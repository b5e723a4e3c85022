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
    """What a picture is compared by: pHash, 64 bits, and a thumbnail, int16 (32, 32, 3)."""

    hash: int
    thumbnail: NDArray[np.int16]


def look_of(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    small = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    bits = imagehash.phash(image).hash.ravel()
    number = int("".join("1" if bit else "0" for bit in bits), 2)
    return Look(number, np.asarray(small, dtype=np.int16))


def copies(looks: Sequence[Look], among: Sequence[Look]) -> Iterator[list[int]]:
    """For each of `looks` the positions in `among` of what looks the same."""
    hashes = np.array([look.hash for look in among], dtype=np.uint64)
    for look in looks:
        distance = np.bitwise_count(hashes ^ np.uint64(look.hash))
        yield [
            index
            for index in np.flatnonzero(distance <= _HASH_DISTANCE).tolist()
            if np.abs(among[index].thumbnail - look.thumbnail).mean() <= _LEVELS
        ]


def groups_of(looks: dict[str, Look]) -> dict[str, str]:
    """Name of each picture -> smallest name of those it is linked to, copy by copy."""
    names = list(looks)
    group = {name: name for name in names}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    found = copies(list(looks.values()), list(looks.values()))
    for name, twins in zip(names, found, strict=True):
        for index in twins:
            one, other = sorted((root(name), root(names[index])))
            group[other] = one
    return {name: root(name) for name in names}
