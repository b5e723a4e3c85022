"""Learning from copies: two altered copies of a picture belong together, all else apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pic_training.networks import Normalised

TEMPERATURE = 0.07
"""Divisor of the cosines in the loss; of several tried (bench/results/descriptor.md)."""

_SHRINKAGE = 0.1  # of the covariance among copies towards a sphere
_CHUNK = 4096  # samples compared with the catalog at a time

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Known:
    """The catalog as it is known: `embeddings` of its unaltered pictures, float32 (C, D).

    `items`, int64, shape (N,): the position there of the picture behind each
    validation sample, -1 for a decoy. `groups`, shape (C,), has one number for all
    near-duplicates: to name one for another is right.
    """

    embeddings: Floats
    items: NDArray[np.int64]
    groups: NDArray[np.int64]


def contrastive_loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """InfoNCE summed over a batch, in nats (van den Oord et al. 2018; several copies of
    a picture as in Khosla et al. 2020).

    `embeddings` (N, D) of length one, `labels` (N,) number the pictures. Each sample is
    to choose its copies among the whole batch; one without a copy there loses nothing.
    """
    similar = embeddings @ embeddings.T / TEMPERATURE
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    least = torch.finfo(similar.dtype).min  # not -inf: a lone sample has nobody else
    log_share = similar - similar.masked_fill(itself, least).logsumexp(1, True)
    copies = (labels[:, None] == labels) & ~itself
    return -((log_share * copies).sum(1) / copies.sum(1).clamp_min(1)).sum()


def nearest_is_copy(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each sample's nearest neighbour in the batch shows the same picture, (N,)."""
    similar = embeddings @ embeddings.T
    return labels[similar.fill_diagonal_(-2).argmax(1)] == labels


def resemblance(
    embeddings: Floats, known: Known
) -> tuple[Floats, NDArray[np.bool_], float]:
    """Each sample's greatest cosine to the catalog, whether that is its item, and the loss.

    The loss is that of telling a copy's item among all items but its near-duplicates, and
    all decoys, at once, in nats, a mean over the copies.
    """
    decoys = embeddings[known.items < 0]
    scores, right, losses = [], [], []
    for start in range(0, len(embeddings), _CHUNK):
        part = slice(start, start + _CHUNK)
        cosines, items = embeddings[part] @ known.embeddings.T, known.items[part]
        scores.append(cosines.max(1))
        right.append(
            (items >= 0) & (known.groups[cosines.argmax(1)] == known.groups[items])
        )
        copies = np.flatnonzero(items >= 0)
        own = cosines[copies, items[copies]]
        others = known.embeddings[items[copies]] @ decoys.T
        twins = known.groups == known.groups[items[copies], None]
        twins[np.arange(len(copies)), items[copies]] = False
        rivals = np.where(twins, -np.inf, cosines[copies])
        against = np.concatenate([rivals, others], axis=1) / TEMPERATURE
        losses.append(np.logaddexp.reduce(against, axis=1) - own / TEMPERATURE)
    return (
        np.concatenate(scores),
        np.concatenate(right),
        float(np.concatenate(losses).mean()),
    )


@torch.no_grad()
def whiten_head(network: Normalised, features: torch.Tensor, labels: torch.Tensor) -> None:
    """Set the head to what tells pictures apart by what stays the same among copies.

    `features` (N, F), `labels` (N,) number the pictures. Directions in which copies of
    one picture differ are shrunk to the same length, and of what is then left the
    directions that vary most are kept (as in Mikolajczyk and Matas 2007).
    """
    _, picture = torch.unique(labels, return_inverse=True)
    count = picture.bincount().double()[:, None]
    samples, size = features.shape
    double = torch.float64

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # All at once would take several times the memory of the features.
        for start in range(0, samples, _CHUNK):
            part = slice(start, start + _CHUNK)
            unit = torch.nn.functional.normalize(features[part].double(), dim=1)
            yield unit, picture[part]

    centre = torch.zeros(len(count), size, dtype=double)
    for unit, numbers in parts():
        centre.index_add_(0, numbers, unit)
    mean = centre.sum(0) / samples
    centre /= count
    within, around = torch.zeros(2, size, size, dtype=double)
    for unit, numbers in parts():
        apart, off = unit - centre[numbers], unit - mean
        within += apart.T @ apart / max(1, samples - len(count))
        around += off.T @ off / max(1, samples - 1)
    sphere = within.diagonal().mean() * torch.eye(size, dtype=double)
    values, vectors = torch.linalg.eigh((1 - _SHRINKAGE) * within + _SHRINKAGE * sphere)
    even = vectors / values.clamp_min(1e-12).sqrt() @ vectors.T
    _, directions = torch.linalg.eigh(even @ around @ even)
    weight = directions.flip(1)[:, : network.head.out_features].T @ even
    # Lengths do not count for a cosine; these suit the optimizer's steps.
    weight *= 1 / (weight.std() * weight.shape[1] ** 0.5)
    network.head.weight.copy_(weight)
    network.head.bias.copy_(-weight @ mean)
