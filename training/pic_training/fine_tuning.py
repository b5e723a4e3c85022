"""The first stage of fine-tuning: the head alone, on features of a trunk left as it is."""

from collections.abc import Iterable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pic_training.networks import Normalised
from pic_training.samples import Batch

_PENALTY = 1e-3  # on the squared weights, for features of unit variance
_ITERATIONS = 300


@torch.no_grad()
def features_of(
    network: Normalised, batches: Iterable[Batch], device: torch.device, bf16: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trunk's features, float32, shape (N, F), and labels, shape (N,), on the CPU."""
    network.eval()
    features, labels = [], []
    for images, some in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features.append(network.features(images.to(device)).float().cpu())
        labels.append(some.cpu())
    return torch.cat(features), torch.cat(labels)


def fit_head(network: Normalised, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Set the head to the logistic regression on these features; returns its loss.

    `labels` are above 0 for catalog, 0 for others.
    Full batches by L-BFGS on standardised features, with a small penalty on the
    weights; needs no learning rate.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    standard, labels = (features - mean) / std, (labels > 0).float()
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        fit = binary_cross_entropy_with_logits(standard @ weight + bias, labels)
        return fit + _PENALTY * weight.square().sum()

    def closure() -> float:
        search.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    search.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scaled = weight / std
        network.head.weight.copy_(scaled[None])
        network.head.bias.copy_((bias - scaled @ mean)[None])
        return float(binary_cross_entropy_with_logits(standard @ weight + bias, labels))
