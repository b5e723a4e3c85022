"""Pictures altered many at once, beside what Pillow and libjpeg make of each."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import product
from PIL import Image
from simplejpeg import decode_jpeg

from pic_training.augmentation import compress
from pic_training.batched_images import (
    Jpeg,
    Kernel,
    cubic,
    levels,
    multiplied,
    triangle,
    weights,
)

SIDE = 256
PILLOW = [(cubic, Image.Resampling.BICUBIC), (triangle, Image.Resampling.BILINEAR)]


def on_canvas(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image, np.float32)
    missing = [(0, SIDE - length) for length in pixels.shape[:2]]
    canvas = np.pad(pixels, [*missing, (0, 0)], mode="edge")
    return torch.from_numpy(canvas).transpose(1, 2)[None]


def apart(images: torch.Tensor, expected: object) -> NDArray[np.float32]:
    right = np.asarray(expected, np.float32)
    height, width = right.shape[:2]
    return np.abs(images[0].transpose(1, 2)[:height, :width].numpy() - right)


@pytest.mark.parametrize("box", [(0, 0, 200, 150), (13, 7, 120, 140), (3, 2, 40, 30)])
@pytest.mark.parametrize("target", [(64, 64), (150, 210), (33, 21)])
@pytest.mark.parametrize(("kernel", "filtered"), PILLOW)
def test_a_piece_is_resized_as_pillow_does_it(
    box: tuple[int, int, int, int],
    target: tuple[int, int],
    kernel: Kernel,
    filtered: Image.Resampling,
) -> None:
    left, top, width, height = box
    image = product(3).resize((200, 150))
    cut = image.crop((left, top, left + width, top + height))
    rows, columns = (
        weights(kernel, *(torch.tensor([n]) for n in axis), SIDE, SIDE)
        for axis in ((top, height, target[0]), (left, width, target[1]))
    )
    made = levels(multiplied(on_canvas(image), rows, columns))
    difference = apart(made, cut.resize(target[::-1], filtered))
    assert difference.max() <= 1
    assert difference.mean() < 0.1


def test_beyond_a_picture_its_last_pixels_repeat() -> None:
    image = product(3).resize((200, 150))
    sizes = [torch.tensor([n]) for n in (0, 90, 70)]
    axis = weights(triangle, *sizes, SIDE, SIDE)
    made = multiplied(on_canvas(image), axis, axis)[0]
    assert torch.equal(made[70:], made[69:70].expand(SIDE - 70, -1, -1))
    assert torch.equal(made[..., 70:], made[..., 69:70].expand(-1, -1, SIDE - 70))


# Not of whole blocks, flat ones too.
@pytest.mark.parametrize("size", [(211, 173), (200, 150), (129, 18), (48, 12)])
@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("eighths", range(1, 9))
def test_a_jpeg_is_what_libjpeg_makes_of_it(
    size: tuple[int, int], quality: int, eighths: int
) -> None:
    image = product(5).resize(size)
    width, height = (-(-length * eighths // 8) for length in size)
    data = compress(np.asarray(image), quality)
    expected = decode_jpeg(data, "RGB", min_width=width, min_height=height)
    jpeg = Jpeg(SIDE, torch.device("cpu"), torch.float32)
    each = (torch.tensor([n]) for n in (size[1], quality, eighths))
    made = jpeg(on_canvas(image), *each)
    assert apart(made, expected).mean() < (0.5 if min(size) > 100 else 1.5)


def test_each_picture_has_a_quality_and_a_scale_of_its_own() -> None:
    images = torch.cat([on_canvas(product(n)) for n in (1, 2)])
    jpeg = Jpeg(SIDE, torch.device("cpu"), torch.float32)
    each = [torch.tensor(pair) for pair in ([256, 130], [20, 90], [8, 3])]
    both = jpeg(images, *each)
    for n in range(2):
        part = slice(n, n + 1)
        assert torch.equal(both[part], jpeg(images[part], *(of[part] for of in each)))
