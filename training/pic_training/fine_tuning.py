"""The first stage of fine-tuning: the head alone, on features of a trunk left as it is."""

from collections.abc import Iterable

import torch

from pic_training.logistic import logistic_regression
from pic_training.networks import Normalised
from pic_training.samples import Batch

_PENALTY = 1e-3  # on the squared weights, for features of unit variance


@torch.no_grad()
def features_of(
    network: Normalised,
    batches: Iterable[Batch],
    count: int,
    device: torch.device,
    bf16: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trunk's features of `count` samples, float32, (N, F), and labels, (N,), on the
    CPU."""
    network.eval()
    # One array for all: put together at the end, they would take twice the memory.
    features, labels, done = torch.empty(0), torch.empty(0), 0
    for images, some in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            made = network.features(images.to(device)).float().cpu()
        if not done:
            features = torch.empty((count, made.shape[1]))
            labels = torch.empty(count, dtype=some.dtype)
        part = slice(done, done + len(some))
        features[part], labels[part] = made, some.cpu()
        done += len(some)
    return features, labels


def fit_head(network: Normalised, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Set the head to the logistic regression on these features; returns its loss.

    `labels` are above 0 for catalog, 0 for others.
    """
    fit = logistic_regression(features, (labels > 0).float(), _PENALTY)
    with torch.no_grad():
        network.head.weight.copy_(fit.weight[None])
        network.head.bias.copy_(fit.bias[None])
    return fit.loss
