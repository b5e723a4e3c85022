"""Steps recorded on a GPU against the same steps one kernel at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pic_training.augmentation import Augmentation
from pic_training.distributed import ALONE
from pic_training.learner import Learner
from pic_training.run_folder import RunConfig
from pic_training.samples import Batch, SampleSet
from pic_training.sources import gather

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch sees no GPU here"
)


@pytest.fixture(scope="module")
def batches(folders: Path) -> list[Batch]:
    """The last is smaller than the others."""
    sources = gather(
        folders / "catalog", folders / "others", None, folders / "recorded.rgb", 128
    )
    samples = SampleSet(sources, "train", 1000, 64, 0, Augmentation())
    return list(samples.load(0, 32, 2))


@pytest.fixture
def learner(config_of: Callable[..., RunConfig]) -> Callable[..., Learner]:
    def make(arch: str, naming: float) -> Learner:
        torch.manual_seed(0)
        return Learner(config_of(arch=arch, naming=naming, device="cuda"), ALONE, items=6)

    return make


@pytest.mark.parametrize("arch, naming", [("cnn", 0.0), ("resnet8", 1.0)])
def test_recorded_steps_learn_what_the_steps_themselves_do(
    learner: Callable[..., Learner], batches: list[Batch], arch: str, naming: float
) -> None:
    recorded, plain = (learner(arch, naming) for _ in range(2))
    for images, labels in batches:
        recorded.step((images, labels), len(labels), 0.0)
        plain.learn(images.cuda(), labels.cuda())
    assert recorded.recorded and recorded.recorded.graph
    losses = [learns.take_totals()[0] for learns in (recorded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    ours, theirs = (learns.network.state_dict() for learns in (recorded, plain))
    for name, value in theirs.items():
        gap = (ours[name].double() - value.double()).norm()
        assert gap <= 0.05 * value.double().norm() + 1e-6, name


def test_a_recorded_step_takes_the_rate_of_its_time(
    learner: Callable[..., Learner], batches: list[Batch]
) -> None:
    learns = learner("cnn", 0.0)

    def weights_after(batch: Batch, share: float) -> torch.Tensor:
        learns.step(batch, 32, share)
        return learns.network.head.weight.detach().clone()

    for batch in batches[:8]:
        before = weights_after(batch, 0.0)
    assert learns.recorded and learns.recorded.graph
    assert torch.equal(before, weights_after(batches[8], 1.0))  # the rate falls to zero
    assert not torch.equal(before, weights_after(batches[9], 0.0))
