from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pic_training.report import Proportion, choose_threshold, draw_plot
from pic_training.run_folder import EpochMetrics


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, and 0 of 20.
    some = Proportion.count(81, 263)
    assert (some.low, some.high) == (
        pytest.approx(0.2553, abs=1e-4),
        pytest.approx(0.3662, abs=1e-4),
    )
    none = Proportion.count(0, 20)
    assert (none.low, none.high) == (0, pytest.approx(0.1611, abs=1e-4))
    assert Proportion.count(0, 0).value is None


def sigmoid(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def test_the_threshold_lies_midway_between_separable_classes() -> None:
    scores = np.array([-3, -1, 2, 5], np.float32)
    labels = np.array([0, 0, 1, 1], np.float32)
    assert choose_threshold(scores, labels) == pytest.approx(sigmoid(0.5))


def test_the_threshold_balances_the_classes_not_the_counts() -> None:
    scores = np.array([-2, -1, 0, 1, 2, 3], np.float32)
    labels = np.array([0, 0, 1, 0, 0, 1], np.float32)
    # Above 0.0 recall is 1/2; between -1 and 0 it is 1 with 2 of 4 rejected (0.75).
    # Above 2: recall 1/2, all rejected (0.75). The wider gap of equals is either.
    assert choose_threshold(scores, labels) in (
        pytest.approx(sigmoid(-0.5)),
        pytest.approx(sigmoid(2.5)),
    )


def test_equal_scores_are_never_split() -> None:
    scores = np.array([0, 1, 1, 1, 2], np.float32)
    labels = np.array([0, 0, 1, 1, 1], np.float32)
    assert choose_threshold(scores, labels) == pytest.approx(sigmoid(0.5))


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    history = [EpochMetrics(n, 1 / n, 0.5, 1 / n, 0.5, 1.0, 1.0) for n in (1, 2)]
    draw_plot(history, tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png").convert("RGB")
    assert len(image.getcolors(1 << 20) or []) > 50
