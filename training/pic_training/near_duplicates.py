"""Which pictures are copies of each other, as far as decoys and splits must know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# A copy: perceptual hashes (64 bits) this near, and 32 x 32 thumbnails this alike
# (mean absolute difference in levels), none of whose 4 x 4 blocks differs by much in its
# mean, and whose difference is small beside what they vary by themselves (root mean
# squares). The hash alone would also take another colour of the same product for a copy,
# the thumbnail one that is small before a plain background, and all of these another thin
# outline on white: those are decoys. Of what the others accept copies come to 0.49 of their
# variation at most, pairs of outlines to 0.9 on average.
_HASH_DISTANCE = 10
_LEVELS = 10.0
_BLOCK_LEVELS = 25.0
_VARIATION = 0.6
_NOISE = 1.0  # levels: what copies of one colour may differ by
_THUMBNAIL = 32
_BLOCKS = 4 * 4 * 3
_ROUNDING = 0.01  # levels: what means in float32 may be off by


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
    compared = _Compared(among)
    for look in looks:
        near = compared.closer(look, compared.near(look))
        yield next((n for n in near.tolist() if _alike(look, among[n])), None)


def groups_of(looks: dict[str, Look]) -> dict[str, str]:
    """Name of each picture -> smallest name of those it is linked to, copy by copy."""
    names, all_looks = list(looks), list(looks.values())
    compared = _Compared(all_looks)
    group = np.arange(len(names))
    for number, look in enumerate(all_looks):
        near = compared.near(look, number + 1)
        # Only across groups: thousands of frames of one scene are millions of pairs.
        near = compared.closer(look, near[group[near] != group[number]])
        for other in near.tolist():
            if group[other] != group[number] and _alike(look, all_looks[other]):
                group[group == group[other]] = group[number]
    smallest: dict[int, str] = {}
    for name, number in zip(names, group.tolist(), strict=True):
        smallest[number] = min(name, smallest.get(number, name))
    return {name: smallest[n] for name, n in zip(names, group.tolist(), strict=True)}


class _Compared:
    """Looks in arrays, so that one is compared with all of them at once."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self._hashes = np.array([look.hash for look in looks], dtype=np.uint64)
        blocks = [_blocks(look) for look in looks]
        self._blocks = np.array(blocks, dtype=np.float32).reshape(-1, _BLOCKS)

    def near(self, look: Look, first: int = 0) -> NDArray[np.intp]:
        """Positions, from `first` on, of what has nearly the same hash."""
        distance = np.bitwise_count(self._hashes[first:] ^ np.uint64(look.hash))
        return np.flatnonzero(distance <= _HASH_DISTANCE) + first

    def closer(self, look: Look, positions: NDArray[np.intp]) -> NDArray[np.intp]:
        """Those of the positions that are alike by the means of their blocks.

        These differ by no more, on average, than the thumbnails do, so that most of what
        is another colour under the same hash need not be compared further.
        """
        levels = np.abs(self._blocks[positions] - _blocks(look))
        near = (levels.mean(axis=1) <= _LEVELS + _ROUNDING) & (
            levels.max(axis=1) <= _BLOCK_LEVELS
        )
        kept: NDArray[np.intp] = positions[near]
        return kept


def _blocks(look: Look) -> NDArray[np.float32]:
    """Means over 8 x 8 pixels of each channel, shape (_BLOCKS,)."""
    parts = look.thumbnail.reshape(4, 8, 4, 8, 3)
    means: NDArray[np.float32] = parts.mean(axis=(1, 3), dtype=np.float32)
    return means.ravel()


def _alike(one: Look, other: Look) -> bool:
    difference = one.thumbnail.astype(np.int16) - other.thumbnail
    if np.abs(difference).mean() > _LEVELS:
        return False
    varies = max(_spread(one.thumbnail), _spread(other.thumbnail))
    return _spread(difference) <= max(_NOISE, _VARIATION * varies)


def _spread(levels: NDArray[np.uint8] | NDArray[np.int16]) -> float:
    """Root mean square of levels about the mean of each channel."""
    return float((levels - levels.mean(axis=(0, 1), dtype=np.float32)).std())
