"""What a run can learn: to classify, or to describe. All that differs between the two."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pic_training.fine_tuning import fit_head
from pic_training.metric_learning import (
    Known,
    contrastive_loss,
    nearest_is_copy,
    resemblance,
    whiten_head,
)
from pic_training.networks import Normalised
from pic_training.run_folder import RunConfig
from pic_training.threshold import fit_calibration, log_loss

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """The validation samples as a network sees them.

    `scores`, float32, shape (N,): the higher, the likelier from the catalog. Losses and
    accuracy as in EpochMetrics; `right`, shape (N,), says of each catalog sample
    whether it was taken for the right item (classifying: for the right class).
    """

    scores: Floats
    loss: float
    calibrated_loss: float
    accuracy: float
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Task:
    """`loss` gives losses summed over a batch and the number of right answers.

    `start_head` sets the head by features (N, F) of a trunk left as it is and by labels
    (N,), and returns the loss if it minimised one. `judge` takes the outputs of the
    validation samples, their labels, which of them calibrate, and the catalog as known
    where `needs_catalog`.
    """

    optimizer: Callable[[RunConfig, list[nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    start_head: Callable[[Normalised, torch.Tensor, torch.Tensor], float | None]
    judge: Callable[[Floats, Floats, Flags, Known | None], Judged]
    needs_catalog: bool


def task_of(config: RunConfig) -> Task:
    """What a run is to learn."""
    return _DESCRIBE if config.task == "describe" else _CLASSIFY


def _sgd(config: RunConfig, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.ndim]}]
    if levels := [p for p in trained if not p.ndim]:  # decay would only bias them
        groups.append({"params": levels, "weight_decay": 0.0})
    decay = config.architecture.weight_decay
    return torch.optim.SGD(
        groups, config.lr, config.momentum, weight_decay=decay, fused=True
    )


def _adam(config: RunConfig, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(trained, config.lr, (config.momentum, 0.999), fused=True)


def _classification_loss(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    positive = labels > 0
    loss = binary_cross_entropy_with_logits(logits, positive.float(), reduction="sum")
    return loss, ((logits > 0) == positive).sum()


def _description_loss(
    embeddings: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = contrastive_loss(embeddings, labels)
    return loss, nearest_is_copy(embeddings.detach(), labels).sum()


def judge_classes(
    logits: Floats, labels: Floats, calibrates: Flags, _: Known | None = None
) -> Judged:
    """By logits, float32, shape (N,), and labels, 1 for catalog and 0 for others.

    The calibrated loss, which chooses the epoch, is of those that calibrate: the others
    are to test what was chosen.
    """
    exact, positive = logits.astype(np.float64), labels > 0.5
    right = (logits > 0) == positive
    some, truth = exact[calibrates], positive[calibrates]
    return Judged(
        logits,
        log_loss(exact, positive),
        log_loss(fit_calibration(some, truth)(some), truth),
        float(right.mean()),
        right,
    )


def judge_embeddings(
    embeddings: Floats, labels: Floats, calibrates: Flags, known: Known | None
) -> Judged:
    """By embeddings, float32, shape (N, D), of length one, and the catalog as known.

    The loss that chooses the epoch is of those that calibrate, as in `judge_classes`.
    """
    assert known is not None
    scores, right, loss = resemblance(embeddings, known)
    some = replace(known, items=known.items[calibrates])
    chooses = resemblance(embeddings[calibrates], some)[2]
    return Judged(scores, loss, chooses, float(right[labels > 0.5].mean()), right)


_CLASSIFY = Task(_sgd, _classification_loss, fit_head, judge_classes, False)
_DESCRIBE = Task(_adam, _description_loss, whiten_head, judge_embeddings, True)
