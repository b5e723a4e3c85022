import numpy as np
import torch
from torch.nn.functional import normalize

from pic_training.metric_learning import (
    TEMPERATURE,
    Known,
    contrastive_loss,
    nearest_is_copy,
    resemblance,
    whiten_head,
)
from pic_training.networks import DESCRIBERS, Describer


def directions(*angles: float) -> torch.Tensor:
    turned = torch.tensor(angles) * torch.pi / 180
    return torch.stack([turned.cos(), turned.sin()], dim=1)


def test_the_loss_is_that_of_choosing_the_copy_among_the_batch() -> None:
    embeddings, labels = directions(0, 60, 90), torch.tensor([7, 7, 3])
    cosines = torch.tensor([[0.5, 0.0], [0.5, 3**0.5 / 2]]) / TEMPERATURE
    expected = (cosines.logsumexp(1) - cosines[:, 0]).sum()
    assert torch.allclose(contrastive_loss(embeddings, labels), expected, atol=1e-4)


def test_the_loss_falls_when_copies_come_closer_or_others_go_away() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    start = contrastive_loss(directions(0, 20, 60, 80), labels)
    assert contrastive_loss(directions(0, 10, 60, 70), labels) < start
    assert contrastive_loss(directions(0, 20, 160, 180), labels) < start


def test_a_sample_without_a_copy_in_the_batch_is_only_a_negative() -> None:
    embeddings = directions(0, 5, 50).requires_grad_()
    alone = contrastive_loss(embeddings[2:], torch.tensor([3]))
    alone.backward()
    assert alone.item() == 0
    assert embeddings.grad is not None and not embeddings.grad.any()
    assert contrastive_loss(embeddings, torch.tensor([7, 7, 3])).item() > 0


def test_the_nearest_neighbour_is_never_the_sample_itself() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    right = nearest_is_copy(directions(0, 10, 30, 90), labels)
    assert right.tolist() == [True, True, False, True]


def test_resemblance_is_the_greatest_cosine_to_the_catalog_and_names_the_item() -> None:
    known = Known(directions(0, 90).numpy(), np.array([0, 1, 0, -1]), np.arange(2))
    samples = directions(10, 80, 60, 45).numpy()
    scores, right, loss = resemblance(samples, known)
    assert np.allclose(scores, np.cos(np.deg2rad([10, 10, 30, 45])), atol=1e-6)
    assert right.tolist() == [True, True, False, False]
    near = Known(directions(0, 90).numpy(), np.array([0, 1, 0, -1]), np.arange(2))
    far = resemblance(directions(10, 80, 60, 225).numpy(), near)[2]
    assert far < loss  # the decoy went away from both items


def test_to_name_a_near_duplicate_is_right() -> None:
    catalog = directions(0, 1, 90).numpy()
    samples = directions(1, 89, 45).numpy()
    known = Known(catalog, np.array([0, 0, -1]), np.array([7, 7, 8]))
    assert resemblance(samples, known)[1].tolist() == [True, False, False]
    alone = Known(catalog, known.items, np.arange(3))
    assert resemblance(samples, known)[2] < resemblance(samples, alone)[2]


def test_the_whitened_head_ignores_what_differs_between_copies() -> None:
    draw = torch.Generator().manual_seed(0)
    signal = torch.randn(40, 8, generator=draw)
    # Copies differ much in the first 8 numbers, pictures in the others.
    copies = [torch.cat([3 * torch.randn(40, 8, generator=draw), signal], 1)
              for _ in range(2)]  # fmt: skip
    features = torch.zeros(80, 384)
    features[0::2, :16], features[1::2, :16] = copies
    labels = torch.arange(40).repeat_interleave(2)
    network = Describer(DESCRIBERS["cnn"], outputs=6).eval()

    def found(embeddings: torch.Tensor) -> float:
        return float(nearest_is_copy(embeddings, labels).float().mean())

    whiten_head(network, features, labels)
    with torch.no_grad():
        embeddings = network(features)
    assert embeddings.shape == (80, 6)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(80), atol=1e-5)
    assert found(normalize(features, dim=1)) < 0.5 < 0.9 < found(embeddings)
