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
import signal
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
from pic_daemon.identification import CANDIDATES, Closeup, joint_score, look_at
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
UNGATED = "cascade, no gate"
CASCADE = "cascade"
_AUGMENTED = -1  # in place of an edit's number: the training augmentation
_CHUNK = 64
_NO_INTERRUPT = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle

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
    names, '' there; `own` marks the picture that the sample was made from.
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

    `named`: whether a method that names items puts the sample's own picture first.
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


@dataclass(frozen=True)
class MethodResult:
    """How one method did at one threshold; `per_edit` is by position in EDITS.

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
class Hard:
    """The hard protocol: scores of the copies and of both halves of the look-alikes."""

    positives: Scored
    calibrating: Scored
    decoys: Scored

    def at_rate(self, name: str, target: float) -> MethodResult:
        """A method at the lowest threshold that lets `target` of one half in."""
        scores = self.calibrating.scores[name]
        nothing = np.zeros(len(scores), bool)
        return self.at_threshold(name, threshold_for(scores, nothing, target))

    def at_threshold(self, name: str, threshold: float) -> MethodResult:
        """A method at a threshold; the look-alikes are those of the other half."""
        trained = np.array([EDITS[s.edit].trained for s in self.positives.samples])
        by_edit = [
            np.array([s.edit == n for s in self.positives.samples])
            for n in range(len(EDITS))
        ]

        def only(chosen: NDArray[np.bool_]) -> Confusion:
            return _compare(name, self.positives.only(chosen), self.decoys, threshold)

        named = self.positives.named.get(name)
        return MethodResult(
            threshold=threshold,
            calibration_rate=float((self.calibrating.scores[name] >= threshold).mean()),
            overall=_compare(name, self.positives, self.decoys, threshold),
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


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; `hard` holds the scores for plots and further questions.

    `methods`: each at the target rate. `own`: the model, and the cascade where there is
    one, at the thresholds stored in their files, by which they decide when served. The
    cascade is also measured with everything let through by the model.
    """

    target_fpr: float
    published: Confusion
    published_at_threshold: Confusion
    methods: dict[str, MethodResult]
    own: dict[str, MethodResult]
    hard: Hard
    counts: dict[str, int]
    sources: Sources = field(repr=False)

    @property
    def decisive(self) -> str:
        """The method that has the last word when served."""
        return CASCADE if CASCADE in self.methods else OURS


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

    None of the other pictures may have been trained on. Where none of them is general, the
    published protocol is asked against the look-alikes as well. With an `identifier` its
    descriptor alone (the nearest item's cosine) and the whole cascade are scored too.
    `show` is told how many samples are done.
    """
    draw = np.random.default_rng(plan.seed)
    pictures = sources.pictures
    catalog = [n for n, p in enumerate(pictures) if p.kind == "catalog"]
    others = [n for n, p in enumerate(pictures) if p.kind == "other"]
    general = [n for n in others if is_general(pictures[n])]
    alike = [n for n in others if not is_general(pictures[n])]
    calibration, test = halves(alike, sources)

    augmented = [
        Sample(int(draw.choice(group)), _AUGMENTED, number)
        for number in range(plan.published // 2)
        for group in (catalog, general or alike)
    ]
    parts = [
        _per_edit(catalog, plan.per_edit, draw),
        _mixed(calibration, plan.per_decoy, draw),
        _mixed(test, plan.per_decoy, draw),
        augmented,
    ]
    # Not forked: this process holds onnxruntime's threads.
    context = multiprocessing.get_context("forkserver")
    with context.Pool(os.cpu_count(), signal.signal, _NO_INTERRUPT) as pool:
        scorer = _Scorer(pool, model, identifier, sources, catalog, plan.seed, show)
        *scored, published = map(scorer.score, parts)
    is_ours = np.array([s.picture in set(catalog) for s in published.samples])
    drawn_from = np.array([s.picture for s in published.samples])
    ours = published.scores[OURS]
    hard = Hard(*scored)
    thresholds = {OURS: model.info.threshold}
    if identifier:
        thresholds[UNGATED] = thresholds[CASCADE] = identifier.threshold
    return Evaluation(
        target_fpr=plan.target_fpr,
        published=confusion(ours, is_ours, drawn_from, 0.5),
        published_at_threshold=confusion(ours, is_ours, drawn_from, thresholds[OURS]),
        methods={
            name: hard.at_rate(name, plan.target_fpr) for name in hard.positives.scores
        },
        own={name: hard.at_threshold(name, value) for name, value in thresholds.items()},
        hard=hard,
        counts={
            "catalog pictures": len(catalog),
            "look-alike pictures to calibrate": len(calibration),
            "look-alike pictures to test": len(test),
            "calibration decoy samples": len(hard.calibrating.samples),
            "test decoy samples": len(hard.decoys.samples),
            "test catalog samples": len(hard.positives.samples),
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


def halves(pictures: Sequence[int], sources: Sources) -> tuple[list[int], list[int]]:
    """Pictures, by their positions, that calibrate and that test: whole groups each."""
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
        passed: list[bool] = []
        blank: list[bool] = []
        hashes: list[list[Bits | None]] = []
        rows: list[_Row] = []
        features = self._features(samples)
        while chunk := list(islice(features, _CHUNK)):
            pixels = np.stack([one.pixels for one in chunk])
            ours += self._model.score(pixels).tolist()
            blank += [one.blank for one in chunk]
            hashes += [one.hashes for one in chunk]
            if self._identifier:
                closeups = [one.closeup for one in chunk if one.closeup]
                rows += self._identified(self._identifier, closeups)
                least = self._model.info.gate_threshold
                passed += (self._model.gate_score(pixels, least) >= least).tolist()
            self._show(len(chunk))
        scores = {OURS: np.array(ours)}
        named: dict[str, NDArray[np.bool_]] = {}
        pictures = np.array([sample.picture for sample in samples])
        columns = zip(*hashes, strict=True)
        for name, column, known in zip(self._names, columns, self._known, strict=True):
            scores[name], places = nearest(column, known)
            named[name] = (places >= 0) & (self._catalog[places] == pictures)
        found = None
        if self._identifier:
            found = _proposed(rows, [self._sources.pictures[n].path for n in pictures])
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
        pairs = [
            (one.landmarks, [c.landmarks for c in near])
            for one, near in zip(closeups, candidates, strict=True)
        ]
        agreed = self._pool.map(_agreed, pairs, chunksize=4)
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
        return self._pool.imap(_features, jobs, chunksize=_CHUNK)


def _features(job: _Job) -> _Features:
    sample, source, file, seed, size, closer = job
    data = sample_file(sample, source, file, seed)
    image, _ = open_rgb(data, 256)
    decoded = decode(data, size)
    closeup = look_at(data, closer) if closer else None
    hashes = [peer.hash(image) for peer in peers()]
    return _Features(decoded.pixels, decoded.blank, hashes, closeup)


def _proposed(rows: Sequence[_Row], paths: Sequence[str]) -> Proposed:
    padded = [[*row, *[(0.0, 0.0, "")] * (CANDIDATES - len(row))] for row in rows]
    cosines, agreements, items = (
        [[found[part] for found in row] for row in padded] for part in range(3)
    )
    own = [
        [bool(item) and path.endswith(f"/{item}") for item in row]
        for path, row in zip(paths, items, strict=True)
    ]
    return Proposed(
        np.maximum(0.0, np.array(cosines)),
        np.array(agreements),
        np.array(items, dtype=object),
        np.array(own),
    )


def _agreed(pair: tuple[Landmarks, list[bytes]]) -> list[float]:
    query, items = pair
    return [agreement(query, Landmarks.from_bytes(item)) for item in items]


def _compare(name: str, positives: Scored, decoys: Scored, threshold: float) -> Confusion:
    scores = np.concatenate([positives.scores[name], decoys.scores[name]])
    labels = np.arange(len(scores)) < len(positives.samples)
    pictures = np.array([s.picture for s in (*positives.samples, *decoys.samples)])
    return confusion(scores, labels, pictures, threshold)
