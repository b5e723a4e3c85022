"""Logistic regression, for a head on kept features and for the calibration of logits."""

from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

_ITERATIONS = 300


@dataclass(frozen=True)
class Fit:
    """`features @ weight + bias` are the logits; `weight` (F,), `loss` in nats."""

    weight: torch.Tensor
    bias: torch.Tensor
    loss: float


def logistic_regression(
    features: torch.Tensor, targets: torch.Tensor, penalty: float = 0.0
) -> Fit:
    """Fit `targets` (N,), in [0, 1], to `features` (N, F), both of one floating dtype.

    Full batches by L-BFGS on standardised features, on whose squared weights the
    `penalty` is; needs no learning rate.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    standard = (features - mean) / std
    weight = features.new_zeros(features.shape[1], requires_grad=True)
    bias = features.new_zeros((), requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        return binary_cross_entropy_with_logits(standard @ weight + bias, targets)

    def closure() -> float:
        search.zero_grad()
        value = loss() + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    search.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scaled = weight / std
        return Fit(scaled, bias - scaled @ mean, loss().item())
