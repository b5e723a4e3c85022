"""A threshold with a promise: at most this share of decoys match, with its interval.

Intervals are bootstrapped by source picture, because samples of one picture are not
independent, and are no narrower than what is known of so few pictures allows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pic_daemon.errors import InputError

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A share in [0, 1] of `of` samples with its 95% interval; None where `of` is 0."""

    value: float | None
    low: float
    high: float
    of: int


def supported_rate(decoys: int) -> float:
    """The lowest false positive rate that `decoys` samples can promise: 3 / n.

    The rule of three: none among n leaves up to 3 / n possible at 95% confidence
    (Hanley and Lippman-Hand 1983).
    """
    return 3 / max(1, decoys)


def check_support(decoys: int, target: float, remedy: str) -> None:
    """Raise InputError where `decoys` samples cannot promise `target`."""
    best, needed = supported_rate(decoys), math.ceil(3 / target)
    if target < best:
        shown = min(1.0, best)
        raise InputError(
            f"{decoys} decoy samples can promise a false positive rate of {shown:.2g} at "
            f"best (3 / n), not {target:.2g}, which takes {needed}: {remedy}."
        )


def about_support(decoys: int, samples: int, target: float) -> str | None:
    """A sentence where so many different decoys support less than their samples do."""
    of_pictures = min(1.0, supported_rate(decoys))
    if of_pictures <= target:
        return None
    return (
        f"the threshold is chosen on {decoys} decoys, {samples} samples of them: of other "
        f"pictures up to {of_pictures:.2g} may match (3 / n)"
    )


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


def rate(hits: Labels, sources: Sequence[int] | NDArray[np.int64]) -> Interval:
    """The share of samples that hit; `sources` numbers the picture that each is of."""
    _, number = np.unique(np.asarray(sources), return_inverse=True)
    counts = np.zeros((number.max(initial=-1) + 1, 2))
    np.add.at(counts, (number, np.where(hits, 0, 1)), 1)
    drawn = resample(counts, np.random.default_rng(0))
    shares = drawn[:, 0] / np.maximum(1, drawn.sum(axis=1))
    return interval(counts, shares)


def resample(counts: Floats, draw: np.random.Generator) -> Floats:
    """Sums over pictures drawn with replacement: shape (resamples, outcomes).

    `counts` of shape (pictures, outcomes) says how the samples of each picture went.
    """
    pictures = len(counts)
    if pictures == 0:
        return np.zeros((_RESAMPLES, counts.shape[1]))
    even = np.full(pictures, 1 / pictures)
    # One by one: all at once would be a thousand numbers for each picture.
    return np.stack([draw.multinomial(pictures, even) @ counts for _ in range(_RESAMPLES)])


def interval(counts: Floats, resampled: Floats) -> Interval:
    """A share of samples with what `resampled` shares, shape (resamples,), say of it.

    `counts` of shape (pictures, 2) has the samples of each that are good, and that are not.
    """
    counts = counts[counts.sum(axis=1) > 0]
    pictures, of = len(counts), int(counts.sum())
    if of == 0:
        return Interval(None, 0.0, 1.0, 0)
    good, bad = counts.sum(axis=0) / of
    if pictures == 1:  # it resamples to itself, and says nothing of another
        return Interval(float(good), 0.0, 1.0, of)
    low, high = np.quantile(resampled, [0.025, 0.975])
    # A share of 0 or 1 resamples to itself, and one of few pictures to next to it.
    with_good, with_bad = (counts > 0).sum(axis=0)
    high = max(high, _possible(good, int(with_good), pictures))
    low = min(low, 1 - _possible(bad, int(with_bad), pictures))
    return Interval(float(good), max(0.0, float(low)), min(1.0, float(high)), of)


def _possible(share: float, some: int, pictures: int) -> float:
    """The highest share that samples may have, where `some` of their pictures have any.

    None promise no better than 3 / n, over pictures rather than their samples; of others
    the share of pictures is bounded by Wilson (1927), at 95%.
    """
    if not some:
        return supported_rate(pictures)
    p, z = some / pictures, 1.96
    spread = z * math.sqrt(p * (1 - p) / pictures + (z / pictures / 2) ** 2)
    bound = (p + z**2 / pictures / 2 + spread) / (1 + z**2 / pictures)
    return max(supported_rate(pictures), share * bound / p)
