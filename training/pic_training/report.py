"""What a run came to: figures with their intervals, and the plot."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from pic_training.run_folder import EpochMetrics, RunConfig, write_json
from pic_training.training import RunResult

matplotlib.use("Agg")
from matplotlib import pyplot

PLOT = "TrainingLossAccuracyPlot.png"
THRESHOLD_RULE = "largest balanced accuracy on the validation samples"
_Z95 = 1.959964


@dataclass(frozen=True)
class Proportion:
    """A share in [0, 1] with its 95% Wilson score interval (Wilson 1927).

    Samples that come from one picture are not independent, which the interval does
    not know: with few pictures it is too narrow.
    """

    value: float | None
    low: float
    high: float
    of: int

    @classmethod
    def count(cls, successes: int, of: int) -> "Proportion":
        """The share successes / of; without a value where `of` is 0."""
        if of == 0:
            return cls(None, 0.0, 1.0, 0)
        p, z2 = successes / of, _Z95**2
        centre = (p + z2 / (2 * of)) / (1 + z2 / of)
        half = _Z95 / (1 + z2 / of) * float(np.sqrt(p * (1 - p) / of + z2 / (4 * of**2)))
        return cls(p, max(0.0, centre - half), min(1.0, centre + half), of)


def choose_threshold(scores: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    """The probability at or above which an image is a match: see THRESHOLD_RULE.

    `scores` are logits, shape (N,). Of several equally good ones the middle of the
    widest gap is taken.
    """
    order = np.argsort(scores)
    ranked, positive = scores[order].astype(np.float64), labels[order] > 0.5
    # Cut k leaves the k lowest scores below the threshold.
    missed = np.concatenate([[0], np.cumsum(positive)]) / max(1, positive.sum())
    rejected = np.concatenate([[0], np.cumsum(~positive)]) / max(1, (~positive).sum())
    edges = np.concatenate([[ranked[0] - 1], ranked, [ranked[-1] + 1]])
    gaps = np.diff(edges)
    balanced = np.where(gaps > 0, (1 - missed + rejected) / 2, -1.0)
    best = np.flatnonzero(balanced == balanced.max())
    cut = best[np.argmax(gaps[best])]
    logit = (edges[cut] + edges[cut + 1]) / 2
    return float(1 / (1 + np.exp(-logit)))


def write_report(result: RunResult, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Write report.json and the plot into `folder`; returns the report."""
    threshold = choose_threshold(result.val_scores, result.val_labels)
    best = min(result.history, key=lambda m: m.val_loss)
    seconds = sum(m.seconds for m in result.history)
    catalog = result.sources.of("catalog", "train")
    report = {
        "threshold": threshold,
        "threshold_rule": THRESHOLD_RULE,
        "best_epoch": best.epoch,
        "loss": best.val_loss,
        **_at_threshold(result.val_scores, result.val_labels, threshold),
        "catalog_size": len(catalog),
        "catalog_digest": result.sources.catalog_digest,
        "sources_digest": result.sources.digest,
        "left_out": len(result.sources.left_out),
        "training_seconds": seconds,
        "images_per_second": config.train_images * len(result.history) / seconds,
        "device": _device_name(config.device),
        "versions": versions(),
    }
    write_json(folder / "report.json", report)
    draw_plot(result.history, folder / PLOT)
    return report


def versions() -> dict[str, str]:
    """Versions of everything that the result depends on."""
    packages = ("product-image-classifier", "torch", "torchvision", "pillow", "numpy")
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


def _at_threshold(
    scores: NDArray[np.float32], labels: NDArray[np.float32], threshold: float
) -> dict[str, Any]:
    predicted = 1 / (1 + np.exp(-scores.astype(np.float64))) >= threshold
    actual = labels > 0.5
    tp, fp = int((predicted & actual).sum()), int((predicted & ~actual).sum())
    fn, tn = int((~predicted & actual).sum()), int((~predicted & ~actual).sum())
    shares = {
        "accuracy": Proportion.count(tp + tn, len(labels)),
        "precision": Proportion.count(tp, tp + fp),
        "recall": Proportion.count(tp, tp + fn),
        "false_positive_rate": Proportion.count(fp, fp + tn),
    }
    confusion = {"true_positive": tp, "false_positive": fp,
                 "false_negative": fn, "true_negative": tn}  # fmt: skip
    return {"confusion": confusion, **{k: asdict(v) for k, v in shares.items()}}


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
