"""Is this picture a copy of that one? Drawn products, altered as on their way."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from pictures import SIDE, product
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from pic_daemon.confirmation import agreement
from pic_daemon.landmarks import Landmarks, landmarks

SURE = 0.83  # one look-alike in a thousand exceeds it: bench/results/confirmation.md


def stored(picture: Image.Image) -> Landmarks:
    """As an index keeps it."""
    return Landmarks.from_bytes(landmarks(picture).to_bytes())


def saved(picture: Image.Image, kind: str = "JPEG", quality: int = 90) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def half_the_area(picture: Image.Image) -> Image.Image:
    side = round(SIDE * 0.5**0.5)
    return picture.crop((40, 50, 40 + side, 50 + side))


def written_over(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    ImageDraw.Draw(picture).text((30, 180), "SALE -50%", "red", font_size=32)
    return picture


def screenshot(picture: Image.Image) -> Image.Image:
    frame = Image.new("RGB", (SIDE + 24, SIDE + 72), (245, 245, 245))
    ImageDraw.Draw(frame).rectangle((0, 0, SIDE + 24, 24), fill=(35, 35, 40))
    frame.paste(picture, (12, 36))
    return frame


def paler(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Color(ImageEnhance.Brightness(picture).enhance(1.1)).enhance(0.7)


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "compressed hard": lambda p: saved(p, quality=10),
    "shrunk to 48 px": lambda p: saved(p.resize((48, 48))),
    "cropped to half its area": half_the_area,
    "cropped, shrunk and compressed": lambda p: saved(half_the_area(p).resize((64, 64))),
    "mirrored": ImageOps.mirror,
    "cropped and mirrored": lambda p: ImageOps.mirror(half_the_area(p)),
    "turned by 5 degrees": lambda p: p.rotate(5, fillcolor="white"),
    "turned by 40 degrees": lambda p: p.rotate(40, expand=True, fillcolor="white"),
    "stretched by a tenth": lambda p: p.resize((SIDE, round(SIDE * 0.9))),
    "framed": lambda p: ImageOps.expand(p, 38, fill=(200, 30, 90)),
    "in a screenshot": screenshot,
    "written over": written_over,
    "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(3)),
    "sharpened": lambda p: p.filter(ImageFilter.UnsharpMask(2, 200)),
    "without colour": lambda p: p.convert("L").convert("RGB"),
    "brighter and paler": paler,
    "saved as WebP": lambda p: saved(p, "WEBP", 30),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_copy_agrees_with_its_original(alteration: str) -> None:
    found = [
        agreement(landmarks(ALTERATIONS[alteration](product(n))), stored(product(n)))
        for n in range(4)
    ]
    assert min(found) > SURE, found


def test_another_product_of_the_same_kind_does_not_agree() -> None:
    products = [stored(product(n)) for n in range(12)]
    others = [agreement(a, b) for a in products for b in products if a is not b]
    assert max(others) < SURE


@pytest.mark.parametrize("alteration", ["cropped to half its area", "mirrored", "framed"])
def test_an_altered_look_alike_does_not_agree_either(alteration: str) -> None:
    altered = landmarks(ALTERATIONS[alteration](product(1)))
    assert max(agreement(altered, stored(product(n))) for n in (0, *range(2, 10))) < SURE


def test_the_same_product_in_another_colour_does_not_agree() -> None:
    hue, *rest = product(3).convert("HSV").split()
    recoloured = Image.merge("HSV", [hue.point(lambda v: (v + 110) % 256), *rest])
    assert agreement(landmarks(recoloured.convert("RGB")), stored(product(3))) < SURE


def test_the_same_package_with_another_label_does_not_agree() -> None:
    def package(draw_label: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
        picture = product(3)
        pen = ImageDraw.Draw(picture)
        pen.rectangle((60, 70, 196, 200), fill=(250, 250, 240))
        draw_label(pen)
        return picture

    stars = package(lambda pen: pen.regular_polygon((128, 135, 55), 5, fill=(20, 90, 160)))
    lines = package(
        lambda pen: [
            pen.line((70, y, 186, y + 20), (20, 90, 160), 9) for y in range(80, 180, 22)
        ]
    )
    assert agreement(landmarks(stars), stored(lines)) < SURE
    assert agreement(landmarks(stars), stored(stars)) > SURE


@pytest.mark.parametrize(
    "nothing",
    [
        Image.new("RGB", (200, 150), "white"),
        Image.new("RGB", (1, 1)),
        Image.linear_gradient("L").convert("RGB"),
    ],
    ids=["uniform", "one pixel", "a gradient"],
)
def test_a_picture_without_structure_agrees_with_nothing(nothing: Image.Image) -> None:
    assert agreement(landmarks(nothing), stored(product(0))) == 0
    assert agreement(landmarks(product(0)), stored(nothing)) == 0
    assert agreement(landmarks(nothing), stored(nothing)) == 0


@pytest.mark.parametrize("size", [(300, 2), (2, 300), (5, 5), (900, 40)])
def test_odd_sizes_are_compared_without_fuss(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    odd = landmarks(Image.fromarray(noise))
    assert agreement(odd, stored(product(0))) < SURE
    assert agreement(landmarks(product(0)), odd) < SURE


def test_what_is_kept_of_a_picture_is_small_and_says_the_same() -> None:
    made = landmarks(product(5))
    data = made.to_bytes()
    kept = Landmarks.from_bytes(data)
    assert len(data) < 22_000
    assert np.array_equal(kept.features, made.features)
    copy = landmarks(half_the_area(product(5)))
    assert agreement(copy, kept) == pytest.approx(agreement(copy, made), abs=0.05)


@pytest.mark.parametrize("harm", [b"", b"PLM1", b"x" * 500])
def test_bytes_that_are_no_landmarks_are_refused(harm: bytes) -> None:
    with pytest.raises(ValueError, match="no landmarks"):
        Landmarks.from_bytes(harm)
    whole = landmarks(product(5)).to_bytes()
    with pytest.raises(ValueError, match="no landmarks"):
        Landmarks.from_bytes(whole[:-1])
