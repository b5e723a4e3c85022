"""What a model, or model, descriptor and index, are worth: two protocols, beside the
perceptual hashes, in one run.

Published: fresh augmentations of the catalog against general pictures, balanced, at
a score of one half. Hard: recall at a fixed false positive rate against look-alikes,
edit by edit. The look-alikes are split by group of near-duplicates: the threshold of
each method is chosen on one half of them, and every figure comes from the other. `named`
is the share of copies whose catalog item a method puts first, whatever its score.
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

from pic_daemon.cascade import Identifier
from pic_daemon.confirmation import Landmarks, agreement
from pic_daemon.identification import Closeup, identify, look_at
from pic_daemon.images import Pixels, decode, open_rgb
from pic_daemon.model import Model
from pic_daemon.promise import threshold_for
from pic_training.augmentation import Augmentation, augment
from pic_training.edits import EDITS
from pic_training.peers import Bits, nearest, peers
from pic_training.sources import Source, Sources
from pic_training.threshold import Confusion, confusion

OURS = "model"
DESCRIPTOR = "descriptor"
CASCADE = "cascade"
_AUGMENTED = -1  # in place of an edit's number: the training augmentation
_CHUNK = 64

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
class Scored:
    """Samples of one part of the evaluation with every method's scores, shape (N,).

    `named`: whether a method that names items puts the sample's own picture first.
    """

    samples: list[Sample]
    scores: dict[str, NDArray[np.float64]]
    named: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class MethodResult:
    """How one method did at the target rate; `per_edit` is by position in EDITS.

    `overall` counts all edits together. `named` and `named_per_edit` are shares of the
    copies, None where the method names no item.
    """

    threshold: float
    calibration_rate: float
    overall: Confusion
    trained: Confusion
    held_out: Confusion
    per_edit: list[Confusion]
    named: dict[str, float] | None
    named_per_edit: list[float] | None


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
    identifier: Identifier | None = None,
) -> Evaluation:
    """Score `model` and the hashes on the catalog and the other pictures of `sources`.

    None of the other pictures may have been trained on. With an `identifier` its
    descriptor alone (the nearest item's cosine) and the whole cascade are scored too.
    `show` is told how many samples are done.
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
        scorer = _Scorer(pool, model, identifier, sources, catalog, plan.seed, show)
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
        blank: list[bool] = []
        hashes: list[list[Bits | None]] = []
        found: list[tuple[float, float, str]] = []
        features = self._features(samples)
        while chunk := list(islice(features, _CHUNK)):
            ours += self._model.score(np.stack([one.pixels for one in chunk])).tolist()
            blank += [one.blank for one in chunk]
            hashes += [one.hashes for one in chunk]
            if self._identifier:
                closeups = [one.closeup for one in chunk if one.closeup]
                found += self._identified(self._identifier, closeups)
            self._show(len(chunk))
        scores = {OURS: np.array(ours)}
        named: dict[str, NDArray[np.bool_]] = {}
        pictures = np.array([sample.picture for sample in samples])
        columns = zip(*hashes, strict=True)
        for name, column, known in zip(self._names, columns, self._known, strict=True):
            scores[name], places = nearest(column, known)
            named[name] = (places >= 0) & (self._catalog[places] == pictures)
        if self._identifier:
            scores[DESCRIPTOR] = np.array([max(0.0, cosine) for cosine, _, _ in found])
            passed = scores[OURS] >= self._model.info.gate_threshold
            scores[CASCADE] = np.where(passed, [joint for _, joint, _ in found], 0.0)
            names = [self._sources.pictures[n].path for n in pictures]
            right = [
                bool(item) and path.endswith(f"/{item}")
                for path, (_, _, item) in zip(names, found, strict=True)
            ]
            named[CASCADE] = np.array(right)
        for values in scores.values():
            values[np.array(blank)] = 0.0
        return Scored(samples, scores, named)

    def _identified(
        self, identifier: Identifier, closeups: Sequence[Closeup]
    ) -> list[tuple[float, float, str]]:
        """The nearest item's cosine, the joint score and the item that has it."""
        candidates = identifier.candidates(closeups)
        pairs = [
            (one.landmarks, [c.landmarks for c in near])
            for one, near in zip(closeups, candidates, strict=True)
        ]
        agreed = self._pool.map(_agreed, pairs, chunksize=4)
        found = []
        for near, values in zip(candidates, agreed, strict=True):
            if near:
                best = identify(near, values, identifier.threshold)
                found.append((near[0].similarity, best.score, best.item))
            else:
                found.append((0.0, 0.0, ""))
        return found

    def _features(self, samples: list[Sample]) -> Iterator[_Features]:
        pictures, size = self._sources.pictures, self._model.info.input_size
        closer = self._identifier.descriptor.info.input_size if self._identifier else None
        jobs = [
            (s, pictures[s.picture], self._sources.file, self._seed, size, closer)
            for s in samples
        ]
        return self._pool.imap(_features, jobs, chunksize=_CHUNK)


def _features(job: _Job) -> _Features:
    sample, source, file, seed, size, closer = job
    data = sample_file(sample, source, file, seed)
    image, _ = open_rgb(data, 256)
    decoded = decode(data, size)
    closeup = look_at(data, closer) if closer else None
    hashes = [peer.hash(image) for peer in peers()]
    return _Features(decoded.pixels, decoded.blank, hashes, closeup)


def _agreed(pair: tuple[Landmarks, list[bytes]]) -> list[float]:
    query, items = pair
    return [agreement(query, Landmarks.from_bytes(item)) for item in items]


def _at_target(
    name: str, positives: Scored, calibrating: Scored, decoys: Scored, target: float
) -> MethodResult:
    calibration = calibrating.scores[name]
    threshold = threshold_for(calibration, np.zeros(len(calibration), bool), target)
    trained = np.array([EDITS[s.edit].trained for s in positives.samples])

    def only(chosen: NDArray[np.bool_]) -> Confusion:
        return _compare(name, _subset(positives, chosen), decoys, threshold)

    named = positives.named.get(name)
    by_edit = [
        np.array([s.edit == n for s in positives.samples]) for n in range(len(EDITS))
    ]
    return MethodResult(
        threshold=threshold,
        calibration_rate=float((calibration >= threshold).mean()),
        overall=_compare(name, positives, decoys, threshold),
        trained=only(trained),
        held_out=only(~trained),
        per_edit=[only(chosen) for chosen in by_edit],
        named=None
        if named is None
        else {
            "trained": float(named[trained].mean()),
            "held_out": float(named[~trained].mean()),
        },
        named_per_edit=None
        if named is None
        else [float(named[chosen].mean()) for chosen in by_edit],
    )


def _subset(scored: Scored, chosen: NDArray[np.bool_]) -> Scored:
    kept = [s for s, keep in zip(scored.samples, chosen, strict=True) if keep]
    scores = {name: values[chosen] for name, values in scored.scores.items()}
    named = {name: right[chosen] for name, right in scored.named.items()}
    return Scored(kept, scores, named)


def _compare(name: str, positives: Scored, decoys: Scored, threshold: float) -> Confusion:
    scores = np.concatenate([positives.scores[name], decoys.scores[name]])
    labels = np.arange(len(scores)) < len(positives.samples)
    pictures = np.array([s.picture for s in (*positives.samples, *decoys.samples)])
    return confusion(scores, labels, pictures, threshold)
