"""Product pictures drawn by code: each is one product on a light background.

Two products differ in shape, colours, pattern and label, as look-alikes on a shelf
do. The same seed draws the same product.
"""

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 256
_NAMES = [
    "Aqua",
    "Brisk",
    "Cedar",
    "Dune",
    "Ember",
    "Fjord",
    "Glow",
    "Hazel",
    "Iris",
    "Jade",
    "Koko",
    "Luma",
    "Mint",
    "Nova",
    "Opal",
]
_KINDS = ["Tea", "Soap", "Salt", "Milk", "Rice", "Oil", "Jam", "Tonic", "Cocoa", "Balm"]

Box = tuple[float, float, float, float]


def product(seed: int) -> Image.Image:
    """Draw product number `seed` as an RGB picture of 256 x 256 pixels."""
    draw_from = random.Random(seed)
    light = draw_from.randint(225, 252)
    image = Image.new("RGB", (SIDE, SIDE), (light, light, draw_from.randint(225, 252)))
    draw = ImageDraw.Draw(image)
    body = _colour(draw_from)
    left, top = draw_from.uniform(30, 70), draw_from.uniform(20, 55)
    box = (left, top, SIDE - left, SIDE - draw_from.uniform(14, 30))
    _shadow(image, box)
    _body(draw, draw_from, box, body)
    _pattern(draw, draw_from, box)
    _label(draw, draw_from, box)
    return image.filter(ImageFilter.GaussianBlur(0.6))


def write_products(folder: Path, seeds: Iterable[int]) -> list[Path]:
    """Write products as JPEG files named after their seed; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in seeds:
        path = folder / f"product-{seed:05d}.jpg"
        product(seed).save(path, quality=90)
        paths.append(path)
    return paths


def busy(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A picture without margins: a product on a coarse pattern that reaches every edge."""
    cells = np.random.default_rng(1).integers(0, 256, (9, 9, 3), np.uint8)
    picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)
    picture.paste(product(4).resize((width // 2, height // 2)), (width // 4, height // 4))
    return picture


def likeness(found: Image.Image | None, original: Image.Image) -> float:
    """Correlation of the two, laid over each other at 16 x 16 pixels."""
    assert found is not None
    one, other = (
        np.asarray(p.convert("L").resize((16, 16)), float).ravel()
        for p in (found, original)
    )
    return float(np.corrcoef(one, other)[0, 1])


def _colour(draw_from: random.Random) -> tuple[int, int, int]:
    return (
        draw_from.randint(10, 235),
        draw_from.randint(10, 235),
        draw_from.randint(10, 235),
    )


def _shadow(image: Image.Image, box: Box) -> None:
    left, _, right, bottom = box
    draw = ImageDraw.Draw(image)
    draw.ellipse((left - 8, bottom - 10, right + 8, bottom + 8), fill=(190, 190, 195))


def _body(
    draw: ImageDraw.ImageDraw,
    draw_from: random.Random,
    box: Box,
    colour: tuple[int, int, int],
) -> None:
    left, top, right, bottom = box
    middle, third = (left + right) / 2, (right - left) / 3
    match draw_from.randrange(5):
        case 0:  # box
            draw.rectangle(box, fill=colour)
        case 1:  # jar
            draw.rounded_rectangle((left, top + 24, right, bottom), 26, fill=colour)
            draw.rectangle((left + 12, top, right - 12, top + 26), fill=_colour(draw_from))
        case 2:  # bottle
            draw.rectangle(
                (middle - third / 2, top, middle + third / 2, bottom), fill=colour
            )
            draw.rounded_rectangle((left, top + 60, right, bottom), 22, fill=colour)
            cap = (middle - third / 2, top - 6, middle + third / 2, top + 14)
            draw.rectangle(cap, fill=_colour(draw_from))
        case 3:  # bag
            corners = [(left + 14, top), (right - 14, top), (right, bottom), (left, bottom)]
            draw.polygon(corners, fill=colour)
        case _:  # tin
            draw.ellipse((left, bottom - 34, right, bottom), fill=colour)
            draw.rectangle((left, top + 16, right, bottom - 16), fill=colour)
            draw.ellipse((left, top, right, top + 34), fill=_colour(draw_from))


def _pattern(draw: ImageDraw.ImageDraw, draw_from: random.Random, box: Box) -> None:
    left, top, right, bottom = box
    colour = _colour(draw_from)
    kind = draw_from.randrange(3)
    for step in range(draw_from.randint(2, 5)):
        if kind == 0:
            y = top + 40 + step * 26
            draw.rectangle((left + 6, y, right - 6, y + 8), fill=colour)
        elif kind == 1:
            x, y = (
                draw_from.uniform(left + 14, right - 30),
                draw_from.uniform(top + 40, bottom - 40),
            )
            draw.ellipse((x, y, x + 18, y + 18), fill=colour)
        else:
            x = left + 12 + step * 24
            draw.line((x, bottom - 20, x + 30, top + 50), fill=colour, width=6)


def _label(draw: ImageDraw.ImageDraw, draw_from: random.Random, box: Box) -> None:
    left, top, right, bottom = box
    middle = draw_from.uniform(top + 80, bottom - 60)
    area = (left + 8, middle - 26, right - 8, middle + 26)
    draw.rectangle(area, fill=_colour(draw_from))
    for line, size in ((draw_from.choice(_NAMES), 26), (draw_from.choice(_KINDS), 18)):
        draw.text(
            (left + 14, middle - 24), line, _colour(draw_from), ImageFont.load_default(size)
        )
        middle += 26
