from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from pic_training.metric_learning import Known
from pic_training.report import _likest, doubt, draw_plot
from pic_training.run_folder import EpochMetrics, best_of
from pic_training.tasks import judge_classes, judge_embeddings

EPOCH = EpochMetrics(
    epoch=1, train_loss=1.0, train_accuracy=0.5, val_loss=1.0, val_accuracy=0.5,
    val_calibrated_loss=1.0, seconds=1.0, images_per_second=1.0, val_seconds=1.0,
    network_share=1.0,
)  # fmt: skip


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    history = [replace(EPOCH, epoch=n, train_loss=1 / n, val_loss=1 / n) for n in (1, 2)]
    draw_plot(history, tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png").convert("RGB")
    assert len(image.getcolors(1 << 20) or []) > 50


def test_others_are_doubted_for_most_of_their_samples_not_for_the_worst() -> None:
    pictures = [SimpleNamespace(path=name) for name in ("ours", "odd", "copy", "far")]
    result = SimpleNamespace(
        sources=SimpleNamespace(pictures=pictures),
        val_labels=np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        val_sources=np.array([0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    )
    scores = np.array([1, 0.99, 0.1, 0.2, 0.3, 0.9, 0.8, 0, 0, 0])
    found = _likest(result, scores)  # type: ignore[arg-type]
    assert [(o["path"], o["score"]) for o in found] == [
        ("copy", 0.8), ("odd", 0.2), ("far", 0.0)
    ]  # fmt: skip
    said = doubt({"likest_others": found, "threshold": 0.5})
    assert said and "copy" in said and "odd (" not in said


def test_an_epoch_that_tells_more_apart_is_kept_though_it_is_sure_of_too_much() -> None:
    draw = np.random.default_rng(0)
    labels = (np.arange(4000) % 2).astype(np.float32)
    truth = draw.normal(2 * labels - 1, 1).astype(np.float32)  # its logit is 2 x
    blurred = truth + draw.normal(0, 1, 4000).astype(np.float32)
    calibrates = np.arange(4000) < 2000
    calibrated, sharper = (
        judge_classes(logits, labels, calibrates) for logits in (blurred, 8 * truth)
    )
    assert sharper.accuracy > calibrated.accuracy
    assert sharper.loss > calibrated.loss
    history = [
        replace(EPOCH, epoch=n, val_loss=j.loss, val_calibrated_loss=j.calibrated_loss)
        for n, j in ((1, calibrated), (2, sharper))
    ]
    assert best_of(history).epoch == 2


def test_the_half_that_tests_has_no_say_in_which_epoch_is_kept() -> None:
    draw = np.random.default_rng(0)
    labels = (np.arange(400) % 2).astype(np.float32)
    logits = draw.normal(2 * labels - 1, 1).astype(np.float32)
    calibrates = np.arange(400) < 200
    others = np.where(calibrates, logits, -logits)
    as_it_is, wrong = (judge_classes(x, labels, calibrates) for x in (logits, others))
    assert wrong.accuracy < as_it_is.accuracy and wrong.loss > as_it_is.loss
    assert wrong.calibrated_loss == as_it_is.calibrated_loss


def test_the_half_that_tests_a_descriptor_has_no_say_either() -> None:
    unit = np.eye(4, dtype=np.float32)
    known = Known(unit[:2], np.array([0, -1, 1, -1]), np.arange(2))
    labels, calibrates = np.array([1, 0, 1, 0], np.float32), np.array([1, 1, 0, 0], bool)
    as_it_is, wrong = (
        judge_embeddings(np.stack(made), labels, calibrates, known)
        for made in (
            (unit[0], unit[2], unit[1], unit[3]),
            (unit[0], unit[2], unit[0], unit[0]),
        )
    )
    assert wrong.accuracy < as_it_is.accuracy and wrong.loss > as_it_is.loss
    assert wrong.calibrated_loss == as_it_is.calibrated_loss
