"""From logits to a decision with a promise: calibration, threshold, intervals.

The threshold is chosen on one half of the validation samples (calibration) for a target
false positive rate: of the decoys whole groups of near-duplicates, of the catalog every
other sample of each picture. Every figure of a report but `at_one_half`, `top_1`, `loss`
and `likest_others` comes from the other half (test), with intervals that are bootstrapped
by source picture, because samples of one picture are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pic_daemon.promise import (
    Floats,
    Interval,
    Labels,
    interval,
    resample,
    supported_rate,
)
from pic_training.logistic import logistic_regression

GATE_LOSS = 0.001
"""Share of the copies that the classifier, as a gate, may keep from the second stage.

Copies altered as it never saw are kept back many times as often: at 0.01 a gate trained at
full scale lost a tenth of them (bench/results/cascade.md).
"""

GATE_ROOM = 0.05
"""Share of the decoys that it lets through at least, which costs little time."""

_BINS = 15
_LEAST_SLOPE = 1e-3  # of a calibration, for logits of unit variance
_Logits = TypeVar("_Logits", Floats, torch.Tensor)


@dataclass(frozen=True)
class Confusion:
    """Decisions counted, and the shares that follow from them."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int
    accuracy: Interval
    precision: Interval
    recall: Interval
    false_positive_rate: Interval


@dataclass(frozen=True)
class Calibration:
    """What turns a network's logits into honest ones: `logits / temperature + bias`.

    The bias is there because a network knows the decoys it trained on: of those it never
    saw it takes too many for the catalog (`bench/results/published-protocol.md`). The
    temperature is positive, so ranking, and recall at a rate, stay as they are.
    """

    temperature: float
    bias: float

    def __call__(self, logits: _Logits) -> _Logits:
        """Calibrated logits, in the shape of `logits`."""
        return logits / self.temperature + self.bias


def sigmoid(logits: Floats) -> Floats:
    """Probabilities in (0, 1) for logits of any shape."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))


def log_loss(logits: Floats, labels: Labels) -> float:
    """Mean binary cross-entropy in nats; `logits` and `labels` of shape (N,)."""
    signed = np.where(labels, logits, -logits)
    return float(np.logaddexp(0, -signed).mean())


def fit_calibration(logits: Floats, labels: Labels) -> Calibration:
    """The calibration that makes the log loss of `logits`, shape (N,), least.

    Fitted to `labels` drawn a little towards one half, as Platt (1999) does, so that few
    samples, or samples told apart without an error, promise no certainty. Scores are those
    of a world where half of the pictures are the catalog's, whatever share of the samples
    is. A network whose logits tell nothing, or the opposite, keeps their order: every score
    is then about one half.
    """
    copies, others = int(labels.sum()), int((~labels).sum())
    certain = ((copies + 1) / (copies + 2), 1 / (others + 2))
    wanted = np.where(labels, *certain)
    fit = logistic_regression(torch.from_numpy(logits)[:, None], torch.from_numpy(wanted))
    slope, bias = fit.weight.item(), fit.bias.item()
    least = _LEAST_SLOPE / max(logits.std(), 1e-6)
    if slope < least:
        share = wanted.mean()
        slope, bias = least, np.log(share / (1 - share)) - least * logits.mean()
    share_of_copies = np.log((copies + 1) / (others + 1))
    return Calibration(float(1 / slope), float(bias - share_of_copies))


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Expected calibration error over 15 equal bins, in [0, 1] (Guo et al. 2017)."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    predicted = np.bincount(bins, probabilities, _BINS)
    actual = np.bincount(bins, labels.astype(float), _BINS)
    return float(np.abs(predicted - actual).sum() / max(1, counts.sum()))


def gate_for(scores: Floats, labels: Labels, threshold: float) -> float:
    """The score from which on a second stage, which names the product, is to decide.

    All but GATE_LOSS of the copies reach it (of a thousand or fewer, all but the worst),
    and GATE_ROOM of the decoys, and it is at most `threshold`. A network that is sure of
    copies altered as it learned is as sure that one altered otherwise is none: the gate
    turns away only as much as that saves time (bench/results/cascade.md).
    """
    of_copies = np.quantile(scores[labels], GATE_LOSS)
    of_decoys = np.quantile(scores[~labels], 1 - GATE_ROOM)
    return float(min(threshold, of_copies, of_decoys))


def confusion(scores: Floats, labels: Labels, sources: Sequence[int] | NDArray[np.int64],
              threshold: float) -> Confusion:  # fmt: skip
    """Decisions at `threshold`, with intervals bootstrapped by source.

    `sources` of shape (N,) numbers the picture that each sample was made from. What mixes
    the classes promises no more than what is known of each alone.
    """
    predicted = scores >= threshold
    outcome = np.where(labels, np.where(predicted, 0, 2), np.where(predicted, 1, 3))
    _, number = np.unique(np.asarray(sources), return_inverse=True)
    counts = np.zeros((number.max(initial=-1) + 1, 4))
    np.add.at(counts, (number, outcome), 1)
    is_catalog = counts[:, [0, 2]].sum(axis=1) > 0
    draw = np.random.default_rng(0)
    resampled = resample(counts[is_catalog], draw) + resample(counts[~is_catalog], draw)
    tp, fp, fn, tn = (int(n) for n in counts.sum(axis=0))

    def share(good: list[int], of: list[int]) -> Interval:
        rest = [column for column in of if column not in good]
        parted = np.stack([counts[:, part].sum(axis=1) for part in (good, rest)], axis=1)
        shares = resampled[:, good].sum(axis=1) / np.maximum(
            1, resampled[:, of].sum(axis=1)
        )
        return interval(parted, shares)

    false_positive_rate = share([1], [1, 3])
    # With no mistake at all the rule of three bounds each class by its own pictures; the
    # mistakes that stay possible are the most where all are of the class less known.
    unseen = max(
        samples / max(1, len(labels)) * min(1.0, supported_rate(int(pictures.sum())))
        for samples, pictures in ((tp + fn, is_catalog), (fp + tn, ~is_catalog))
    )
    let_in = false_positive_rate.high * (fp + tn)
    return Confusion(
        tp, fp, fn, tn,
        accuracy=_at_most(share([0, 3], [0, 1, 2, 3]), 1 - unseen),
        precision=_at_most(share([0], [0, 1]), tp / max(1, tp + let_in)),
        recall=share([0], [0, 2]),
        false_positive_rate=false_positive_rate,
    )  # fmt: skip


def _at_most(found: Interval, low: float) -> Interval:
    return replace(found, low=min(found.low, low))
