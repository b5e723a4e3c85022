import io
import multiprocessing
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import product, write_products
from PIL import Image

from pic_daemon.errors import InputError
from pic_training.augmentation import Augmentation, augment, bicubic, compress, sample, vary
from pic_training.preparation import samples_of
from pic_training.run_folder import RunConfig
from pic_training.samples import SampleSet
from pic_training.sources import Sources, Split, gather


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    write_products(folder / "catalog", range(4))
    write_products(folder / "others", range(100, 110))
    return gather(folder / "catalog", folder / "others", None, folder / "work.rgb", 64)


def drawn(
    sources: Sources, split: Split = "train", epoch: int = 0, seed: int = 0,
    workers: int = 0, first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    samples = SampleSet(sources, split, 40, 64, seed, Augmentation())
    images, labels = zip(*samples.load(epoch, 16, workers, first), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_set_is_balanced_and_of_the_asked_size(sources: Sources) -> None:
    images, labels = drawn(sources)
    assert images.shape == (40, 64, 64, 3)
    assert images.dtype == torch.uint8
    assert (labels > 0).sum() == 20


def test_a_label_names_the_catalog_s_picture(sources: Sources) -> None:
    catalog = sources.of("catalog", "train")
    places = SampleSet(sources, "train", 40, 64, 0, Augmentation()).sources_drawn()
    for place, label in zip(places, drawn(sources)[1].tolist(), strict=True):
        source = sources.pictures[place]
        assert (label > 0) == (source.kind == "catalog")
        assert not label or catalog[label - 1] == source


def test_a_sample_depends_on_its_number_alone(sources: Sources) -> None:
    images, _ = drawn(sources)
    assert torch.equal(drawn(sources, workers=2)[0], images)
    assert torch.equal(drawn(sources, first=1)[0], images[16:])


def test_a_network_may_learn_from_further_crops_than_it_is_measured_by(
    sources: Sources, config_of: Callable[..., RunConfig]
) -> None:
    config = config_of(least_area=0.2)
    splits: tuple[Split, ...] = ("train", "val")
    least = [samples_of(config, sources, s).augmentation.crop_area[0] for s in splits]
    assert least == [0.2, 0.5]


@pytest.mark.parametrize("catalog", [4, 5])
def test_every_picture_of_the_catalog_calibrates_and_tests(
    tmp_path: Path, catalog: int
) -> None:
    write_products(tmp_path / "catalog", range(catalog))
    write_products(tmp_path / "others", range(100, 110))
    folders = tmp_path / "catalog", tmp_path / "others"
    sources = gather(*folders, None, tmp_path / "work.rgb", 64)
    samples = SampleSet(sources, "val", 4 * catalog, 64, 0, Augmentation())
    drawn, test = samples.sources_drawn(), samples.is_test()
    places = [n for n, p in enumerate(sources.pictures) if p.kind == "catalog"]
    assert all(sorted(test[drawn == place]) == [False, True] for place in places)


def test_training_draws_anew_each_epoch_and_validation_never(sources: Sources) -> None:
    assert not torch.equal(drawn(sources, epoch=0)[0], drawn(sources, epoch=1)[0])
    val = drawn(sources, "val", epoch=0)[0]
    assert torch.equal(drawn(sources, "val", epoch=1)[0], val)
    assert not torch.equal(drawn(sources, "val", seed=1)[0], val)
    assert not torch.equal(drawn(sources, epoch=0)[0][1::2], val[1::2])


def test_decoys_to_train_on_are_made_into_new_ones(sources: Sources) -> None:
    def plain(split: Split) -> torch.Tensor:
        samples = SampleSet(sources, split, 40, 64, 0, Augmentation(variety=False))
        return torch.cat([images for images, _ in samples.load(0, 16, 0)])

    known, varied = plain("train"), drawn(sources)[0]
    same = (known == varied).flatten(1).all(dim=1)
    assert same[1::2].all()  # the catalog never
    samples = SampleSet(sources, "train", 40, 64, 0, Augmentation())
    for number in range(0, 40, 2):
        whole = sources.pixels(sources.pictures[samples.sources_drawn()[number]])
        draw = np.random.default_rng([*samples.key(0), number])
        expected = vary(sample(whole, draw, Augmentation(), 64), draw)
        assert np.array_equal(varied[number], expected)
    assert torch.equal(plain("val"), drawn(sources, "val")[0])


def test_a_varied_decoy_is_the_same_picture_mirrored_recoloured_or_bent() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    expected = {
        flipped[..., order].tobytes()
        for flipped in (picture, picture[:, ::-1])
        for order in permutations(range(3))
    }
    made = [vary(picture, np.random.default_rng(n)) for n in range(200)]
    assert {m.tobytes() for m in made} > expected
    bent = [m for m in made if m.tobytes() not in expected]
    assert 70 < len(bent) < 130


def test_a_bent_channel_follows_an_exponent_of_its_own() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    darkest = ramp[0, 0]
    found = set()
    for number in range(60):
        made = vary(ramp, np.random.default_rng(number))
        upright = made if (made[0, 0] == darkest).all() else made[:, ::-1]
        levels = upright.reshape(256, 3)[40:250].astype(float) / 255
        inputs = np.log(np.arange(40, 250) / 255)[:, None]
        exponents = (np.log(levels) * inputs).sum(0) / (inputs**2).sum()
        assert np.abs(np.log(levels) - inputs * exponents).max() < 0.1
        assert np.abs(np.log(exponents)).max() < 0.52
        found.update(exponents.round(2).tolist())
    assert len(found) > 40 and min(found) < 0.7 and max(found) > 1.4


def test_an_alteration_keeps_to_its_ranges() -> None:
    image = product(0)
    areas, sides = [], []
    for number in range(300):
        draw = np.random.default_rng(number)
        altered = Image.open(io.BytesIO(augment(image, draw, Augmentation())))
        assert altered.format == "JPEG"
        sides.append(max(altered.size))
        areas.append(altered.width * altered.height)
    assert min(sides) >= 48 and max(sides) <= 256
    assert len({*sides}) > 50  # resized to many sizes
    whole = Augmentation(side=(256, 256))
    for number in range(300):
        data = augment(image, np.random.default_rng(number), whole)
        width, height = Image.open(io.BytesIO(data)).size
        assert width * height >= 0.49 * 256 * 256


def test_half_of_what_was_made_smaller_is_enlarged_to_the_size_it_had() -> None:
    ranges = Augmentation(1, (1, 1), 1, side=(48, 60), quality=(95, 95))
    sides, fine = [], np.asarray(product(0)).astype(int)
    for number in range(60):
        data = augment(product(0), np.random.default_rng(number), ranges)
        altered = Image.open(io.BytesIO(data))
        sides.append(max(altered.size))
        if sides[-1] == 256:  # blurred
            made = np.asarray(altered).astype(int)
            assert (
                np.abs(np.diff(made, axis=1)).mean() < np.abs(np.diff(fine, axis=1)).mean()
            )
    assert 20 <= sides.count(256) <= 40
    assert all(48 <= side <= 60 for side in sides if side != 256)


@pytest.mark.parametrize("factor", [0.2, 0.43, 0.81, 1.0, 2.3])
def test_a_picture_is_resized_as_pillow_does_it(factor: float) -> None:
    pixels = np.asarray(product(4))[5:178, 20:231]  # a view, as a crop is
    size = (round(211 * factor), round(173 * factor))
    made = bicubic(pixels, size[1], size[0])
    expected = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    assert made.shape == expected.shape
    apart = np.abs(made.astype(int) - expected)
    assert apart.max() <= 2 and apart.mean() < 0.05


@pytest.mark.parametrize("quality", [10, 50, 77, 95])
def test_a_picture_is_compressed_as_pillow_does_it(quality: int) -> None:
    image, file = product(4).crop((20, 5, 231, 178)), io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    made = Image.open(io.BytesIO(compress(np.asarray(image), quality)))
    assert np.array_equal(np.asarray(made), np.asarray(Image.open(file)))


def test_both_classes_go_through_the_same_alterations(sources: Sources) -> None:
    # Whatever the label, a sample is its picture altered by the draws of its number.
    plain = Augmentation(variety=False)
    samples = SampleSet(sources, "train", 40, 64, 0, plain)
    images = np.concatenate([images.numpy() for images, _ in samples.load(2, 16, 0)])
    drawn_of = [sources.pictures[place] for place in samples.sources_drawn(2)]
    for number, image in enumerate(images):
        draw = np.random.default_rng([*samples.key(2), number])
        expected = sample(sources.pixels(drawn_of[number]), draw, plain, 64)
        assert np.array_equal(image, expected)
    assert {source.kind for source in drawn_of} == {"catalog", "other"}


def test_where_nothing_is_altered_the_picture_comes_through() -> None:
    whole, untouched = np.asarray(product(1)), Augmentation(probability=0)
    still = sample(whole, np.random.default_rng(0), untouched, 64)
    expected = np.asarray(product(1).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.abs(still.astype(int) - expected).mean() < 2


def test_a_worker_that_is_killed_is_told_in_a_sentence(sources: Sources) -> None:
    samples = SampleSet(sources, "train", 6400, 64, 0, Augmentation())
    batches = samples.load(0, 64, workers=1)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(InputError, match="a process was killed: too little memory"):
        list(batches)
