"""What happens to pictures on their way, one edit at a time and at stated strengths.

Families marked as trained are those that `augmentation` gives copies; under the others a
network meets copies for the first time when it is evaluated. Decoys it has met mirrored
and recoloured: two of these families it knows as signs of a decoy, if of anything.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from pic_training.augmentation import Augmentation, augment

Draw = np.random.Generator


@dataclass(frozen=True)
class Edit:
    """One kind of edit at one strength; `apply` returns the bytes of the edited file."""

    family: str
    strength: str
    trained: bool
    apply: Callable[[Image.Image, Draw], bytes]

    @property
    def name(self) -> str:
        """Family and strength."""
        return f"{self.family} {self.strength}".strip()


def _file(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return file.getvalue()


def _jpeg(quality: int, image: Image.Image, _: Draw) -> bytes:
    return _file(image, quality=quality)


def _webp(quality: int, image: Image.Image, _: Draw) -> bytes:
    return _file(image, "WEBP", quality)


def _scale(factor: float, image: Image.Image, _: Draw) -> bytes:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return _file(image.resize(size, Image.Resampling.BICUBIC))


def _crop(area: float, image: Image.Image, draw: Draw) -> bytes:
    return _file(_cut(image, area, draw))


def _cut(image: Image.Image, area: float, draw: Draw) -> Image.Image:
    width, height = (max(1, round(side * area**0.5)) for side in image.size)
    left = int(draw.integers(0, image.width - width + 1))
    top = int(draw.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _all_three(image: Image.Image, draw: Draw) -> bytes:
    return augment(image, draw, Augmentation(probability=1))


def _pristine(image: Image.Image, _: Draw) -> bytes:
    return _file(image, "PNG")


def _flip(image: Image.Image, _: Draw) -> bytes:
    return _file(ImageOps.mirror(image))


def _rotate(degrees: float, image: Image.Image, draw: Draw) -> bytes:
    sign = 1 if draw.random() < 0.5 else -1
    turned = image.rotate(sign * degrees, Image.Resampling.BICUBIC, fillcolor="white")
    return _file(turned)


def _border(share: float, image: Image.Image, draw: Draw) -> bytes:
    width = max(1, round(share * max(image.size)))
    color = tuple(int(v) for v in draw.integers(0, 256, 3))
    return _file(ImageOps.expand(image, width, fill=color))


def _text(image: Image.Image, draw: Draw) -> bytes:
    image = image.copy()
    pen = ImageDraw.Draw(image)
    size = max(8, image.height // 8)
    place = (image.width * draw.uniform(0, 0.4), image.height * draw.uniform(0, 0.85))
    font = ImageFont.load_default(size)
    pen.text(place, "SALE -50%", "red", font, stroke_width=1, stroke_fill="white")
    return _file(image)


def _logo(image: Image.Image, draw: Draw) -> bytes:
    image = image.copy()
    pen = ImageDraw.Draw(image)
    side = min(image.size) * 0.22
    x, y = (draw.uniform(0, length - side) for length in image.size)
    pen.ellipse((x, y, x + side, y + side), fill=(20, 60, 200), outline="white", width=3)
    return _file(image)


def _screenshot(image: Image.Image, _: Draw) -> bytes:
    """The picture in a phone's viewer: a dark bar above, a light one below."""
    bar = max(4, image.height // 10)
    frame = Image.new("RGB", (image.width + bar, image.height + 3 * bar), (245, 245, 245))
    pen = ImageDraw.Draw(frame)
    pen.rectangle((0, 0, frame.width, bar), fill=(35, 35, 40))
    pen.text((bar // 2, 0), "12:30", "white", ImageFont.load_default(max(6, bar - 3)))
    frame.paste(image, (bar // 2, bar + bar // 2))
    return _file(frame)


def _blur(radius: float, image: Image.Image, _: Draw) -> bytes:
    return _file(image.filter(ImageFilter.GaussianBlur(radius)))


def _sharpen(image: Image.Image, _: Draw) -> bytes:
    return _file(image.filter(ImageFilter.UnsharpMask(2, 200)))


def _warm(image: Image.Image, _: Draw) -> bytes:
    red, green, blue = image.split()
    warm = (red.point(lambda v: min(255, v * 1.15)), green, blue.point(lambda v: v * 0.8))
    return _file(ImageEnhance.Color(Image.merge("RGB", warm)).enhance(0.7))


def _grey(image: Image.Image, _: Draw) -> bytes:
    return _file(image.convert("L").convert("RGB"))


EDITS = (
    Edit("pristine", "", True, _pristine),
    *(Edit("JPEG quality", str(q), True, partial(_jpeg, q)) for q in (80, 50, 20, 10)),
    *(Edit("scale", str(f), True, partial(_scale, f)) for f in (0.75, 0.5, 0.25)),
    *(Edit("crop to area", str(a), True, partial(_crop, a)) for a in (0.9, 0.7, 0.5)),
    Edit("crop, scale, JPEG", "", True, _all_three),
    Edit("flip", "", False, _flip),
    *(Edit("rotation", f"{d} deg", False, partial(_rotate, d)) for d in (2, 5)),
    *(Edit("border", f"{s:.0%}", False, partial(_border, s)) for s in (0.05, 0.15)),
    Edit("text overlay", "", False, _text),
    Edit("logo overlay", "", False, _logo),
    Edit("screenshot frame", "", False, _screenshot),
    *(Edit("blur", f"{r} px", False, partial(_blur, r)) for r in (1, 2)),
    Edit("sharpen", "", False, _sharpen),
    Edit("colour filter", "warm", False, _warm),
    Edit("colour filter", "grey", False, _grey),
    *(Edit("WebP quality", str(q), False, partial(_webp, q)) for q in (80, 30)),
)
