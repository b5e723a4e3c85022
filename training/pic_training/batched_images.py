"""What Pillow and libjpeg do to one picture, done to many at once by matrix products.

Pictures are float tensors of shape (N, side, channels, side), rows first, levels 0..255,
each in the upper left corner: so neither rows nor columns need be moved to be multiplied.
Below and to the right of a picture its last row and column repeat, as for an encoder.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL.JpegImagePlugin import JpegImageFile

from pic_training.augmentation import compress

Kernel = Callable[[torch.Tensor], torch.Tensor]

BLOCK = 8
"""Pixels along the side of what JPEG transforms at once."""


def cubic(x: torch.Tensor) -> torch.Tensor:
    """Pillow's BICUBIC (Keys 1981, a = -1/2)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def triangle(x: torch.Tensor) -> torch.Tensor:
    """Pillow's BILINEAR."""
    return (1 - x.abs()).clamp_min(0)


def weights(
    kernel: Kernel,
    start: torch.Tensor,
    length: torch.Tensor,
    target: torch.Tensor,
    given: int,
    made: int,
) -> torch.Tensor:
    """Weight of each of `given` pixels in each of `made`, float32, shape (N, made, given).

    Along one axis, `length` pixels from `start` become `target`; int64, shape (N,). As in
    Pillow a kernel widens where the picture shrinks. Past the target its last one repeats.
    """
    place = torch.arange(made, device=start.device)[None, :, None]
    place = torch.minimum(place, (target - 1)[:, None, None])
    source = torch.arange(given, device=start.device)[None, None, :]
    scale = (length / target)[:, None, None]
    begin = start[:, None, None]
    centre = begin + (place + 0.5) * scale
    weight = kernel((source + 0.5 - centre) / scale.clamp_min(1))
    inside = (source >= begin) & (source < begin + length[:, None, None])
    weight = torch.where(inside, weight, 0.0)
    return weight / weight.sum(dim=2, keepdim=True)


def multiplied(
    images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Images (N, H, C, W) by matrices (N, h, H) and (N, w, W): (N, h, C, w)."""
    count, height, channels, width = images.shape
    half = rows @ images.reshape(count, height, channels * width)
    whole = half.reshape(count, -1, width) @ columns.transpose(1, 2)
    return whole.reshape(count, rows.shape[1], channels, columns.shape[1])


def levels(images: torch.Tensor) -> torch.Tensor:
    """To what 8 bits hold."""
    return images.round().clamp(0, 255)


class Jpeg:
    """libjpeg's codec at 4:2:0, for canvases of `side` pixels, a multiple of 16.

    What it decodes may be scaled to 1..8 eighths, as libjpeg does it: by a transform of
    that many coefficients and, for colours at half the resolution, of twice as many.
    """

    def __init__(self, side: int, device: torch.device, dtype: torch.dtype) -> None:
        whole, half = side // BLOCK, side // BLOCK // 2

        def held(matrices: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(matrices).to(device, dtype)

        # Of the brightness and of the colours; what decodes them, by eighths less one.
        coded = _cosines(BLOCK).T / BLOCK
        self._forward = [held([_blocks(coded, count)]) for count in (whole, half)]
        grey = [_blocks(_scaled(eighths), whole, side) for eighths in range(1, 9)]
        colour = [_blocks(_scaled(2 * eighths), half, side) for eighths in range(1, 8)]
        colour.append(_enlarged(side // 2) @ _blocks(_cosines(BLOCK), half))
        self._inverse = [held(grey), held(colour)]
        # Means of blocks are exact in half precision; libjpeg's are eight times as large.
        self._tables = [(table / BLOCK).to(device, dtype) for table in quantisation()]

    def __call__(
        self,
        images: torch.Tensor,
        height: torch.Tensor,
        quality: torch.Tensor,
        eighths: torch.Tensor,
    ) -> torch.Tensor:
        """Compressed at `quality` (1..100) and decoded at `eighths` (1..8) of the scale.

        Images as above with 3 channels, RGB; their height in pixels, and the others, int64,
        shape (N,).
        """
        count, side = images.shape[:2]
        red, green, blue = images.unbind(2)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        # A half goes down, as in jccolor.c.
        both = [(of - 0.501).ceil() for of in ((blue - grey) / 1.772, (red - grey) / 1.402)]
        fours = torch.stack(both, dim=2).reshape(count, side // 2, 2, 2, side // 2, 2)
        y, colours = grey.round()[:, :, None] - 128, fours.mean(dim=(2, 5)).round()
        # Below a picture the last row is repeated once its colours have half the height.
        row = torch.arange(side // 2, device=images.device)[None]
        row = torch.minimum(row, (height[:, None] + 1) // 2 - 1)[:, :, None, None]
        colours = colours.gather(1, row.expand_as(colours))
        planes = [
            self._through(part, number, quality, eighths)
            for number, part in enumerate((y, colours))
        ]
        y, cb, cr = planes[0][:, :, 0], planes[1][:, :, 0], planes[1][:, :, 1]
        red, blue = y + 1.402 * cr, y + 1.772 * cb
        green = y - 0.344136 * cb - 0.714136 * cr
        return levels(torch.stack([red, green, blue], dim=2) + 128)

    def _through(
        self,
        planes: torch.Tensor,
        number: int,
        quality: torch.Tensor,
        eighths: torch.Tensor,
    ) -> torch.Tensor:
        """Brightness (`number` 0) or colours (1), -128..127, coded and decoded."""
        count, side, channels, _ = planes.shape
        forward = self._forward[number].expand(count, -1, -1)
        coefficients = multiplied(planes, forward, forward)
        table = self._tables[number][quality - 1][:, None, :, None, None, :]
        blocks = (count, side // BLOCK, BLOCK, channels, side // BLOCK, BLOCK)
        shares = coefficients.reshape(blocks) / table
        kept = (shares.abs() + 0.5).floor() * shares.sign() * table
        inverse = self._inverse[number][eighths - 1]
        decoded = multiplied(kept.reshape(planes.shape), inverse, inverse)
        return decoded.round().clamp(-128, 127)


def _cosines(points: int) -> torch.Tensor:
    """What makes pixels of cosine coefficients, of which the first is the pixels' mean;
    float64, shape (points, points)."""
    order = torch.arange(points, dtype=torch.float64)
    angle = (2 * order[:, None] + 1) * order[None] * math.pi / (2 * points)
    return torch.where(order == 0, 1.0, math.sqrt(2)) * angle.cos()


def _scaled(points: int) -> torch.Tensor:
    """What makes pixels of a block's coefficients, float64, shape (points, 8)."""
    if points in (1, 2, 4):  # jidctred.c: means of what the whole block would be
        return _cosines(BLOCK).reshape(points, -1, BLOCK).mean(dim=1)
    used = _cosines(points)[:, :BLOCK]  # jidctint.c: a shorter or a longer transform
    return torch.nn.functional.pad(used, (0, BLOCK - used.shape[1]))


def _blocks(matrix: torch.Tensor, count: int, rows: int | None = None) -> torch.Tensor:
    """`count` times the same matrix along the diagonal, filled up to `rows` with zeros."""
    made = torch.kron(torch.eye(count, dtype=matrix.dtype), matrix.contiguous())
    missing = (rows or len(made)) - len(made)
    return torch.nn.functional.pad(made, (0, 0, 0, missing))


def _enlarged(side: int) -> torch.Tensor:
    """To twice as many pixels as libjpeg's "fancy upsampling" does it, (2 side, side)."""
    own = torch.arange(2 * side) // 2
    beside = (own + torch.arange(2 * side) % 2 * 2 - 1).clamp(0, side - 1)
    one = torch.eye(side, dtype=torch.float64)
    return 0.75 * one[own] + 0.25 * one[beside]


def quantisation() -> tuple[torch.Tensor, torch.Tensor]:
    """By what an encoder divides coefficients of brightness and of colours at quality 1, 2,
    ..., 100; uint8, shape (100, 8, 8)."""
    tables: tuple[list[int], list[int]] = ([], [])
    for quality in range(1, 101):
        file = io.BytesIO(compress(np.zeros((1, 1, 3), np.uint8), quality))
        with JpegImageFile(file) as image:
            for number, table in enumerate(tables):
                table += image.quantization[number]
    grey, colour = (
        torch.tensor(t, dtype=torch.uint8).reshape(-1, BLOCK, BLOCK) for t in tables
    )
    return grey, colour
