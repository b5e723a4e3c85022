"""What a model is worth: two protocols, beside the perceptual hashes, in one run.

Published: fresh augmentations of the catalog against general pictures, balanced, at
a score of one half. Hard: recall at a fixed false positive rate against look-alikes,
edit by edit. The look-alikes are split by group of near-duplicates: the threshold of
each method is chosen on one half of them, and every figure comes from the other.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.images import decode, open_rgb
from pic_daemon.model import Model
from pic_daemon.promise import threshold_for
from pic_training.augmentation import Augmentation, augment
from pic_training.edits import EDITS
from pic_training.peers import Bits, peers, similarity
from pic_training.sources import Source, Sources
from pic_training.threshold import Confusion, confusion

OURS = "model"
_AUGMENTED = -1  # in place of an edit's number: the training augmentation
_CHUNK = 64

_Job = tuple["Sample", Source, Path, int, int]
_Features = tuple[NDArray[np.uint8], bool, list[Bits | None]]


@dataclass(frozen=True)
class Sample:
    """A picture, by its position among the sources, and what is done to it.

    `edit` is a position in EDITS, or -1 for the training augmentation.
    """

    picture: int
    edit: int
    number: int


@dataclass(frozen=True)
class Scored:
    """Samples of one part of the evaluation with every method's scores, shape (N,)."""

    samples: list[Sample]
    scores: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class MethodResult:
    """How one method did at the target rate; `per_edit` is by position in EDITS.

    `overall` counts all edits together. `unaltered_decoys_rate` and the pristine edit
    show that alteration itself is not what is recognised.
    """

    threshold: float
    calibration_rate: float
    overall: Confusion
    trained: Confusion
    held_out: Confusion
    per_edit: list[Confusion]


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; the arrays serve the plots."""

    target_fpr: float
    published: Confusion
    published_at_threshold: Confusion
    own_threshold: Confusion
    methods: dict[str, MethodResult]
    positives: Scored
    decoys: Scored
    counts: dict[str, int]
    sources: Sources = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """How much is evaluated; the seed decides every draw."""

    target_fpr: float = 0.001
    per_edit: int = 200
    per_decoy: int = 15
    published: int = 4000
    seed: int = 0


def evaluate(
    model: Model,
    sources: Sources,
    is_general: Callable[[Source], bool],
    plan: Plan,
    show: Callable[[int], None],
) -> Evaluation:
    """Score `model` and the hashes on the catalog and the other pictures of `sources`.

    None of the other pictures may have been trained on. `show` is told how many
    samples are done.
    """
    draw = np.random.default_rng(plan.seed)
    pictures = sources.pictures
    catalog = [n for n, p in enumerate(pictures) if p.kind == "catalog"]
    others = [n for n, p in enumerate(pictures) if p.kind == "other"]
    general = [n for n in others if is_general(pictures[n])] or others
    alike = [n for n in others if not is_general(pictures[n])] or others
    calibration, test = _halves(alike, sources)

    augmented = [
        Sample(int(draw.choice(group)), _AUGMENTED, number)
        for number in range(plan.published // 2)
        for group in (catalog, general)
    ]
    parts = [
        _per_edit(catalog, plan.per_edit, draw),
        _mixed(calibration, plan.per_decoy, draw),
        _mixed(test, plan.per_decoy, draw),
        augmented,
    ]
    # Not forked: this process holds onnxruntime's threads.
    with multiprocessing.get_context("forkserver").Pool(os.cpu_count()) as pool:
        scorer = _Scorer(pool, model, sources, catalog, plan.seed, show)
        positives, calibrating, decoys, published = map(scorer.score, parts)
    is_ours = np.array([s.picture in set(catalog) for s in published.samples])
    drawn_from = np.array([s.picture for s in published.samples])
    ours = published.scores[OURS]
    threshold = model.info.threshold
    return Evaluation(
        target_fpr=plan.target_fpr,
        published=confusion(ours, is_ours, drawn_from, 0.5),
        published_at_threshold=confusion(ours, is_ours, drawn_from, threshold),
        own_threshold=_compare(OURS, positives, decoys, threshold),
        methods={
            name: _at_target(name, positives, calibrating, decoys, plan.target_fpr)
            for name in positives.scores
        },
        positives=positives,
        decoys=decoys,
        counts={
            "catalog pictures": len(catalog),
            "look-alike pictures to calibrate": len(calibration),
            "look-alike pictures to test": len(test),
            "calibration decoy samples": len(calibrating.samples),
            "test decoy samples": len(decoys.samples),
            "test catalog samples": len(positives.samples),
            "general pictures": len(general),
            "published-protocol samples": len(published.samples),
        },
        sources=sources,
    )


def sample_file(sample: Sample, source: Source, file: Path, seed: int) -> bytes:
    """The edited file of a sample, the same every time."""
    data = np.memmap(file, np.uint8, "r")
    shape = (source.height, source.width, 3)
    pixels = data[source.offset : source.offset + int(np.prod(shape))].reshape(shape)
    draw = np.random.default_rng([seed, sample.picture, sample.edit + 1, sample.number])
    image = Image.fromarray(pixels)
    if sample.edit == _AUGMENTED:
        return augment(image, draw, Augmentation())
    return EDITS[sample.edit].apply(image, draw)


def _halves(pictures: Sequence[int], sources: Sources) -> tuple[list[int], list[int]]:
    groups = sorted({sources.pictures[n].group for n in pictures})
    tested = set(groups[1::2])
    test = [n for n in pictures if sources.pictures[n].group in tested]
    return [n for n in pictures if sources.pictures[n].group not in tested], test


def _per_edit(pictures: list[int], count: int, draw: np.random.Generator) -> list[Sample]:
    count = min(count, len(pictures))
    return [
        Sample(int(picture), edit, 0)
        for edit in range(len(EDITS))
        for picture in draw.choice(pictures, count, replace=False)
    ]


def _mixed(pictures: list[int], count: int, draw: np.random.Generator) -> list[Sample]:
    """Each picture under `count` different edits: decoys meet what copies meet."""
    count = min(count, len(EDITS))
    return [
        Sample(picture, int(edit), 0)
        for picture in pictures
        for edit in draw.choice(len(EDITS), count, replace=False)
    ]


class _Scorer:
    """Turns samples into every method's scores."""

    def __init__(
        self,
        pool: Pool,
        model: Model,
        sources: Sources,
        catalog: Sequence[int],
        seed: int,
        show: Callable[[int], None],
    ) -> None:
        self._pool = pool
        self._model = model
        self._sources = sources
        self._seed = seed
        self._show = show
        self._names = [peer.name for peer in peers()]
        known = self._features([Sample(n, 0, 0) for n in catalog])
        self._known = list(zip(*(bits for _, _, bits in known), strict=True))

    def score(self, samples: list[Sample]) -> Scored:
        ours: list[float] = []
        blank: list[bool] = []
        hashes: list[list[Bits | None]] = []
        features = self._features(samples)
        while chunk := list(islice(features, _CHUNK)):
            ours += self._model.score(np.stack([pixels for pixels, _, _ in chunk])).tolist()
            blank += [is_blank for _, is_blank, _ in chunk]
            hashes += [bits for _, _, bits in chunk]
            self._show(len(chunk))
        scores = {OURS: np.array(ours)}
        columns = zip(*hashes, strict=True)
        for name, column, known in zip(self._names, columns, self._known, strict=True):
            scores[name] = similarity(column, known)
        for values in scores.values():
            values[np.array(blank)] = 0.0  # a blank picture never matches, by any method
        return Scored(samples, scores)

    def _features(self, samples: list[Sample]) -> Iterator[_Features]:
        pictures, size = self._sources.pictures, self._model.info.input_size
        jobs = [
            (s, pictures[s.picture], self._sources.file, self._seed, size) for s in samples
        ]
        return self._pool.imap(_features, jobs, chunksize=_CHUNK)


def _features(job: _Job) -> _Features:
    sample, source, file, seed, size = job
    data = sample_file(sample, source, file, seed)
    image, _ = open_rgb(data, 256)
    decoded = decode(data, size)
    return decoded.pixels, decoded.blank, [peer.hash(image) for peer in peers()]


def _at_target(
    name: str, positives: Scored, calibrating: Scored, decoys: Scored, target: float
) -> MethodResult:
    calibration = calibrating.scores[name]
    threshold = threshold_for(calibration, np.zeros(len(calibration), bool), target)
    trained = np.array([EDITS[s.edit].trained for s in positives.samples])

    def only(chosen: NDArray[np.bool_]) -> Confusion:
        return _compare(name, _subset(positives, chosen), decoys, threshold)

    return MethodResult(
        threshold=threshold,
        calibration_rate=float((calibration >= threshold).mean()),
        overall=_compare(name, positives, decoys, threshold),
        trained=only(trained),
        held_out=only(~trained),
        per_edit=[
            only(np.array([s.edit == n for s in positives.samples]))
            for n in range(len(EDITS))
        ],
    )


def _subset(scored: Scored, chosen: NDArray[np.bool_]) -> Scored:
    kept = [s for s, keep in zip(scored.samples, chosen, strict=True) if keep]
    return Scored(kept, {name: values[chosen] for name, values in scored.scores.items()})


def _compare(name: str, positives: Scored, decoys: Scored, threshold: float) -> Confusion:
    scores = np.concatenate([positives.scores[name], decoys.scores[name]])
    labels = np.arange(len(scores)) < len(positives.samples)
    pictures = np.array([s.picture for s in (*positives.samples, *decoys.samples)])
    return confusion(scores, labels, pictures, threshold)
