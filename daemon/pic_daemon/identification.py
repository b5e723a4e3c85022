"""Which catalog item a picture is a copy of: what is looked at, and the joint decision.

The descriptor proposes the nearest items; `confirmation` says of each how surely the
picture is a copy of it. Both numbers make the joint score that the index's threshold
decides by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pic_daemon.confirmation import agreement
from pic_daemon.folders import text_of
from pic_daemon.images import MAX_PIXELS, ImageError, Pixels, open_rgb, to_pixels
from pic_daemon.landmarks import PICTURE_SIDE, Landmarks, landmarks
from pic_daemon.margins import within_margins
from pic_daemon.reading import Reading, read_bytes

CANDIDATES = 5
"""Items that are confirmed or refused per picture, nearest first."""

DEFAULT_THRESHOLD = 0.5
"""Of the joint score, for an index that no decoys were measured with."""

UNDESCRIBED: dict[str, Any] = {
    "status": "no-match",
    "error": "the descriptor gave no numbers for this picture",
}
"""The row's columns where there is no Identification."""


@dataclass(frozen=True)
class Closeup:
    """A picture as the second stage sees it.

    `pixels` are for the descriptor, uint8, shape (size, size, 3), of what lies within the
    picture's margins; it is compared with items as a whole.
    """

    pixels: Pixels
    landmarks: Landmarks


@dataclass(frozen=True)
class CloserReading:
    """A file that was read again, larger; it was still the same."""

    path: str
    closeup: Closeup


@dataclass(frozen=True)
class Candidate:
    """A catalog item near a picture: its name, the cosine, and its Landmarks as bytes."""

    item: str
    similarity: float
    landmarks: bytes


@dataclass(frozen=True)
class Confirmation:
    """The agreement, in [0, 1], with each candidate of the file at `path`, in order."""

    path: str
    agreements: tuple[float, ...]


@dataclass(frozen=True)
class Identification:
    """The nearest item and the runner-up with their cosines, and the joint decision.

    `score` is the joint score of `item` in [0, 1]; `matched`: it reaches the threshold.
    """

    item: str
    similarity: float
    runner_up: str | None
    runner_up_similarity: float | None
    score: float
    threshold: float

    @property
    def matched(self) -> bool:
        """Whether the picture is taken for a copy of `item`."""
        return self.score >= self.threshold

    def columns(self) -> dict[str, Any]:
        """The row's columns that it decides."""
        return {
            "status": "match" if self.matched else "no-match",
            "catalog_item": text_of(self.item),
            "similarity": self.similarity,
            "runner_up": self.runner_up and text_of(self.runner_up),
            "runner_up_similarity": self.runner_up_similarity,
            "joint_score": self.score,
            "joint_threshold": self.threshold,
        }


def joint_score(similarity: float, agreement: float) -> float:
    """From a cosine in [-1, 1] and an agreement in [0, 1], in [0, 1], rising in both."""
    return max(0.0, similarity) * agreement


def identify(
    candidates: Sequence[Candidate], agreements: Sequence[float], threshold: float
) -> Identification:
    """Join what descriptor and confirmation say of the candidates, of which one at least.

    Candidates without an agreement, at the end, could not reach the threshold.
    """
    padded = [*agreements, *[0.0] * (len(candidates) - len(agreements))]
    scored = [
        (joint_score(candidate.similarity, value), candidate.similarity, -rank, candidate)
        for rank, (candidate, value) in enumerate(zip(candidates, padded, strict=True))
    ]
    (score, *_, best), *others = sorted(scored, key=lambda s: s[:3], reverse=True)
    runner_up = others[0][3] if others else None
    return Identification(
        best.item,
        best.similarity,
        runner_up.item if runner_up else None,
        runner_up.similarity if runner_up else None,
        score,
        threshold,
    )


def worth_confirming(candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
    """Those that a full agreement would take to the threshold; nearest first, as given."""
    return [c for c in candidates if joint_score(c.similarity, 1.0) >= threshold]


def agreements(query: Landmarks, items: Sequence[bytes]) -> tuple[float, ...]:
    """How surely `query` is a copy of each item, in [0, 1]; they are Landmarks as bytes."""
    return tuple(agreement(query, Landmarks.from_bytes(item)) for item in items)


def side_for(size: int) -> int:
    """The `size` to give to `open_rgb` for a descriptor of this input size."""
    return max(size, PICTURE_SIDE)


def look_at(data: bytes, size: int, max_pixels: int = MAX_PIXELS) -> Closeup:
    """Decode a file's bytes for the second stage; raises ImageError as `decode` does."""
    picture, _ = open_rgb(data, side_for(size), max_pixels)
    return closeup_of(picture, size)


def closeup_of(picture: Image.Image, size: int) -> Closeup:
    """From an upright RGB picture."""
    pixels = to_pixels(within_margins(picture) or picture, size)
    return Closeup(pixels, landmarks(picture))


# Tasks of the worker processes: each gives a list of one, as `read_images` one of many.


def look_closer(
    path: str, sha256: str, size: int, max_pixels: int
) -> list[CloserReading | Reading]:
    """Read a file again that had this content; a Reading says why it could not be."""
    reading, data = read_bytes(path)
    if reading.sha256 and reading.sha256 != sha256:
        return [Reading(path, reading.stamp, changed=True)]
    if not reading.sha256:
        return [reading]
    try:
        return [CloserReading(path, look_at(data, size, max_pixels))]
    except ImageError as error:
        return [Reading(path, reading.stamp, sha256, error=str(error))]


def confirm(path: str, query: Landmarks, items: Sequence[bytes]) -> list[Confirmation]:
    """Compare the picture at `path` with items, given as Landmarks in bytes."""
    return [Confirmation(path, agreements(query, items))]
