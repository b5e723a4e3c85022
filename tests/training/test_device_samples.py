"""What a GPU is fed, made on it where there is one, and on the CPU device."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import product, write_products
from PIL import Image

from pic_daemon.images import decode, to_pixels
from pic_training import device_samples
from pic_training.augmentation import Augmentation, compress
from pic_training.device_samples import DeviceSamples, Pool, fits
from pic_training.distributed import Processes
from pic_training.samples import Batch, SampleSet
from pic_training.sources import gather


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    folder = tmp_path_factory.mktemp("sources")
    for kind, numbers in (("catalog", range(60)), ("others", range(100, 160))):
        for number, path in zip(
            numbers, write_products(folder / kind, numbers), strict=True
        ):
            product(number).resize(SIZES[number % len(SIZES)]).save(path, quality=90)
    again = product(59).resize(SIZES[59 % len(SIZES)])
    again.save(folder / "catalog" / "again.jpg", quality=40)  # has the same label
    sources = gather(folder / "catalog", folder / "others", None, folder / "work.rgb", 64)
    return SampleSet(sources, "train", COUNT, 64, 3, Augmentation())


SIZES = [(256, 256), (256, 140), (90, 200), (256, 60), (70, 66)]
COUNT = 600
UNTOUCHED = Augmentation(probability=0.0, variety=False)

GPU = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="PyTorch sees no GPU here"
    ),
)


@pytest.fixture(scope="module", autouse=True)
def few_at_once() -> Iterator[None]:
    """What suits a GPU takes a CPU several times as long, out of its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_samples, "RENDERED_BYTES", 2 * 2**20)
        yield


@pytest.fixture(scope="module", params=["cpu", GPU])
def on_device(samples: SampleSet, request: pytest.FixtureRequest) -> DeviceSamples:
    device = torch.device(request.param)
    return DeviceSamples(samples, Pool(samples, 256, device))


@pytest.fixture(scope="module")
def expected(samples: SampleSet) -> Batch:
    """The samples of the CPU, and their labels."""
    return joined(samples.load(1, 50, 2))


@pytest.fixture(scope="module")
def drawn(on_device: DeviceSamples) -> Batch:
    return joined(on_device.load(1, 5))


def joined(batches: Iterable[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images).cpu(), torch.cat(labels).cpu()


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


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Smirnov's statistic: the greatest distance between two distribution functions."""
    both = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(v), both, "right") / len(v) for v in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


BY_CHANCE = 1.95 * np.sqrt(2 / (COUNT / 2))
"""What two samples of one distribution, half of `COUNT` each, pass once in a thousand."""


def test_samples_are_distributed_as_those_of_the_cpu(expected: Batch, drawn: Batch) -> None:
    assert drawn[0].shape == expected[0].shape
    assert drawn[0].dtype == torch.uint8
    ours, theirs = statistics(drawn[0]), statistics(expected[0])
    for name in ours:
        for kind in (0, 1):
            gap = apart(ours[name][kind::2], theirs[name][kind::2])
            assert gap < BY_CHANCE, (name, kind)


def test_pictures_stay_with_the_cpu_where_the_device_has_no_room(
    samples: SampleSet,
) -> None:
    pictures = sum(len(samples.sources.of(kind, "train")) for kind in ("catalog", "other"))
    bytes_of_all = pictures * 256 * 256 * 3
    assert fits(samples, 256, bytes_of_all)
    assert not fits(samples, 256, bytes_of_all - 1)


def test_with_nothing_to_alter_a_sample_is_what_the_daemon_would_see(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    untouched = replace(samples, count=60, augmentation=UNTOUCHED)
    drawn, _ = joined(DeviceSamples(untouched, on_device.pool).load(0, 30))
    expected, _ = joined(untouched.load(0, 30, 0))
    difference = (drawn.float() - expected.float()).abs()
    assert difference.mean() < 0.5


def test_a_sample_is_what_the_codec_leaves_at_its_quality(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    only = replace(
        UNTOUCHED, probability=1.0, crop_area=(1, 1), crop_aspect=1, side=(256, 257)
    )
    coarse = replace(samples, count=60, augmentation=replace(only, quality=(12, 12)))
    drawn, _ = joined(DeviceSamples(coarse, on_device.pool).load(0, 30))
    expected, _ = joined(coarse.load(0, 30, 0))
    fine = replace(samples, count=60, augmentation=replace(only, quality=(95, 95)))
    other, _ = joined(fine.load(0, 30, 0))
    assert (drawn.float() - expected.float()).abs().mean() < 0.5
    assert (drawn.float() - other.float()).abs().mean() > 1.5


def test_a_distribution_that_differs_would_be_noticed(expected: Batch) -> None:
    images, _ = expected
    crude = images.float().reshape(-1, 32, 2, 32, 2, 3).mean(dim=(2, 4))
    blurred = crude.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    one, other = (statistics(made)["fine detail"][1::2] for made in (blurred, images))
    assert apart(one, other) > 2 * BY_CHANCE


def test_what_is_drawn_has_the_shares_and_ranges_of_the_cpu(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    drawn = DeviceSamples(replace(samples, count=20_000), on_device.pool).draw(0)
    named = {name: drawn_of.cpu().double() for name, drawn_of in vars(drawn).items()}
    size = on_device.pool.sizes.cpu()[drawn.picture.cpu()].double()
    decoy = on_device.pool.labels.cpu()[drawn.picture.cpu()] == 0

    area = (named["length"] / size).prod(dim=1)
    whole = area == 1
    assert share(whole) == pytest.approx(0.2, abs=0.02)
    assert area.min() > 0.49
    assert area[~whole].mean() == pytest.approx(0.75, abs=0.01)
    room = size - named["length"]
    place = (named["start"] / room)[room > 10]
    assert place.min() < 0.05
    assert place.max() == 1
    assert place.mean() == pytest.approx(0.5, abs=0.02)

    longer, given = (named[name].amax(dim=1) for name in ("target", "length"))
    assert 47 <= longer.min() < 50
    resized = longer < given
    # A side is drawn up to 256 pixels, log-uniformly, and pictures are not enlarged.
    enough = (given / 48).log() / np.log(256 / 48)
    assert share(resized) == pytest.approx(0.8 * float(enough.mean()), abs=0.02)
    assert share(named["back"] == 1) == pytest.approx(0.5, abs=0.02)

    quality = named["quality"]
    assert share(quality == 0) == pytest.approx(0.2, abs=0.02)
    assert {10.0, 95.0} <= set(quality.tolist()) <= {0.0, *map(float, range(10, 96))}
    assert quality[quality > 0].mean() == pytest.approx(52.5, abs=1)

    kept = (named["channels"] == torch.arange(3)).all(dim=1)
    straight = (named["exponents"] == 1).all(dim=1)
    assert share(named["mirrored"][decoy] == 1) == pytest.approx(1 / 2, abs=0.02)
    assert share(kept[decoy]) == pytest.approx(2 / 3 + 1 / 18, abs=0.02)
    assert share(straight[decoy]) == pytest.approx(1 / 2, abs=0.02)
    bent = named["exponents"][decoy & ~straight].log()
    assert bent.abs().max() <= 0.5
    assert bent.std() == pytest.approx(1 / np.sqrt(12), abs=0.02)
    assert not named["mirrored"][~decoy].any()
    assert kept[~decoy].all() and straight[~decoy].all()


@pytest.mark.parametrize("quality", [0, 15, 60, 95])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shrink", [1.0, 0.7, 0.3])
def test_each_sample_is_what_pillow_and_libjpeg_make_of_its_picture(
    samples: SampleSet, on_device: DeviceSamples, quality: int, back: bool, shrink: float
) -> None:
    untouched = replace(samples, count=30, augmentation=UNTOUCHED)
    drawn = DeviceSamples(untouched, on_device.pool).draw(0)
    place = torch.tensor([[20, 10]], device=drawn.start.device)
    start = torch.minimum(place, drawn.length - 50)
    length = drawn.length - start - 10
    # Training never makes the longer side shorter than 48 pixels.
    factor = (48 / length.amax(dim=1)).clamp(shrink, 1)[:, None]
    asked = replace(
        drawn,
        start=start,
        length=length,
        target=(length * factor).round().long(),
        back=torch.full_like(drawn.back, back),
        quality=torch.full_like(drawn.quality, quality),
    )
    made = on_device.pool.render(asked).cpu().float()
    for number, picture in enumerate(drawn.picture.tolist()):
        image = samples.sources.image(on_device.pool.pictures[picture])
        (top, left), (height, width), target = (
            of[number].tolist() for of in (asked.start, asked.length, asked.target)
        )
        piece = image.crop((left, top, left + width, top + height))
        smaller = piece.resize(target[::-1], Image.Resampling.BICUBIC)
        if back:
            smaller = smaller.resize(piece.size, Image.Resampling.BICUBIC)
        expected = to_pixels(smaller, 64)
        if quality:
            expected = decode(compress(np.asarray(smaller), quality), 64).pixels
        difference = (made[number] - torch.tensor(expected).float()).abs()
        assert difference.mean() < (2 if quality else 0.5), (image.size, target)


def share(of: torch.Tensor) -> float:
    return float(of.double().mean())


@pytest.mark.parametrize(
    "change",
    [{"mirrored": True}, {"channels": [2, 0, 1]}, {"exponents": [0.7, 1.0, 1.5]}],
)
def test_a_decoy_becomes_another_as_it_was_drawn(
    samples: SampleSet, on_device: DeviceSamples, change: dict[str, object]
) -> None:
    untouched = replace(samples, count=30, augmentation=UNTOUCHED)
    drawn = DeviceSamples(untouched, on_device.pool).draw(0)
    ((name, value),) = change.items()
    other = getattr(drawn, name).clone()
    other[:] = torch.tensor(value, dtype=other.dtype)
    plain, made = (
        on_device.pool.render(d).cpu().float()
        for d in (drawn, replace(drawn, **{name: other}))
    )
    if name == "mirrored":
        expected = plain.flip(2)
    elif name == "channels":
        expected = plain[..., [2, 0, 1]]
    else:
        expected = ((plain / 255) ** torch.tensor([0.7, 1.0, 1.5]) * 255).round()
    assert torch.equal(made, expected)


def test_a_label_names_the_same_picture_as_on_the_cpu(
    expected: Batch, drawn: Batch
) -> None:
    assert torch.equal(drawn[1], expected[1])
    assert set(drawn[1].tolist()) == set(range(61))


def test_batches_are_balanced_fresh_each_epoch_and_resumable(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    fewer = DeviceSamples(replace(samples, count=150), on_device.pool)
    first = list(fewer.load(1, 64))
    assert [len(labels) for _, labels in first] == [64, 64, 22]
    assert sum(int((labels > 0).sum()) for _, labels in first) == 75
    resumed = next(fewer.load(1, 64, first=1))
    assert torch.equal(resumed[0], first[1][0])
    assert not torch.equal(next(fewer.load(2, 64))[0], first[0][0])
    assert not torch.equal(fewer.draw(2).quality, fewer.draw(1).quality)


def test_two_processes_share_each_batch(
    samples: SampleSet, on_device: DeviceSamples
) -> None:
    fewer = DeviceSamples(replace(samples, count=90), on_device.pool)
    whole = list(fewer.load(1, 33))
    halves = [list(fewer.load(1, 33, 0, Processes(rank, 2))) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        images, labels = (torch.cat(of) for of in zip(*parts, strict=True))
        assert torch.equal(batch[1], labels)
        # A GPU may add up in another order where there are fewer of them.
        assert (batch[0].float() - images.float()).abs().mean() < 0.5
