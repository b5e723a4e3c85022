from collections.abc import Callable
from typing import Any

import pytest
import torch

from pic_training.fine_tuning import features_of, fit_head
from pic_training.networks import ARCHITECTURES, Normalised
from pic_training.run_folder import RunConfig


def test_the_fitted_head_scores_as_its_loss_says_and_the_trunk_is_untouched() -> None:
    torch.manual_seed(0)
    network = Normalised(ARCHITECTURES["cnn"])
    trunk = {k: v.clone() for k, v in network.trunk.state_dict().items()}
    bright, dark = (torch.randint(low, low + 120, (40, 64, 64, 3)) for low in (130, 0))
    images = torch.cat([bright, dark]).to(torch.uint8)
    labels = torch.cat([torch.ones(40), torch.zeros(40)])
    device = torch.device("cpu")
    batches = [(images[:50], labels[:50]), (images[50:], labels[50:])]
    features, kept = features_of(network, batches, 80, device, bf16=False)
    assert features.shape == (80, 384)
    assert torch.equal(kept, labels)

    loss = fit_head(network, features, labels)

    with torch.no_grad():
        logits = network.eval()(images)
    served = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert abs(float(served) - loss) < 1e-4
    assert bool(((logits > 0) == (labels > 0.5)).all())
    assert all(torch.equal(trunk[k], v) for k, v in network.trunk.state_dict().items())


@pytest.mark.parametrize(
    "changes, rate",
    [
        ({"weights": "none"}, 0.01),
        ({"weights": "imagenet"}, 0.001),
        ({"weights": "imagenet", "head_start": 100}, 0.0001),
        ({"weights": "imagenet", "lr": 0.5}, 0.5),
    ],
)
def test_a_trunk_that_has_learned_before_is_taught_more_slowly(
    config_of: Callable[..., RunConfig], changes: dict[str, Any], rate: float
) -> None:
    assert config_of(arch="resnet50", **changes).lr == rate
