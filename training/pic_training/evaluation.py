"""What a model, or model, descriptor and index, are worth: two protocols, beside the
perceptual hashes, in one run.

Published: fresh augmentations of the catalog against general pictures, balanced, at
a score of one half. Hard: recall at a fixed false positive rate against look-alikes,
edit by edit. The look-alikes are split by group of near-duplicates: the threshold of
each method is chosen on one half of them, and every figure comes from the other. `named`
is the share of copies whose catalog item a method puts first, whatever its score.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pic_daemon.cascade import Identifier
from pic_daemon.indexing import workers
from pic_daemon.model import Model
from pic_daemon.promise import threshold_for
from pic_training.edits import EDITS
from pic_training.evaluation_scores import (
    AUGMENTED,
    CASCADE,
    OURS,
    UNGATED,
    Sample,
    Scored,
    Scorer,
)
from pic_training.sources import Source, Sources, test_half
from pic_training.threshold import Confusion, confusion


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
    """The hard protocol: scores of the copies and of both halves of the look-alikes.

    `groups` numbers the group of near-duplicates that each of all pictures belongs to.
    """

    positives: Scored
    calibrating: Scored
    decoys: Scored
    groups: NDArray[np.int64]

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
            return self._compare(name, self.positives.only(chosen), threshold)

        named = self.positives.named.get(name)
        return MethodResult(
            threshold=threshold,
            calibration_rate=float((self.calibrating.scores[name] >= threshold).mean()),
            overall=self._compare(name, self.positives, threshold),
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

    def _compare(self, name: str, positives: Scored, threshold: float) -> Confusion:
        scores = np.concatenate([positives.scores[name], self.decoys.scores[name]])
        labels = np.arange(len(scores)) < len(positives.samples)
        drawn = np.array([s.picture for s in (*positives.samples, *self.decoys.samples)])
        return confusion(scores, labels, self.groups[drawn], threshold)


@dataclass(frozen=True)
class Plan:
    """How much is evaluated; the seed decides every draw. `gate_threshold` is the score
    from which on the cascade decides, None for the model's."""

    target_fpr: float = 0.001
    per_edit: int = 200
    per_decoy: int = 15
    published: int = 4000
    seed: int = 0
    gate_threshold: float | None = None


@dataclass(frozen=True)
class Drawn:
    """What a plan asks of some sources: pictures, by their positions, and samples of them.

    Of the look-alikes `calibration` are the pictures that the thresholds are chosen on, by
    the samples `calibrating`, and `test` those that measure, by `decoys`.
    """

    catalog: list[int]
    general: list[int]
    calibration: list[int]
    test: list[int]
    copies: list[Sample]
    calibrating: list[Sample]
    decoys: list[Sample]
    published: list[Sample]

    @property
    def parts(self) -> tuple[list[Sample], ...]:
        """The samples in the order in which they are scored."""
        return self.copies, self.calibrating, self.decoys, self.published


@dataclass(frozen=True)
class Evaluation:
    """Everything measured; `hard` holds the scores for plots and further questions.

    `methods`: each at the target rate. `own`: the model, and the cascade where there is
    one, at the thresholds stored in their files, by which they decide when served. The
    cascade is also measured with everything let through by the model.
    """

    plan: Plan
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


def drawn(sources: Sources, is_general: Callable[[Source], bool], plan: Plan) -> Drawn:
    """What `plan` asks of the catalog and the other pictures of `sources`.

    Whole groups of near-duplicates calibrate or test. Where none of the other pictures is
    general, the published protocol is asked against the look-alikes as well.
    """
    draw = np.random.default_rng(plan.seed)
    pictures = sources.pictures
    catalog = [n for n, p in enumerate(pictures) if p.kind == "catalog"]
    others = [n for n, p in enumerate(pictures) if p.kind == "other"]
    general = [n for n in others if is_general(pictures[n])]
    alike = [n for n in others if not is_general(pictures[n])]
    tested = test_half(pictures[n] for n in alike)
    calibration = [n for n in alike if pictures[n].group not in tested]
    test = [n for n in alike if pictures[n].group in tested]
    published = [
        Sample(int(draw.choice(group)), AUGMENTED, number)
        for number in range(plan.published // 2)
        for group in (catalog, general or alike)
    ]
    return Drawn(
        catalog,
        general,
        calibration,
        test,
        copies=_per_edit(catalog, plan.per_edit, draw),
        calibrating=_mixed(calibration, plan.per_decoy, draw),
        decoys=_mixed(test, plan.per_decoy, draw),
        published=published,
    )


def evaluate(
    model: Model,
    sources: Sources,
    plan: Plan,
    samples: Drawn,
    show: Callable[[int], None],
    identifier: Identifier | None = None,
) -> Evaluation:
    """Score `model` and the hashes on what `plan` asks of `sources`.

    None of the other pictures may have been trained on. With an `identifier` its descriptor
    alone (the nearest item's cosine) and the whole cascade are scored too. `show` is told
    how many samples are done.
    """
    if plan.gate_threshold is not None:
        info = replace(model.info, gate_threshold=plan.gate_threshold)
        model = replace(model, info=info)
    catalog = samples.catalog
    # The module of its tasks imports PyTorch: for each process 1.8 s and 300 MB.
    with workers(Scorer.__module__) as pool:
        scorer = Scorer(pool, model, identifier, sources, catalog, plan.seed, show)
        copies, calibrating, decoys, published = map(scorer.score, samples.parts)
    drawn_from = np.array([s.picture for s in published.samples])
    is_ours = np.isin(drawn_from, catalog)
    ours = published.scores[OURS]
    groups = sources.groups()
    hard = Hard(copies, calibrating, decoys, groups)
    thresholds = {OURS: model.info.threshold}
    if identifier:
        thresholds[UNGATED] = thresholds[CASCADE] = identifier.threshold
    return Evaluation(
        plan=plan,
        published=confusion(ours, is_ours, groups[drawn_from], 0.5),
        published_at_threshold=confusion(
            ours, is_ours, groups[drawn_from], thresholds[OURS]
        ),
        methods={
            name: hard.at_rate(name, plan.target_fpr) for name in hard.positives.scores
        },
        own={name: hard.at_threshold(name, value) for name, value in thresholds.items()},
        hard=hard,
        counts={
            "catalog pictures": len(catalog),
            "look-alike pictures to calibrate": len(samples.calibration),
            "look-alike pictures to test": len(samples.test),
            "calibration decoy samples": len(samples.calibrating),
            "test decoy samples": len(samples.decoys),
            "test catalog samples": len(samples.copies),
            "general pictures": len(samples.general),
            "published-protocol samples": len(samples.published),
            "files left out": len(sources.left_out),
        },
        sources=sources,
    )


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
