"""Edited pictures, and what every method of the evaluation makes of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.cascade import Identifier
from pic_daemon.identification import CANDIDATES, Closeup, agreements, joint_score, look_at
from pic_daemon.images import Pixels, decode, open_rgb
from pic_daemon.model import Model
from pic_training.augmentation import Augmentation, augment
from pic_training.edits import EDITS
from pic_training.peers import Bits, nearest, peers
from pic_training.sources import Source, Sources, pixels_of

OURS = "model"
DESCRIPTOR = "descriptor"
UNGATED = "cascade, no gate"
CASCADE = "cascade"
AUGMENTED = -1  # in place of an edit's number: the training augmentation
_CHUNK = 64
_SLICE = 32 * _CHUNK

_Row = list[tuple[float, float, str]]  # of one sample: cosine, agreement, item
_Job = tuple["Sample", Source, Path, int, int, int | None]


@dataclass(frozen=True)
class _Features:
    """What every method needs of one edited picture."""

    pixels: Pixels
    blank: bool
    hashes: list[Bits | None]
    closeup: Closeup | None


@dataclass(frozen=True)
class Sample:
    """A picture, by its position among the sources, and what is done to it.

    `edit` is a position in EDITS, or -1 for the training augmentation.
    """

    picture: int
    edit: int
    number: int


@dataclass(frozen=True)
class Proposed:
    """What the descriptor proposes for N samples, nearest first: shape (N, CANDIDATES).

    Cosines and agreements are float64, 0 where fewer are proposed; `items` are their
    names, '' there; `own` marks the picture that the sample was made from, and its
    near-duplicates.
    """

    cosines: NDArray[np.float64]
    agreements: NDArray[np.float64]
    items: NDArray[np.object_]
    own: NDArray[np.bool_]

    @property
    def joint(self) -> NDArray[np.float64]:
        """The joint scores that the service would decide by."""
        both = zip(self.cosines.flat, self.agreements.flat, strict=True)
        scores = [joint_score(cosine, agreed) for cosine, agreed in both]
        return np.array(scores).reshape(self.cosines.shape)

    @property
    def best(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where the greatest joint score of each sample is."""
        return np.arange(len(self.joint)), self.joint.argmax(axis=1)

    def only(self, chosen: NDArray[np.bool_]) -> "Proposed":
        """Those of some samples."""
        return Proposed(
            self.cosines[chosen], self.agreements[chosen], self.items[chosen],
            self.own[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """Samples of one part of the evaluation with every method's scores, shape (N,).

    `named`: whether a method that names items puts the sample's own picture, or a
    near-duplicate of it, first.
    """

    samples: list[Sample]
    scores: dict[str, NDArray[np.float64]]
    named: dict[str, NDArray[np.bool_]]
    proposed: Proposed | None

    def only(self, chosen: NDArray[np.bool_]) -> "Scored":
        """Some of the samples."""
        return Scored(
            [s for s, keep in zip(self.samples, chosen, strict=True) if keep],
            {name: values[chosen] for name, values in self.scores.items()},
            {name: right[chosen] for name, right in self.named.items()},
            self.proposed and self.proposed.only(chosen),
        )


def sample_file(sample: Sample, source: Source, file: Path, seed: int) -> bytes:
    """The edited file of a sample, the same every time."""
    draw = np.random.default_rng([seed, sample.picture, sample.edit + 1, sample.number])
    image = Image.fromarray(pixels_of(source, file))
    if sample.edit == AUGMENTED:
        return augment(image, draw, Augmentation())
    return EDITS[sample.edit].apply(image, draw)


class Scorer:
    """Turns samples into every method's scores."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        model: Model,
        identifier: Identifier | None,
        sources: Sources,
        catalog: Sequence[int],
        seed: int,
        show: Callable[[int], None],
    ) -> None:
        self._pool = pool
        self._model = model
        self._identifier = identifier
        self._sources = sources
        self._seed = seed
        self._show = show
        self._catalog = np.array(catalog)
        self._names = [peer.name for peer in peers()]
        known = self._features([Sample(n, 0, 0) for n in catalog])
        self._known = list(zip(*(found.hashes for found in known), strict=True))

    def score(self, samples: list[Sample]) -> Scored:
        """Every method's scores; a blank picture has none, whatever the method."""
        ours: list[float] = []
        passed: list[bool] = []
        blank: list[bool] = []
        hashes: list[list[Bits | None]] = []
        rows: list[_Row] = []
        features = self._features(samples)
        while chunk := list(islice(features, _CHUNK)):
            pixels = np.stack([one.pixels for one in chunk])
            ours += self._model.full_score(pixels).tolist()
            blank += [one.blank for one in chunk]
            hashes += [one.hashes for one in chunk]
            if self._identifier:
                closeups = [one.closeup for one in chunk if one.closeup]
                rows += self._identified(self._identifier, closeups)
                least = self._model.info.gate_threshold
                passed += (self._model.second_score(pixels, least) >= least).tolist()
            self._show(len(chunk))
        scores = {OURS: np.array(ours)}
        named: dict[str, NDArray[np.bool_]] = {}
        groups = self._sources.groups()
        own = groups[[sample.picture for sample in samples]]
        columns = zip(*hashes, strict=True)
        for name, column, known in zip(self._names, columns, self._known, strict=True):
            scores[name], places = nearest(column, known)
            named[name] = (places >= 0) & (groups[self._catalog[places]] == own)
        found = None
        if self._identifier:
            # By content: a file may have been renamed, or be there under two names.
            of = {p.sha256: groups[n] for n, p in enumerate(self._sources.pictures)}
            items = self._identifier.index.items.values()
            found = _proposed(rows, {i.name: of.get(i.sha256, -1) for i in items}, own)
            scores[DESCRIPTOR] = found.cosines[:, 0].copy()
            scores[UNGATED] = found.joint[found.best]
            scores[CASCADE] = np.where(passed, scores[UNGATED], 0.0)
            named[DESCRIPTOR] = found.own[:, 0]
            named[UNGATED] = named[CASCADE] = found.own[found.best]
        for values in scores.values():
            values[np.array(blank)] = 0.0
        return Scored(samples, scores, named, found)

    def _identified(
        self, identifier: Identifier, closeups: Sequence[Closeup]
    ) -> list[_Row]:
        candidates = identifier.candidates(closeups)
        marks = [closeup.landmarks for closeup in closeups]
        items = [[c.landmarks for c in near] for near in candidates]
        agreed = self._pool.map(agreements, marks, items, chunksize=4)
        return [
            [(c.similarity, value, c.item) for c, value in zip(near, values, strict=True)]
            for near, values in zip(candidates, agreed, strict=True)
        ]

    def _features(self, samples: list[Sample]) -> Iterator[_Features]:
        pictures, size = self._sources.pictures, self._model.info.input_size
        closer = self._identifier.descriptor.info.input_size if self._identifier else None
        jobs = [
            (s, pictures[s.picture], self._sources.file, self._seed, size, closer)
            for s in samples
        ]
        # In slices: all that is handed to the pool at once waits there in memory, and
        # keeps the comparisons of `_identified` waiting.
        for start in range(0, len(jobs), _SLICE):
            part = jobs[start : start + _SLICE]
            yield from self._pool.map(_features, part, chunksize=_CHUNK)


def _features(job: _Job) -> _Features:
    sample, source, file, seed, size, closer = job
    data = sample_file(sample, source, file, seed)
    image, _ = open_rgb(data, 256)
    decoded = decode(data, size)
    closeup = look_at(data, closer) if closer else None
    hashes = [peer.hash(image) for peer in peers()]
    return _Features(decoded.pixels, decoded.blank, hashes, closeup)


def _proposed(
    rows: Sequence[_Row], group_of: Mapping[str, int], groups: NDArray[np.int64]
) -> Proposed:
    padded = [[*row, *[(0.0, 0.0, "")] * (CANDIDATES - len(row))] for row in rows]
    cosines, agreements, items = (
        [[found[part] for found in row] for row in padded] for part in range(3)
    )
    own = [
        [group_of.get(str(item), -1) == group for item in row]
        for group, row in zip(groups, items, strict=True)
    ]
    return Proposed(
        np.maximum(0.0, np.array(cosines)),
        np.array(agreements),
        np.array(items, dtype=object),
        np.array(own),
    )
