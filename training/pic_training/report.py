"""What a run came to: figures with their intervals, and the plot."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from pic_daemon.folders import text_of
from pic_daemon.promise import Floats, Interval, Labels, threshold_for
from pic_training.run_folder import EpochMetrics, RunConfig, best_of, read_json, write_json
from pic_training.threshold import (
    calibration_error,
    confusion,
    fit_calibration,
    gate_for,
    log_loss,
    sigmoid,
)
from pic_training.training import RunResult

matplotlib.use("Agg")
from matplotlib import pyplot

_LIKEST = 12  # others that are named

PLOT = "TrainingLossAccuracyPlot.png"


def write_report(result: RunResult, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Write report.json and the plot into `folder`; returns the report.

    Half of the validation samples calibrate scores and threshold: of the others whole
    groups of near-duplicates, of the catalog every other sample of each picture. Accuracy,
    precision, recall and false positive rate come from the other half, and so does what
    `calibrated` says of scores decided at one half.
    `at_one_half`, `top_1` and `loss` are of all validation samples (the calibrating half of
    which chose the epoch), of whole pictures and before the calibration; all else, where
    the run classifies, counts the second look within margins, as the service does. Where
    it describes, the score is the greatest cosine to the catalog.
    """
    describes = config.task == "describe"
    scores = result.val_scores.astype(np.float64)
    labels = result.val_labels > 0.5
    test, target_fpr = result.val_is_test, config.target_fpr
    groups = result.sources.groups()[result.val_sources]
    calibrating = ~labels & ~test
    specific: dict[str, Any] = {}
    if describes:
        specific["top_1"] = asdict(_top_1(result, groups))
    else:
        specific, scores = _calibrated(scores, labels, test, groups)
    threshold = threshold_for(scores[~test], labels[~test], target_fpr)
    best = best_of(result.history)
    seconds = sum(m.seconds for m in result.history)
    report = {
        "threshold": threshold,
        "threshold_rule": (
            f"lowest with a false positive rate of at most {target_fpr:g} on "
            f"{calibrating.sum()} samples of "
            f"{len(np.unique(result.val_sources[calibrating]))} calibration decoys"
        ),
        "target_fpr": target_fpr,
        **specific,
        **asdict(confusion(scores[test], labels[test], groups[test], threshold)),
        "best_epoch": best.epoch,
        "loss": best.val_loss,
        "test_pictures": len(np.unique(result.val_sources[test])),
        "catalog_size": len(result.sources.of("catalog", "train")),
        "catalog_digest": result.sources.digest_of("catalog"),
        "sources_digest": result.sources.digest,
        "weights_digest": read_json(folder / "digest.json").get("weights"),
        "left_out": len(result.sources.left_out),
        "likest_others": _likest(result, scores),
        "training_seconds": seconds,
        "wall_seconds": result.other_seconds
        + sum(m.seconds + m.val_seconds for m in result.history),
        "images_per_second": config.train_images * len(result.history) / seconds,
        "device": _device_name(config.device),
        "versions": versions(),
    }
    if not describes:
        report["looks_twice"] = True
        report["gate_threshold"] = gate_for(scores[~test], labels[~test], threshold)
        report["at_one_half"] = {
            "accuracy": best.val_accuracy,
            "loss": best.val_loss,
            "samples": len(labels),
        }
    write_json(folder / "report.json", report)
    draw_plot(result.history, folder / PLOT)
    return report


def summary(report: dict[str, Any]) -> str:
    """What a run came to, in one sentence."""
    recall, rate = report["recall"], report["false_positive_rate"]
    if "top_1" in report:
        first = f"right item nearest for {report['top_1']['value']:.2%} of the copies"
    else:
        first = (
            f"validation accuracy {report['at_one_half']['accuracy']:.2%}, calibrated "
            f"{report['calibrated']['accuracy']['value']:.2%}"
        )
    return (
        f"best epoch {report['best_epoch']}: {first}; at threshold "
        f"{report['threshold']:.4g}, on the half that tests, recall "
        f"{recall['value']:.2%} (95% {recall['low']:.2%} to {recall['high']:.2%}), false "
        f"positive rate {rate['value']:.3%} ({rate['low']:.3%} to {rate['high']:.3%})"
    )


def doubt(report: dict[str, Any]) -> str | None:
    """What to look at before the model is believed: others most of whose samples match."""
    above = [o for o in report["likest_others"] if o["score"] >= report["threshold"]]
    if not above:
        return None
    named = ", ".join(f"{other['path']} ({other['score']:.4f})" for other in above[:3])
    return (
        f"of the others held back, these are taken for the catalog at most times: {named}. "
        "Where one is a copy of yours, cropped, it is not left out by itself: take it out "
        "(report.json has more of them)"
    )


def _likest(result: RunResult, scores: Floats) -> list[dict[str, Any]]:
    """The others held back that score highest, each by the median of its samples: of
    nearly all decoys some sample may match, of a copy most do."""
    drawn = result.val_sources
    others = np.unique(drawn[result.val_labels < 0.5])
    medians = np.array([np.median(scores[drawn == picture]) for picture in others])
    return [
        {
            "path": text_of(result.sources.pictures[others[n]].path),
            "score": float(medians[n]),
        }
        for n in np.argsort(-medians, kind="stable")[:_LIKEST]
    ]


def _calibrated(
    logits: Floats, labels: Labels, test: Labels, sources: NDArray[np.int64]
) -> tuple[dict[str, Any], Floats]:
    """What the report says of the calibration, and the probabilities."""
    calibration = fit_calibration(logits[~test], labels[~test])
    calibrated = calibration(logits)
    scores = sigmoid(calibrated)
    decided = confusion(scores[test], labels[test], sources[test], 0.5)
    return {
        **asdict(calibration),
        "calibration_error": {
            "before": calibration_error(sigmoid(logits[test]), labels[test]),
            "after": calibration_error(scores[test], labels[test]),
        },
        "calibrated": {
            "accuracy": asdict(decided.accuracy),
            "loss": log_loss(calibrated[test], labels[test]),
        },
    }, scores


def _top_1(result: RunResult, groups: NDArray[np.int64]) -> Interval:
    """The share of copies whose nearest catalog picture is theirs: a recall."""
    copies = result.val_labels > 0.5
    right = result.val_right[copies].astype(np.float64)
    return confusion(right, np.ones(len(right), bool), groups[copies], 0.5).recall


def versions() -> dict[str, str]:
    """Versions of everything that the result depends on."""
    packages = ("product-image-classifier", "torch", "torchvision", "pillow", "simplejpeg",
                "opencv-python-headless", "imagehash", "numpy")  # fmt: skip
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def draw_plot(history: Sequence[EpochMetrics], path: Path) -> None:
    """Loss and accuracy per epoch, for training and validation."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    epochs = [m.epoch for m in history]
    for axes, name in ((left, "loss"), (right, "accuracy")):
        for split, label in (("train", "training"), ("val", "validation")):
            values = [asdict(m)[f"{split}_{name}"] for m in history]
            axes.plot(epochs, values, marker="o", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Training loss and accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
