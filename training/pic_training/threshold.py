"""From logits to a decision with a promise: temperature, threshold, intervals.

The threshold is chosen on one half of the validation pictures (calibration) for a
target false positive rate; every figure that is reported comes from the other half
(test), with intervals that are bootstrapped by source picture, because samples of
one picture are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pic_daemon.errors import InputError

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]

_RESAMPLES = 1000
_BINS = 15


@dataclass(frozen=True)
class Interval:
    """A share in [0, 1] of `of` samples with its 95% interval; None where `of` is 0."""

    value: float | None
    low: float
    high: float
    of: int


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


def supported_rate(decoys: int) -> float:
    """The lowest false positive rate that `decoys` samples can promise: 3 / n.

    The rule of three: none among n leaves up to 3 / n possible at 95% confidence
    (Hanley and Lippman-Hand 1983).
    """
    return 3 / max(1, decoys)


def check_support(decoys: int, target: float, remedy: str) -> None:
    """Raise InputError where `decoys` samples cannot promise `target`."""
    best = supported_rate(decoys)
    if target < best:
        raise InputError(
            f"{decoys} decoy samples can promise a false positive rate of {best:.2g} at "
            f"best (3 / n), not {target:.2g}: {remedy}."
        )


def sigmoid(logits: Floats) -> Floats:
    """Probabilities in (0, 1) for logits of any shape."""
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -700, 700))))


def log_loss(logits: Floats, labels: Labels) -> float:
    """Mean binary cross-entropy in nats; `logits` and `labels` of shape (N,)."""
    signed = np.where(labels, logits, -logits)
    return float(np.logaddexp(0, -signed).mean())


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The divisor of the logits that makes their log loss least (Guo et al. 2017).

    Searched between 1/20 and 20; ranking and so recall at a rate stay as they are.
    """
    low, high = np.log(1 / 20), np.log(20)
    for _ in range(4):  # the loss is convex in 1 / T: narrow a grid around its least
        grid = np.linspace(low, high, 21)
        losses = [log_loss(logits / np.exp(point), labels) for point in grid]
        best = int(np.argmin(losses))
        low, high = grid[max(0, best - 1)], grid[min(20, best + 1)]
    return float(np.exp((low + high) / 2))


def calibration_error(probabilities: Floats, labels: Labels) -> float:
    """Expected calibration error over 15 equal bins, in [0, 1] (Guo et al. 2017)."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    predicted = np.bincount(bins, probabilities, _BINS)
    actual = np.bincount(bins, labels.astype(float), _BINS)
    return float(np.abs(predicted - actual).sum() / max(1, counts.sum()))


def threshold_for(scores: Floats, labels: Labels, target: float) -> float:
    """The lowest threshold at which at most the share `target` of decoys match.

    `scores` of shape (N,), on any scale; a score at or above the threshold matches.
    The threshold lies midway between the last decoy let in and the next score below
    it that is shut out, so that nothing hangs on a rounding.
    """
    decoys = np.sort(scores[~labels])[::-1]
    allowed = int(np.floor(target * len(decoys)))
    if allowed >= len(decoys):
        return float(scores.min())
    shut_out = float(decoys[allowed])
    above = scores[scores > shut_out]
    return (shut_out + float(above.min())) / 2 if len(above) else shut_out + 1e-6


def confusion(scores: Floats, labels: Labels, sources: Sequence[int] | NDArray[np.int64],
              threshold: float, seed: int = 0) -> Confusion:  # fmt: skip
    """Decisions at `threshold`, with intervals bootstrapped by source.

    `sources` of shape (N,) numbers the picture that each sample was made from.
    """
    predicted = scores >= threshold
    outcome = np.where(labels, np.where(predicted, 0, 2), np.where(predicted, 1, 3))
    _, number = np.unique(np.asarray(sources), return_inverse=True)
    counts = np.zeros((number.max(initial=-1) + 1, 4))
    np.add.at(counts, (number, outcome), 1)
    is_catalog = counts[:, [0, 2]].sum(axis=1) > 0
    draw = np.random.default_rng(seed)
    resampled = _resample(counts[is_catalog], draw) + _resample(counts[~is_catalog], draw)
    tp, fp, fn, tn = (int(n) for n in counts.sum(axis=0))

    def share(good: list[int], of: list[int]) -> Interval:
        total = counts.sum(axis=0)
        return _interval(
            int(total[good].sum()),
            int(total[of].sum()),
            int((counts[:, of].sum(axis=1) > 0).sum()),
            resampled[:, good].sum(axis=1) / np.maximum(1, resampled[:, of].sum(axis=1)),
        )

    return Confusion(
        tp, fp, fn, tn,
        accuracy=share([0, 3], [0, 1, 2, 3]),
        precision=share([0], [0, 1]),
        recall=share([0], [0, 2]),
        false_positive_rate=share([1], [1, 3]),
    )  # fmt: skip


def _resample(counts: Floats, draw: np.random.Generator) -> Floats:
    """Sums over pictures drawn with replacement: shape (resamples, outcomes)."""
    pictures = len(counts)
    if pictures == 0:
        return np.zeros((_RESAMPLES, counts.shape[1]))
    weights = draw.multinomial(pictures, np.full(pictures, 1 / pictures), _RESAMPLES)
    return np.asarray(weights @ counts)


def _interval(good: int, of: int, pictures: int, resampled: Floats) -> Interval:
    if of == 0:
        return Interval(None, 0.0, 1.0, 0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    # A share of exactly 0 or 1 resamples to itself: the rule of three, over pictures
    # rather than their samples, keeps it honest.
    if good == 0:
        high = max(high, supported_rate(pictures))
    if good == of:
        low = min(low, 1 - supported_rate(pictures))
    return Interval(good / of, max(0.0, float(low)), min(1.0, float(high)), of)
