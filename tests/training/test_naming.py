"""Telling the catalog's pictures apart: learned beside the decision, or how it is made."""

import math
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from pic_daemon.errors import InputError
from pic_training.augmentation import Augmentation
from pic_training.distributed import ALONE
from pic_training.learner import Learner
from pic_training.networks import MARGIN, SCALE, Naming, Recogniser
from pic_training.run_folder import RunConfig, fill, new_network
from pic_training.samples import Batch, SampleSet
from pic_training.sources import gather

Run = Callable[..., subprocess.CompletedProcess[str]]
Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def batches(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    work = tmp_path_factory.mktemp("naming") / "work.rgb"
    sources = gather(folders / "catalog", folders / "others", None, work, 64)
    samples = SampleSet(sources, "train", 640, 64, 0, Augmentation())
    return list(samples.load(0, 32, 1))


@pytest.fixture
def learner(config_of: Config) -> Callable[..., Learner]:
    def make(naming: float, arch: str = "cnn") -> Learner:
        torch.manual_seed(0)
        return Learner(config_of(naming=naming, arch=arch), ALONE, items=6)

    return make


@pytest.mark.parametrize("arch", ["cnn", "resnet8"])
def test_it_is_learned_which_picture_a_sample_is_of(
    learner: Callable[..., Learner], batches: list[Batch], arch: str
) -> None:
    taught, untaught = (learner(naming, arch) for naming in (1, 0))
    assert taught.naming and not untaught.naming
    for _ in range(3):
        for batch in batches:
            taught.step(batch, 32, 0)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits, names = taught.naming.eval()(images)
        assert torch.equal(logits, taught.network(images))
    ours = labels > 0
    assert (names.argmax(1)[ours] == labels[ours] - 1).float().mean() > 0.8
    assert ((logits > 0) == ours).float().mean() > 0.8


def test_the_network_starts_and_ends_as_one_that_learns_no_names(
    learner: Callable[..., Learner], batches: list[Batch]
) -> None:
    taught, untaught = (learner(naming) for naming in (1, 0))
    before = untaught.network.state_dict()
    assert all(
        torch.equal(before[key], value)
        for key, value in taught.network.state_dict().items()
    )
    taught.step(batches[0], 32, 0)
    new_network(taught.config, "none", 0).load_state_dict(taught.state()["network"])


def test_what_names_are_worth_is_not_in_the_loss_that_is_told(
    learner: Callable[..., Learner], batches: list[Batch]
) -> None:
    taught, untaught = (learner(naming) for naming in (1, 0))
    for learns in (taught, untaught):
        learns.step(batches[0], 32, 0)
    assert taught.take_totals() == untaught.take_totals()


@pytest.mark.parametrize("arch", ["cnn", "resnet8"])
def test_a_learner_goes_on_from_its_state_to_the_very_same_result(
    learner: Callable[..., Learner], batches: list[Batch], arch: str
) -> None:
    whole, rest = (learner(1, arch) for _ in range(2))
    for batch in batches[:4]:
        whole.step(batch, 32, 0)
    rest.restore(deepcopy(whole.state()), Path("last.pt"))
    for learns in (whole, rest):
        for batch in batches[4:8]:
            learns.step(batch, 32, 0)
    assert whole.naming and rest.naming
    expected, parts = (learns.naming.state_dict() for learns in (whole, rest))
    assert all(torch.equal(expected[key], parts[key]) for key in expected)


@torch.no_grad()
def test_a_recogniser_decides_by_the_odds_of_any_picture_to_none(config_of: Config) -> None:
    network = new_network(config_of(naming=1, arch="resnet8"), "none", 6).eval()
    assert isinstance(network, Recogniser)
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    logits, names = network.name(network.features(images))
    assert names.shape == (4, 6) and names.abs().max() <= SCALE
    odds = names.exp().sum(1) / network.none.exp()
    assert torch.allclose(logits, odds.log(), atol=1e-4)
    network.none += 3
    assert torch.allclose(network(images), logits - 3, atol=1e-4)


def test_a_copy_is_to_be_nearer_to_its_own_picture_by_a_margin(config_of: Config) -> None:
    network = new_network(config_of(naming=1, arch="resnet8"), "none", 3)
    cosines = torch.tensor([[0.5 + MARGIN, 0.5, 0.5], [0.9, 0.9, 0.9]])
    labels = torch.tensor([1, 0])  # the second is a decoy
    loss = Naming(network, 3).loss(SCALE * cosines, labels)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-4)


def test_the_level_of_none_starts_even_and_does_not_decay(
    learner: Callable[..., Learner],
) -> None:
    taught = learner(1, "resnet8")
    network = taught.network
    assert isinstance(network, Recogniser)
    assert network.none.item() == pytest.approx(math.log(6))
    decays = {
        id(p): group["weight_decay"]
        for group in taught.optimizer.param_groups
        for p in group["params"]
    }
    assert decays[id(network.none)] == 0 < decays[id(network.head.weight)]


def test_weights_of_another_network_are_refused(config_of: Config) -> None:
    plain, taught = (
        new_network(config_of(naming=n, arch="resnet8"), "none", 6) for n in (0, 1)
    )
    with pytest.raises(InputError, match=r"run/last.pt is of a version whose network was"):
        fill(taught, plain.state_dict(), Path("run/last.pt"))


def test_a_resnet8_that_names_nothing_ends_in_one_number(config_of: Config) -> None:
    network = new_network(config_of(naming=0, arch="resnet8"), "none", 6)
    assert not isinstance(network, Recogniser) and network.head.out_features == 1
