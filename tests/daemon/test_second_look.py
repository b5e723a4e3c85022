"""What is found within the margins of a network's inputs."""

import numpy as np
import pytest
from pictures import SIDE, busy, likeness, product
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pic_daemon.images import Pixels, to_pixels
from pic_daemon.second_look import second_looks

Colour = str | tuple[int, int, int]


def looks(*pictures: Image.Image, size: int = 64) -> dict[int, Pixels]:
    return second_looks(np.stack([to_pixels(picture, size) for picture in pictures]))


def likeness_of(pixels: Pixels, original: Image.Image) -> float:
    return likeness(Image.fromarray(pixels), original)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_a_border_of_any_colour_is_left_away(share: float, size: int) -> None:
    colours: list[Colour] = ["white", "black", (200, 30, 90)]
    framed = [ImageOps.expand(busy(), round(share * SIDE), colour) for colour in colours]
    found = looks(*framed, size=size)
    assert list(found) == [0, 1, 2]
    for picture, pixels in zip(framed, found.values(), strict=True):
        assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
        whole = likeness_of(to_pixels(picture, size), busy())
        # At 64 pixels a blended line on each side may be left.
        assert likeness_of(pixels, busy()) > max(0.85, whole + 0.1)


@pytest.mark.parametrize("side", range(4))
def test_so_is_one_on_a_single_side(side: int) -> None:
    widths = tuple(60 if number == side else 0 for number in range(4))
    framed = ImageOps.expand(busy(), widths, "white")  # type: ignore[arg-type]
    assert likeness_of(looks(framed)[0], busy()) > 0.9


def test_so_are_uneven_sides() -> None:
    framed = ImageOps.expand(busy(), (50, 5, 12, 30), "white")
    assert likeness_of(looks(framed)[0], busy()) > 0.9
    assert likeness_of(looks(framed, size=224)[0], busy()) > 0.95


@pytest.mark.parametrize("size", [64, 224])
def test_behind_a_border_a_product_keeps_its_own_plain_background(size: int) -> None:
    framed = [ImageOps.expand(product(n), 40, (200, 30, 90)) for n in range(6)]
    found = looks(*framed, size=size)
    assert list(found) == [*range(6)]
    for number, pixels in found.items():
        assert likeness_of(pixels, product(number)) > 0.85
        assert likeness_of(looks(product(number), size=size)[0], product(number)) < 0.85


def test_so_is_a_bar_of_which_nothing_is_left_but_its_title() -> None:
    screen = Image.new("RGB", (SIDE + 20, SIDE + 60), (250, 250, 250))
    pen = ImageDraw.Draw(screen)
    pen.rectangle((0, 0, SIDE + 20, 20), fill=(30, 60, 120))
    pen.text((8, 2), "12:30", "white", ImageFont.load_default(17))
    screen.paste(busy(), (10, 36))
    assert likeness_of(looks(screen)[0], busy()) > 0.95


def test_each_picture_is_seen_as_if_it_were_alone() -> None:
    pictures = [ImageOps.expand(product(n), 5 * n, "white") for n in range(8)] + [busy()]
    together = looks(*pictures)
    assert 8 not in together
    for number, picture in enumerate(pictures):
        alone = looks(picture)
        assert (0 in alone) == (number in together)
        if alone:
            assert np.array_equal(alone[0], together[number])


@pytest.mark.parametrize(
    "picture",
    [
        busy(),
        Image.new("RGB", (300, 200), "white"),
        Image.effect_noise((64, 64), 80).convert("RGB"),
    ],
    ids=["busy", "uniform", "noise"],
)
def test_where_nothing_is_gained_or_left_there_is_no_second_look(
    picture: Image.Image,
) -> None:
    assert looks(picture) == {}


def test_a_margin_too_small_to_change_anything_is_left() -> None:
    for lines, worth in ((2, False), (3, True)):  # 4% of the area is 2.6 lines of 64
        pixels = to_pixels(busy(), 64).copy()
        pixels[:lines] = 255
        assert (second_looks(pixels[None]) != {}) == worth


def test_lines_that_deviate_are_no_margin() -> None:
    for deviation, even in ((4, True), (7, False)):
        pixels = to_pixels(busy(), 64).copy()
        noise = np.random.default_rng(0).normal(128, deviation, (12, 64, 1))
        pixels[:12] = noise.round().astype(np.uint8)
        assert (second_looks(pixels[None]) != {}) == even


def test_a_small_picture_in_a_large_void_stays_as_it_is() -> None:
    void = Image.new("RGB", (1000, 1000), "white")
    void.paste(busy().resize((120, 120)), (440, 440))
    assert looks(void) == {}
