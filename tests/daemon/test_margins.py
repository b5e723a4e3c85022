"""Where a picture's even margins end, on drawn products."""

import io

import pytest
from pictures import SIDE, busy, likeness, product
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pic_daemon.margins import within_margins


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("quality", [90, 70])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_a_border_of_any_colour_is_left_away(share: float, quality: int) -> None:
    for colour in ("white", "black", (200, 30, 90)):
        framed = compressed(ImageOps.expand(busy(), round(share * SIDE), colour), quality)
        assert likeness(framed, busy()) < 0.93
        assert likeness(within_margins(framed), busy()) > 0.95


def test_so_are_borders_within_borders_and_uneven_sides() -> None:
    framed = ImageOps.expand(ImageOps.expand(busy(), 9, "black"), (50, 5, 12, 30), "white")
    assert likeness(within_margins(framed), busy()) > 0.95


def test_a_bar_with_a_title_is_a_margin_too() -> None:
    screen = Image.new("RGB", (SIDE + 20, SIDE + 80), (250, 250, 250))
    pen = ImageDraw.Draw(screen)
    pen.rectangle((0, 0, SIDE + 20, 40), fill=(30, 60, 120))
    pen.text((8, 8), "Photos", "white", ImageFont.load_default(22))
    screen.paste(busy(), (10, 50))
    assert likeness(within_margins(screen), busy()) > 0.95


def test_empty_background_is_left_away_however_much_of_it_there_is() -> None:
    wide = ImageOps.expand(product(3), 30, fill=product(3).getpixel((0, 0)))
    tight, wider = within_margins(product(3)), within_margins(wide)
    assert tight is not None
    assert tight.width < 0.9 * SIDE
    assert likeness(wider, tight) > 0.95


@pytest.mark.parametrize(
    "picture",
    [
        busy(),
        busy(400, 30),
        ImageOps.expand(busy(), 2, fill="white"),
        Image.new("RGB", (300, 200), "white"),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (1, 300)),
    ],
    ids=["busy", "long", "hardly any margin", "uniform", "one pixel", "a line"],
)
def test_where_nothing_is_gained_or_left_there_is_no_other_view(
    picture: Image.Image,
) -> None:
    assert within_margins(picture) is None


def test_a_small_picture_in_a_large_void_stays_as_it_is() -> None:
    void = Image.new("RGB", (1000, 1000), "white")
    void.paste(busy(120, 120), (440, 440))
    assert within_margins(void) is None
