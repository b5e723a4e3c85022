"""From the bytes of a file to the pixels a network sees.

Training and serving both decode here, so that a network meets in production the pixels
it was trained on: exactly, or where a GPU made its samples to a level or so on average.
"""

import contextlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
PATTERNS = (
    "*.jpg", "*.jpeg", "*.jpe", "*.jfif", "*.png", "*.webp", "*.gif", "*.bmp",
    "*.tif", "*.tiff", "*.avif",
)  # fmt: skip
"""File names taken for images where the user names no others; case is ignored."""

RESIZE_FILTER = "bilinear"
COLOR = "sRGB, EXIF orientation applied, transparency over white, first frame"
MAX_PIXELS = 200_000_000
"""Largest width x height decoded by default: above any camera, below a bomb."""

BLANK_LEVELS = 3.0
"""A picture whose every channel deviates less than this (0..255) is nearly uniform."""

# What Pillow's decoders raise for bad data, after Pillow's own fuzz targets.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    MemoryError,
    ValueError,
    RuntimeError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Image.MAX_IMAGE_PIXELS = None  # open_rgb applies its own limit, with its own words


class ImageError(Exception):
    """These bytes cannot be shown as an image; the message is the reason."""


@dataclass(frozen=True)
class DecodedImage:
    """One decoded file: `pixels` is uint8, shape (size, size, 3), RGB, 0..255.

    `width` and `height` are those of the stored image in pixels, before any
    EXIF rotation; `format` is Pillow's name, such as ``JPEG``. `blank`: the picture is
    nearly uniform, so that there is nothing to recognise.
    """

    pixels: Pixels
    width: int
    height: int
    format: str
    blank: bool = False


def is_blank(pixels: Pixels) -> bool:
    """Whether uint8 pixels of shape (H, W, 3) are nearly uniform."""
    # One channel after the other: mostly the first says it, and numpy is slow across them.
    channels = (pixels[..., channel] for channel in range(3))
    return all(c.std(dtype=np.float32) < BLANK_LEVELS for c in channels)


def decode(data: bytes, size: int, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode a file's bytes and stretch the picture to size x size pixels.

    Raises ImageError where the bytes are no image or hold more than max_pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF and palettes
        try:
            with _open(data, max_pixels) as source:
                width, height = source.size
                name = source.format or "unknown"
                pixels = to_pixels(_rgb(source, data, size), size)
        except _DECODER_ERRORS as error:
            raise ImageError(_reason(error)) from error
    return DecodedImage(pixels, width, height, name, is_blank(pixels))


def open_rgb(
    data: bytes, size: int, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a file's bytes to RGB, upright, its sides at least `size` if they were.

    Returns the picture and the stored (width, height). Raises ImageError as
    `decode` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _open(data, max_pixels) as source:
                stored = source.size
                return _rgb(source, data, size), stored
        except _DECODER_ERRORS as error:
            raise ImageError(_reason(error)) from error


def plain_jpeg(data: bytes, side: int) -> Image.Image:
    """A JPEG's picture in RGB at the smallest scale that leaves both sides at least `side`.

    Twice that cost 0.2 ms more (bench/results/throughput.md). Raises ValueError where
    libjpeg-turbo has anything to say about the file.
    """
    return Image.fromarray(
        decode_jpeg(data, "RGB", min_height=side, min_width=side, strict=True)
    )


def to_pixels(image: Image.Image, size: int) -> Pixels:
    """Stretch an RGB picture to uint8 pixels of shape (size, size, 3)."""
    return np.asarray(
        image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    )


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels exceed the limit of {max_pixels:,} pixels"
        )
    return image


def _rgb(image: Image.Image, data: bytes, side: int) -> Image.Image:
    if plain := _plain_jpeg(image, data, side):
        image = plain
    else:
        image.draft("RGB", (side, side))
        image.load()
    with contextlib.suppress(*_DECODER_ERRORS):  # corrupt EXIF: stays as stored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = _in_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Deeper samples, which Pillow would clip, scaled from what they seem to reach up to:
    8 or 16 bits, else their own maximum; 1, or a little more, in floating point."""
    samples = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    most = float(samples.max(initial=0))
    full = next((scale for scale in (255.0, 65535.0) if most <= scale), most)
    if image.mode == "F" and most <= 2:
        full = 1.0
    return Image.fromarray((samples * (255 / full)).clip(0, 255).astype(np.uint8))


def _plain_jpeg(image: Image.Image, data: bytes, side: int) -> Image.Image | None:
    """A JPEG that libjpeg-turbo decodes without a word; None: Pillow is to decide."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    try:
        plain = plain_jpeg(data, side)
    except ValueError:
        return None
    if exif := image.info.get("exif"):
        plain.info["exif"] = exif
    return plain


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format this service reads"
    if isinstance(error, MemoryError):
        return "decoding needs more memory than there is"
    text = str(error).strip().rstrip(".") or type(error).__name__
    return f"cannot be decoded: {text}" if isinstance(error, SyntaxError) else text
