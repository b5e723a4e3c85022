import math
from collections.abc import Callable

import numpy as np
import pytest

from pic_daemon.errors import InputError
from pic_daemon.promise import Floats, about_support, check_support, rate, threshold_for
from pic_training.threshold import (
    calibration_error,
    confusion,
    fit_calibration,
    gate_for,
    log_loss,
    sigmoid,
)


def simulated(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Logits that are honest probabilities of their labels."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, count)
    return logits, draw.random(count) < sigmoid(logits)


def test_the_threshold_lets_in_no_more_decoys_than_the_target() -> None:
    draw = np.random.default_rng(1)
    labels = np.arange(4000) % 2 == 1
    scores = draw.normal(labels * 2.0, 1)
    for target in (0.002, 0.01, 0.1):
        threshold = threshold_for(scores, labels, target)
        let_in = (scores[~labels] >= threshold).mean()
        assert let_in == pytest.approx(target)
        lower = scores[scores < threshold].max()
        assert (scores[~labels] >= lower).mean() > target or labels[scores == lower].all()


def test_decoys_with_equal_scores_are_shut_out_together() -> None:
    scores = np.array([0.1, 0.5, 0.5, 0.5, 0.9])
    labels = np.array([False, False, False, False, True])
    assert 0.5 < threshold_for(scores, labels, 0.3) <= 0.9


def test_a_rate_that_the_decoys_cannot_promise_is_refused() -> None:
    check_support(3000, 0.001, "")
    with pytest.raises(
        InputError, match=r"1000 decoy samples can promise .* 0\.003 at best"
    ):
        check_support(1000, 0.001, "use more")


def test_few_decoys_in_many_samples_are_told_and_promise_no_more_than_all() -> None:
    assert about_support(300, 900, 0.01) is None
    told = about_support(100, 300, 0.01)
    assert told and "100 decoys, 300 samples of them: of other pictures up to 0.03" in told
    few = about_support(2, 6, 0.5)
    assert few and "up to 1 may match" in few
    assert about_support(2, 6, 1.0) is None


def test_a_calibrated_score_of_one_half_is_an_even_chance_whatever_was_sampled() -> None:
    logits, labels = simulated(40_000)
    kept = labels | (np.arange(40_000) % 4 == 0)  # a quarter of the others
    calibration = fit_calibration(logits[kept], labels[kept])
    assert calibration.bias == pytest.approx(0, abs=0.1)
    assert calibration.temperature == pytest.approx(1, rel=0.05)


def test_the_calibration_is_recovered_and_makes_scores_honest() -> None:
    logits, labels = simulated(20_000)
    unfair = logits * 3 + 4  # sure of too much, and takes too many for the catalog
    calibration = fit_calibration(unfair, labels)
    assert calibration.temperature == pytest.approx(3, rel=0.05)
    assert calibration.bias == pytest.approx(-4 / 3, rel=0.05)
    before = calibration_error(sigmoid(unfair), labels)
    after = calibration_error(sigmoid(calibration(unfair)), labels)
    assert after < 0.02 < before
    assert log_loss(calibration(unfair), labels) < log_loss(unfair, labels)
    kept = np.argsort(unfair) == np.argsort(calibration(unfair))
    assert kept.all()


def test_a_handful_of_samples_promises_no_certainty() -> None:
    logits, labels = np.array([-9.0, -8.0, 7.0, 9.0]), np.array([False, False, True, True])
    assert 0.1 < sigmoid(fit_calibration(logits, labels)(logits))[0] < 0.4


@pytest.mark.parametrize("untold", [lambda logits: -logits, lambda logits: 0 * logits + 50])
def test_a_network_that_tells_nothing_keeps_its_order_and_says_little(
    untold: Callable[[Floats], Floats],
) -> None:
    logits, labels = simulated(1000)
    calibration = fit_calibration(untold(logits), labels)
    assert calibration.temperature > 0
    scores = sigmoid(calibration(untold(logits)))
    assert scores == pytest.approx(labels.mean(), abs=0.01)


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 7), (1, -90), (40, 90)])
def test_the_calibration_finds_logits_of_any_scale(scale: float, shift: float) -> None:
    logits, labels = simulated(5000)
    found = fit_calibration(logits * scale + shift, labels)
    loss = log_loss(found(logits * scale + shift), labels)
    assert loss <= log_loss(logits, labels) + 1e-5  # fitted to classes of equal weight
    assert found.temperature == pytest.approx(scale, rel=0.1)


def test_the_interval_widens_when_samples_share_their_pictures() -> None:
    # 50 pictures of 20 samples each: either all of a picture's samples match or none.
    labels = np.repeat(np.arange(100) % 2 == 1, 20)
    scores = np.repeat(np.arange(100) // 2 % 2, 20).astype(float)
    together = confusion(scores, labels, np.repeat(np.arange(100), 20), 0.5)
    apart = confusion(scores, labels, np.arange(2000), 0.5)
    assert together.recall.value == apart.recall.value == pytest.approx(0.5, abs=0.02)
    assert together.recall.high - together.recall.low > 3 * (
        apart.recall.high - apart.recall.low
    )


def test_the_confusion_adds_up() -> None:
    scores = np.array([0.9, 0.2, 0.8, 0.1, 0.3])
    labels = np.array([True, True, False, False, False])
    result = confusion(scores, labels, np.arange(5), 0.5)
    assert (result.true_positive, result.false_negative) == (1, 1)
    assert (result.false_positive, result.true_negative) == (1, 2)
    assert result.accuracy.value == 0.6
    assert result.precision.value == 0.5
    assert result.false_positive_rate.value == pytest.approx(1 / 3)


def test_none_of_n_still_leaves_three_of_n_possible() -> None:
    labels = np.arange(1000) % 2 == 1
    result = confusion(labels.astype(float), labels, np.arange(1000), 0.5)
    assert (result.false_positive_rate.value, result.recall.value) == (0, 1)
    assert result.false_positive_rate.high == pytest.approx(3 / 500)
    assert result.recall.low == pytest.approx(1 - 3 / 500)
    few = confusion(labels.astype(float), labels, np.arange(1000) % 20, 0.5)
    assert few.false_positive_rate.high == pytest.approx(3 / 10)  # of ten pictures
    one = confusion(labels.astype(float), labels, np.arange(1000) % 2, 0.5)
    assert (one.recall.low, one.recall.high) == (0, 1)  # of one picture
    nothing = confusion(np.zeros(4), np.zeros(4, bool), np.arange(4), 0.5)
    assert nothing.recall.value is None


def test_what_mixes_the_classes_promises_no_more_than_the_one_less_known() -> None:
    # A thousand copies, each of a picture of its own, and as many samples of three decoys.
    labels = np.arange(2000) < 1000
    pictures = np.where(labels, np.arange(2000), 5000 + np.arange(2000) % 3)
    result = confusion(labels.astype(float), labels, pictures, 0.5)
    assert result.false_positive_rate.high == 1
    assert (result.accuracy.value, result.precision.value) == (1, 1)
    assert result.accuracy.low == result.precision.low == 0.5
    known = confusion(labels.astype(float), labels, np.arange(2000), 0.5)
    assert known.accuracy.low == pytest.approx(1 - 3 / 1000 / 2)
    assert known.precision.low == pytest.approx(0.997, abs=1e-4)


def test_the_gate_lets_all_but_a_thousandth_of_the_copies_through() -> None:
    draw = np.random.default_rng(3)
    labels = np.arange(8000) % 2 == 1
    scores = draw.normal(labels * 2.0, 1)
    threshold = threshold_for(scores, labels, 0.001)
    gate = gate_for(scores, labels, threshold)
    assert (scores[labels] >= gate).mean() == pytest.approx(0.999)
    assert gate < threshold
    assert gate_for(scores, labels, -5.0) == -5.0


def test_the_gate_of_a_sharp_network_lets_a_twentieth_of_the_decoys_through() -> None:
    draw = np.random.default_rng(3)
    labels = np.arange(8000) % 2 == 1
    scores = draw.normal(labels * 20.0, 1)
    gate = gate_for(scores, labels, 10.0)
    assert (scores[~labels] >= gate).mean() == pytest.approx(0.05)
    assert (scores[labels] >= gate).all()


def test_a_mistake_that_is_seen_narrows_no_interval() -> None:
    pictures = np.arange(6000) // 15
    hits = np.zeros(6000, bool)
    none = rate(hits, pictures)
    hits[0] = True
    one = rate(hits, pictures)
    assert one.high >= none.high == pytest.approx(3 / 400)


def test_a_rate_of_few_pictures_in_many_samples_has_a_wide_interval() -> None:
    hits = np.arange(3000) % 100 == 0
    alone = rate(hits, np.arange(3000))
    grouped = rate(hits, np.arange(3000) // 300)
    assert alone.value == grouped.value == pytest.approx(0.01)
    nothing = rate(np.zeros(3000, bool), np.arange(3000) // 300)
    assert (nothing.value, nothing.high) == (0.0, pytest.approx(0.3))


@pytest.mark.parametrize(("hits", "exact"), [(1, 5.57), (2, 7.22), (3, 8.77)])
def test_a_few_mistakes_leave_as_much_possible_as_is_known_of_so_few(
    hits: int, exact: float
) -> None:
    """By the binomial distribution (Clopper and Pearson 1934), of a thousand."""
    found = rate(np.arange(1000) < hits, np.arange(1000))
    assert exact / 1000 <= found.high < 1.05 * exact / 1000
    missed = rate(np.arange(1000) >= hits, np.arange(1000))
    assert missed.low == pytest.approx(1 - found.high)


def test_an_interval_holds_the_rate_that_is_19_times_of_20() -> None:
    found = [rate(np.arange(1000) < hits, np.arange(1000)) for hits in range(40)]
    for true in (0.00305, 0.004, 0.00505, 0.00705, 0.01):
        chance = [
            math.comb(1000, hits) * true**hits * (1 - true) ** (1000 - hits)
            for hits, one in enumerate(found)
            if one.low <= true <= one.high
        ]
        assert sum(chance) > 0.94


def test_many_mistakes_are_bounded_as_they_resample() -> None:
    pictures = np.arange(4000) // 20
    draw = np.random.default_rng(6)
    found = rate(draw.random(4000) < 0.1, pictures)  # most of 200 pictures have one
    assert found.value
    assert found.high - found.value < 2.5 * np.sqrt(0.1 * 0.9 / 4000)
