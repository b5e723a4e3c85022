import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.images import DecodedImage, ImageError, decode, is_blank


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mean_color(decoded: DecodedImage) -> tuple[float, ...]:
    return tuple(decoded.pixels.reshape(-1, 3).mean(axis=0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_format_gives_rgb_pixels_of_the_asked_size(kind: str) -> None:
    decoded = decode(encoded(Image.new("RGB", (120, 80), (200, 100, 50)), kind), 32)
    assert decoded.pixels.shape == (32, 32, 3)
    assert decoded.pixels.dtype == np.uint8
    assert (decoded.width, decoded.height, decoded.format) == (120, 80, kind)
    assert mean_color(decoded) == pytest.approx((200, 100, 50), abs=3)


@pytest.mark.parametrize("channel", range(3))
def test_a_picture_with_something_in_one_channel_is_not_blank(channel: int) -> None:
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[::2, :, channel] += 2  # deviates by one level
    assert is_blank(pixels)
    pixels[::2, :, channel] += 8  # by five
    assert not is_blank(pixels)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 64, 32))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    pixels = decode(encoded(image, "JPEG", exif=exif), 16).pixels
    assert pixels[:6].mean() < 20 and pixels[-6:].mean() > 235


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert mean_color(decode(encoded(clear, "PNG"), 8)) == (255, 255, 255)
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([10, 20, 30] * 256)
    file = encoded(palette, "PNG", transparency=0)
    assert mean_color(decode(file, 8)) == (255, 255, 255)


def test_sixteen_bit_greys_keep_their_brightness() -> None:
    samples = np.full((20, 20), 0x8080, np.uint16)
    decoded = decode(encoded(Image.fromarray(samples), "PNG"), 8)
    assert mean_color(decoded) == pytest.approx((128, 128, 128), abs=1)


@pytest.mark.parametrize(
    ("samples", "level"),
    [
        (np.full((20, 20), 0.5, np.float32), 128),
        (np.full((20, 20), 128.0, np.float32), 128),
        (np.full((20, 20), 1.02, np.float32), 255),
        (np.full((20, 20), 3_000_000, np.int32), 255),
    ],
)
def test_samples_of_other_depths_keep_their_brightness(
    samples: NDArray[Any], level: int
) -> None:
    image = Image.fromarray(samples)
    assert mean_color(decode(encoded(image, "TIFF"), 8)) == pytest.approx(
        (level, level, level), abs=1
    )


def test_a_sample_that_is_no_number_is_black_and_the_others_stay() -> None:
    samples = np.full((20, 20), 0.5, np.float32)
    samples[0, 0] = np.nan
    decoded = decode(encoded(Image.fromarray(samples), "TIFF"), 1)
    assert mean_color(decoded) == pytest.approx((128, 128, 128), abs=2)


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("RGB", (20, 20), (250, 5, 5)).convert("CMYK")
    assert mean_color(decode(encoded(image, "JPEG"), 8)) == pytest.approx(
        (250, 5, 5), abs=6
    )


def test_an_animation_counts_as_its_first_frame() -> None:
    frames = [Image.new("RGB", (20, 20), c) for c in ("white", "black")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert mean_color(decode(file, 8)) == (255, 255, 255)


def test_a_scaled_jpeg_stays_near_a_full_decode() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((800, 640), Image.Resampling.BICUBIC)
    jpeg, full = encoded(image, "JPEG", quality=90), encoded(image, "PNG")
    difference = decode(jpeg, 64).pixels.astype(int) - decode(full, 64).pixels
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am no picture", "not an image"),
        (encoded(Image.effect_noise((99, 99), 90), "JPEG")[:900], "truncated"),
    ],
)
def test_bad_bytes_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data, 32)


def test_a_picture_over_the_pixel_limit_is_refused_before_decoding() -> None:
    data = encoded(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(ImageError, match="3000 x 3000 pixels exceed the limit"):
        decode(data, 32, max_pixels=1_000_000)
