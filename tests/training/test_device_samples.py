"""What a GPU is fed, made on it where there is one, and on the CPU device."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import product, write_products
from PIL import Image

from pic_training.augmentation import Augmentation
from pic_training.device_samples import (
    SAMPLES_A_VERSION,
    DeviceSamples,
    Pool,
    resample,
    versions_for,
)
from pic_training.samples import Batch, SampleSet
from pic_training.sources import gather


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    folder = tmp_path_factory.mktemp("sources")
    write_products(folder / "catalog", range(60))
    product(59).save(folder / "catalog" / "again.jpg", quality=40)  # has the same label
    write_products(folder / "others", range(100, 160))
    sources = gather(folder / "catalog", folder / "others", None, folder / "work.rgb", 64)
    return SampleSet(sources, "train", 4000, 64, 3, Augmentation())


GPU = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="PyTorch sees no GPU here"
    ),
)


@pytest.fixture(scope="module", params=["cpu", GPU])
def on_device(samples: SampleSet, request: pytest.FixtureRequest) -> DeviceSamples:
    device = torch.device(request.param)
    return DeviceSamples(samples, Pool(samples, 8, 256, 2, device))


@pytest.fixture(scope="module")
def expected(samples: SampleSet) -> Batch:
    """The samples of the CPU, and their labels."""
    return joined(samples.load(1, 50, 2))


@pytest.fixture(scope="module")
def drawn(on_device: DeviceSamples) -> Batch:
    return joined(on_device.load(1, 50))


def joined(batches: Iterable[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images).cpu(), torch.cat(labels).cpu()


@pytest.mark.parametrize("box", [(0, 0, 200, 150), (13, 7, 120, 140), (3, 2, 40, 30)])
def test_resampling_gives_what_pillow_gives(box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    image = product(3).resize((200, 150))
    cut = image.crop((left, top, left + width, top + height))
    expected = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR))
    padded = np.zeros((1, 256, 256, 3), np.uint8)
    padded[0, :150, :200] = np.asarray(image)
    start, length = torch.tensor([[top, left]]), torch.tensor([[height, width]])
    drawn = resample(torch.from_numpy(padded), start, length, 64)[0].numpy()
    difference = np.abs(drawn.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.2


def statistics(images: torch.Tensor) -> dict[str, np.ndarray]:
    """What compression, scale and crop leave in pictures, each shape (N,)."""
    grey = images.numpy().mean(axis=3)
    across = np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
    second = np.abs(np.diff(grey, n=2, axis=2)).mean(axis=(1, 2))
    return {
        "brightness": grey.mean(axis=(1, 2)),
        "contrast": grey.std(axis=(1, 2)),
        "edges": across,
        "fine detail": second,
        "centre": grey[:, 24:40, 24:40].mean(axis=(1, 2)),
        "colour": images.numpy().std(axis=3).mean(axis=(1, 2)),
    }


def test_samples_are_distributed_as_those_of_the_cpu(expected: Batch, drawn: Batch) -> None:
    assert drawn[0].shape == expected[0].shape
    assert drawn[0].dtype == torch.uint8
    ours, theirs = statistics(drawn[0]), statistics(expected[0])
    for name in ours:
        for kind in (0, 1):
            one, other = ours[name][kind::2], theirs[name][kind::2]
            # Quantiles as far apart as chance would have them, in units of the spread.
            levels = np.linspace(0.1, 0.9, 9)
            gap = np.abs(np.quantile(one, levels) - np.quantile(other, levels)).max()
            assert gap < 0.25 * other.std(), (name, kind)


def test_as_many_versions_are_rendered_as_there_is_room_for(samples: SampleSet) -> None:
    all_pictures = len(samples.sources.of("catalog", "train"))
    all_pictures += len(samples.sources.of("other", "train"))
    one_of_each = all_pictures * 256 * 256 * 3
    for room, versions in ((one_of_each - 1, 0), (5 * one_of_each, 5), (1 << 50, 16)):
        assert versions_for(samples, 256, room) == versions


def test_no_piece_is_smaller_than_the_cpu_makes_it(on_device: DeviceSamples) -> None:
    longer = on_device.pool.crops.amax(dim=2)
    assert 47 <= longer.min() < 60


def test_some_versions_are_new_in_every_epoch_and_the_same_after_a_resume(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    fewer = replace(samples, count=SAMPLES_A_VERSION * 121 * 2)  # of 121 pictures
    whole, resumed = (Pool(fewer, 4, 256, 2, on_device.pool.pixels.device) for _ in "ab")
    whole.renew(0)
    before = whole.pixels.clone()
    whole.renew(1)
    new = [not torch.equal(before[:, n], whole.pixels[:, n]) for n in range(4)]
    assert new == [True, True, False, False]
    resumed.renew(1)
    drawn = [next(DeviceSamples(fewer, pool).load(1, 64))[0] for pool in (whole, resumed)]
    assert torch.equal(*drawn)


def test_a_distribution_that_differs_would_be_noticed(expected: Batch) -> None:
    images, _ = expected
    crude = images.float().reshape(-1, 32, 2, 32, 2, 3).mean(dim=(2, 4))
    blurred = crude.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    one, other = (statistics(made)["fine detail"] for made in (blurred, images))
    assert abs(np.median(one) - np.median(other)) > 0.25 * other.std()


def test_a_label_names_the_same_picture_as_on_the_cpu(
    expected: Batch, drawn: Batch
) -> None:
    assert torch.equal(drawn[1], expected[1])
    assert set(drawn[1].tolist()) == set(range(61))


def test_batches_are_balanced_fresh_each_epoch_and_resumable(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    fewer = DeviceSamples(replace(samples, count=600), on_device.pool)
    first = list(fewer.load(1, 64))
    assert [len(labels) for _, labels in first[-2:]] == [64, 600 % 64]
    assert sum(int((labels > 0).sum()) for _, labels in first) == 300
    resumed = next(fewer.load(1, 64, first=5))
    assert torch.equal(resumed[0], first[5][0])
    assert not torch.equal(next(fewer.load(2, 64))[0], first[0][0])
