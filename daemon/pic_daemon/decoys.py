"""The promise of an index: the threshold that pictures which are no copies support.

Every decoy is tried as it is, cropped and compressed, and small and compressed. The
threshold is the lowest with at most the target rate of false positives on one half of
the decoys; the rate that is reported comes from the other half. What the classifier
keeps out before is not counted: with it the rate can only be lower.
"""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from pic_daemon.cascade import Identifier
from pic_daemon.catalog_index import CatalogIndex, Promise, files_in
from pic_daemon.confirmation import agreement
from pic_daemon.descriptor import Descriptor
from pic_daemon.folders import text_of
from pic_daemon.identification import (
    Candidate,
    Closeup,
    closeup_of,
    joint_score,
    look_at,
)
from pic_daemon.images import ImageError
from pic_daemon.indexing import looked_at, picture_at, slices
from pic_daemon.landmarks import Landmarks
from pic_daemon.promise import Floats, check_support, rate, threshold_for

VERSIONS = "as it is, cropped to 70% of its area at JPEG quality 50, 96 px at quality 30"
_COUNT = 3
_RUN = 32  # pictures at most, by name, that fall into one half together,
_RUNS = 20  # and so many such runs at least
_JPEG_SIDE = 65_500  # the longest that libjpeg writes


@dataclass(frozen=True)
class Decoy:
    """A decoy picture: the item that a version of it came nearest to, their joint score."""

    path: str
    item: str
    score: float


@dataclass(frozen=True)
class Measured:
    """The promise, the number of pictures that chose the threshold, what was left out with
    its reason, and all decoys, nearest first."""

    promise: Promise
    choosing: int
    left_out: dict[str, str]
    decoys: list[Decoy]

    @property
    def samples(self) -> int:
        """How many samples of those pictures there were."""
        return self.choosing * _COUNT


def measure(
    index: CatalogIndex,
    descriptor: Descriptor,
    folder: Path,
    target: float,
    pool: ProcessPoolExecutor,
    show: Callable[[int], None],
) -> Measured:
    """Choose the threshold of `index` on the pictures of `folder`, for `target`.

    Raises InputError where they cannot support that rate.
    """
    identifier = Identifier(descriptor, index)
    paths, left_out = decoys_in(folder, target)
    seen_before = {
        item.sha256: f"the catalog's {item.name}" for item in index.items.values()
    }
    scores: list[float] = []
    pictures: list[str] = []
    decoys: list[Decoy] = []
    for part in slices(paths):
        seen: list[tuple[str, Closeup]] = []
        versions = looked_at(pool, _versions, part, descriptor.info.input_size)
        for path, looked in zip(part, versions, strict=True):
            if isinstance(looked, str):
                left_out[path] = looked
            elif known := seen_before.get(looked[0]):
                left_out[path] = f"same bytes as {known}"
            else:
                seen_before[looked[0]] = path
                seen += [(path, closeup) for closeup in looked[1]]
        if seen:
            best = _best(identifier, [closeup for _, closeup in seen], pool)
            pictures += [path for path, _ in seen]
            scores += [score for _, score in best]
            for n in range(0, len(seen), _COUNT):
                nearest = max(best[n : n + _COUNT], key=lambda found: found[1])
                decoys.append(Decoy(seen[n][0], *nearest))
        show(len(part))
    _check(len(scores) // _COUNT, target, folder, left_out)
    promise = _promise(np.array(scores), pictures, target, index)
    decoys.sort(key=lambda decoy: decoy.score, reverse=True)
    chosen = len(decoys) - promise.rate.of // _COUNT if promise.rate else 0
    return Measured(promise, chosen, left_out, decoys)


def decoys_in(folder: Path, target: float) -> tuple[list[str], dict[str, str]]:
    """The paths of the pictures of `folder`, and what cannot be read with its reason.

    Raises InputError where there are too few for the rate `target`.
    """
    shut: dict[str, str] = {}
    paths = [str(folder / name) for name, _ in sorted(files_in(folder, shut))]
    left_out = {str(folder / name): reason for name, reason in shut.items()}
    _check(len(paths), target, folder, left_out)
    return paths, left_out


def _check(pictures: int, target: float, folder: Path, left_out: dict[str, str]) -> None:
    first = next((f", as {text_of(p)}: {why}" for p, why in left_out.items()), "")
    remedy = (
        f"{folder} holds {pictures} usable pictures ({len(left_out)} left out{first}). "
        f"Half choose the threshold, in {_COUNT} versions; give more of them or a "
        "higher --target-fpr"
    )
    check_support(pictures // 2 * _COUNT, target, remedy)


def _promise(
    scores: Floats,
    pictures: Sequence[str],
    target: float,
    index: CatalogIndex,
) -> Promise:
    _, number = np.unique(pictures, return_inverse=True)
    # Names in a row are often shots of one scene, which belong on one side.
    run = max(1, min(_RUN, len(pictures) // _COUNT // _RUNS))
    tested = number // run % 2 == 1
    nothing = np.zeros(int((~tested).sum()), bool)
    # At a score of 0 everything would match.
    threshold = max(1e-6, threshold_for(scores[~tested], nothing, target))
    measured = rate(scores[tested] >= threshold, number[tested])
    rule = (
        f"lowest joint score with a false positive rate of at most {target:g} on "
        f"{len(nothing)} decoy samples ({VERSIONS})"
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Promise(threshold, rule, now, len(index.items), target, measured, index.digest())


def _versions(path: str, size: int) -> tuple[str, list[Closeup]] | str:
    """The content's hash and a decoy's versions, or why it is left out."""
    try:
        picture, digest = picture_at(path, size)
    except ImageError as error:
        return str(error)
    whole = closeup_of(picture, size)
    if whole.landmarks.blank:
        return "nearly uniform picture: it never matches"
    draw = np.random.default_rng(int(digest[:8], 16))
    width, height = (max(1, round(side * 0.7**0.5)) for side in picture.size)
    left = int(draw.integers(0, picture.width - width + 1))
    top = int(draw.integers(0, picture.height - height + 1))
    cropped = picture.crop((left, top, left + width, top + height))
    cropped.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
    small = picture.copy()
    small.thumbnail((96, 96), Image.Resampling.BICUBIC)
    altered = [look_at(_jpeg(cropped, 50), size), look_at(_jpeg(small, 30), size)]
    return digest, [whole, *altered]


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _best(
    identifier: Identifier, closeups: Sequence[Closeup], pool: ProcessPoolExecutor
) -> list[tuple[str, float]]:
    """The item with the highest joint score for each closeup, and that score."""
    found: list[list[Candidate]] = []
    for start in range(0, len(closeups), 32):
        found += identifier.candidates(closeups[start : start + 32])
    marks = [closeup.landmarks for closeup in closeups]
    return list(pool.map(_highest, marks, found, chunksize=4))


def _highest(query: Landmarks, candidates: Sequence[Candidate]) -> tuple[str, float]:
    best = candidates[0].item if candidates else "", 0.0
    for candidate in candidates:
        if joint_score(candidate.similarity, 1.0) <= best[1]:
            break  # they come in falling order: no later one can be higher
        item = Landmarks.from_bytes(candidate.landmarks)
        score = joint_score(candidate.similarity, agreement(query, item))
        best = max(best, (candidate.item, score), key=lambda b: b[1])
    return best
