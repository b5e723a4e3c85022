"""The first stage of fine-tuning: the head alone, on features of a trunk left as it is."""

from collections.abc import Callable, Iterable

import torch

from pic_training.logistic import logistic_regression
from pic_training.networks import Normalised
from pic_training.samples import Batch

_PENALTY = 1e-3  # on the squared weights, for features of unit variance


def features_of(
    network: Normalised,
    batches: Iterable[Batch],
    count: int,
    device: torch.device,
    bf16: bool,
) -> Batch:
    """The trunk's features of `count` samples, (N, F), and labels, as `collected`."""
    network.eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return network.features(images.to(device))

    return collected(batches, count, features)


@torch.no_grad()
def collected(
    batches: Iterable[Batch], count: int, make: Callable[[torch.Tensor], torch.Tensor]
) -> Batch:
    """What `make` makes of the images of `count` samples, float32, (N, ...), and their
    labels, (N,), on the CPU."""
    # One array for all: put together at the end, they would take twice the memory, and
    # small ones in between would pin that of every batch.
    outputs, labels, done = torch.empty(0), torch.empty(0), 0
    for images, some in batches:
        made = make(images).float().cpu()
        if not done:
            outputs = torch.empty((count, *made.shape[1:]))
            labels = torch.empty(count, dtype=some.dtype)
        part = slice(done, done + len(some))
        outputs[part], labels[part] = made, some.cpu()
        done += len(some)
    return outputs, labels


def fit_head(network: Normalised, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Set the head to the logistic regression on these features; returns its loss.

    `labels` are above 0 for catalog, 0 for others.
    """
    fit = logistic_regression(features, (labels > 0).float(), _PENALTY)
    with torch.no_grad():
        network.head.weight.copy_(fit.weight[None])
        network.head.bias.copy_(fit.bias[None])
    return fit.loss
