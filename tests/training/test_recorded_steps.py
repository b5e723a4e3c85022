"""Steps recorded on a GPU against the same steps one kernel at a time."""

from pathlib import Path

import pytest
import torch

from pic_training.augmentation import Augmentation
from pic_training.cli import _config
from pic_training.distributed import ALONE
from pic_training.learner import Learner
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


def learner(folders: Path, arch: str, naming: float) -> Learner:
    torch.manual_seed(0)
    config = _config(
        arch=arch, naming=naming, device="cuda", precision="fp32", batch_size=32, epochs=1,
        catalog=folders / "catalog", others=folders / "others", others_val=None, seed=0,
        corrections=None, task="classify", dimensions=None, stages=None, weights=None,
        lr=None, head_start=0, train_images=1000, val_images=256, target_fpr=0.05,
    )  # fmt: skip
    return Learner(config, ALONE, items=6)


@pytest.mark.parametrize("arch, naming", [("cnn", 0.0), ("resnet8", 1.0)])
def test_recorded_steps_learn_what_the_steps_themselves_do(
    folders: Path, batches: list[Batch], arch: str, naming: float
) -> None:
    recorded, plain = (learner(folders, arch, naming) for _ in range(2))
    for images, labels in batches:
        recorded.step((images, labels), len(labels), 0.0)
        plain.learn(images.cuda(), labels.cuda())
    losses = [learns.take_totals()[0] for learns in (recorded, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    ours, theirs = (learns.network.state_dict() for learns in (recorded, plain))
    for name, value in theirs.items():
        gap = (ours[name].double() - value.double()).norm()
        assert gap <= 0.05 * value.double().norm() + 1e-6, name


def test_a_recorded_step_takes_the_rate_of_its_time(
    folders: Path, batches: list[Batch]
) -> None:
    learns = learner(folders, "cnn", 0.0)

    def weights_after(batch: Batch, share: float) -> torch.Tensor:
        learns.step(batch, 32, share)
        return learns.network.head.weight.detach().clone()

    for batch in batches[:8]:
        before = weights_after(batch, 0.0)
    assert torch.equal(before, weights_after(batches[8], 1.0))  # the rate falls to zero
    assert not torch.equal(before, weights_after(batches[9], 0.0))
