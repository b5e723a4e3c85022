"""Training samples made on the device, for one that is faster than the CPU beside it.

Every picture is rendered on the CPU in several versions, resized and compressed by
the real codec, because nothing else leaves a real codec's traces. The versions lie on
the device as uint8, each with the crop that it was rendered for. There each sample takes
one of them, cuts that crop anywhere, and resamples it with Pillow's own filter, in batches.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pic_training.augmentation import (
    BEND,
    BENT,
    MIRRORED,
    RECOLOURED,
    Augmentation,
    alter,
    compress,
)
from pic_training.distributed import ALONE, Processes
from pic_training.samples import Batch, SampleSet, labels_of, start_worker
from pic_training.sources import Source

MAX_VERSIONS = 16


def versions_for(samples: SampleSet, side: int, room: int) -> int:
    """How many versions of each picture fit into `room` bytes; 0: not even one."""
    pictures = sum(len(samples.sources.of(kind, "train")) for kind in ("catalog", "other"))
    return min(MAX_VERSIONS, room // (pictures * side * side * 3))


@dataclass(frozen=True)
class Pool:
    """Versions of the pictures to draw from, on the device.

    `pixels`: uint8, shape (P, V, side, side, 3), each in the upper left corner;
    `sizes`: int64, shape (P, V, 2), height and width; `crops`, the same, of the piece
    to be cut from it. Pictures are those of the catalog, then the others, in the order
    of `Sources.of`.
    """

    pixels: torch.Tensor
    sizes: torch.Tensor
    crops: torch.Tensor


def render_pool(
    samples: SampleSet, versions: int, side: int, workers: int, device: torch.device
) -> Pool:
    """Render `versions` of each picture to train on, at most `side` pixels long."""
    sources = [*samples.sources.of("catalog", "train"),
               *samples.sources.of("other", "train")]  # fmt: skip
    shape = (len(sources), versions, side, side, 3)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
    sizes = torch.zeros((*shape[:2], 2), dtype=torch.int64)
    crops = torch.zeros_like(sizes)
    loader: DataLoader[list[_Version]] = DataLoader(
        _Versions(samples, sources, versions),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
    )
    for number, rendered in enumerate(loader):
        padded = np.zeros(shape[1:], np.uint8)
        for version, (image, crop) in enumerate(rendered):
            height, width = image.shape[:2]
            padded[version, :height, :width] = image
            sizes[number, version] = torch.tensor([height, width])
            crops[number, version] = torch.tensor(crop)
        pixels[number] = torch.from_numpy(padded)
    return Pool(pixels, sizes.to(device), crops.to(device))


_Version = tuple[NDArray[np.uint8], tuple[int, int]]


class _Versions(Dataset[list[_Version]]):
    def __init__(self, samples: SampleSet, sources: list[Source], versions: int) -> None:
        self._samples = samples
        self._sources = sources
        self._versions = versions

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, number: int) -> list[_Version]:
        image = self._samples.sources.image(self._sources[number])
        ranges = self._samples.augmentation
        return [
            _version(image, np.random.default_rng([self._samples.seed, number, v]), ranges)
            for v in range(self._versions)
        ]


def _version(
    image: Image.Image, draw: np.random.Generator, ranges: Augmentation
) -> _Version:
    """The whole picture resized and compressed as a piece cut from it would be.

    With it that piece's height and width in its pixels.
    """
    share = np.ones(2)
    if draw.random() < ranges.probability:
        area = draw.uniform(*ranges.crop_area)
        stretch = ranges.crop_aspect ** draw.uniform(-1, 1)
        share = np.sqrt([area / stretch, area * stretch]).clip(max=1)
    longer = float((share * image.size[::-1]).max()) / max(image.size)
    low, high = (round(side / longer) for side in ranges.side)
    whole = replace(ranges, crop_area=(1, 1), crop_aspect=1, side=(low, high))
    image, quality = alter(image, draw, whole)
    if quality is not None:
        image = Image.open(io.BytesIO(compress(image, quality))).convert("RGB")
    height, width = (np.array(image.size[::-1]) * share).round().clip(1).astype(int)
    return np.asarray(image), (int(height), int(width))


@dataclass(frozen=True)
class DeviceSamples:
    """What `samples` would be, drawn from a pool on its device."""

    samples: SampleSet
    pool: Pool

    def load(
        self, epoch: int, batch_size: int, first: int = 0, processes: Processes = ALONE
    ) -> Iterator[Batch]:
        """This process's share of each batch from number `first` on, on the device.

        Images are uint8 (N, size, size, 3), labels as there, int64 (N,). A sample
        depends on seed, epoch and its number alone.
        """
        device = self.pool.pixels.device
        draw = torch.Generator(device).manual_seed(self.samples.seed * 100_003 + epoch)
        count = self.samples.count

        def uniform(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return torch.rand(count, device=device, generator=draw) * (high - low) + low

        picture = self._pictures(epoch).to(device)
        version = (uniform() * self.pool.pixels.shape[1]).long()
        size = self.pool.sizes[picture, version]
        label = self._labels().to(device)[picture]
        varied = (label == 0) & self.samples.varied
        length = self.pool.crops[picture, version]
        place = torch.stack([uniform(), uniform()], dim=1)
        start = (place * (size - length + 1)).long()
        mirrored = varied & (uniform() < MIRRORED)
        recoloured = varied & (uniform() < RECOLOURED)
        orders = torch.tensor([*permutations(range(3))], device=device)
        channels = orders[(uniform() * len(orders)).long() * recoloured]
        bent = varied & (uniform() < BENT)
        bend = torch.stack([uniform(-BEND, BEND) for _ in range(3)], dim=1)
        exponents = (bend * bent[:, None]).exp()
        for number in range(first, self.samples.batches(batch_size)):
            mine = self.samples.share(number, batch_size, processes)
            part = slice(mine.start, mine.stop)
            pixels = self.pool.pixels[picture[part], version[part]]
            images = resample(pixels, start[part], length[part], self.samples.size)
            images = images.gather(3, channels[part][:, None, None].expand_as(images))
            images = (images / 255) ** exponents[part][:, None, None] * 255
            flipped = mirrored[part][:, None, None, None]
            images = torch.where(flipped, images.flip(2), images)
            yield images.round().to(torch.uint8), label[part]

    def _labels(self) -> torch.Tensor:
        """The label of each picture by its place in the pool."""
        labels = labels_of(self.samples)
        return torch.tensor([labels[source.path] for source in self._pooled()])

    def _pooled(self) -> list[Source]:
        sources = self.samples.sources
        return [*sources.of("catalog", "train"), *sources.of("other", "train")]

    def _pictures(self, epoch: int) -> torch.Tensor:
        """The picture behind each sample, by its place in the pool, shape (N,)."""
        position = {source.path: n for n, source in enumerate(self._pooled())}
        orders = [
            torch.tensor([position[s.path] for s in self.samples.order(kind, epoch)])
            for kind in ("other", "catalog")
        ]
        number = torch.arange(self.samples.count)
        rounds = [order[number // 2 % len(order)] for order in orders]
        return torch.where(number % 2 == 1, rounds[1], rounds[0])


def resample(
    images: torch.Tensor, start: torch.Tensor, length: torch.Tensor, size: int
) -> torch.Tensor:
    """Cut a rectangle out of each image and stretch it to size x size pixels.

    `images` uint8 (N, H, W, 3); `start` and `length` int64 (N, 2), row and column in
    pixels; returns uint8 (N, size, size, 3). The filter is Pillow's BILINEAR: a
    triangle, widened where the picture shrinks. Two matrix products apply it, rows
    first, for each image its own matrices.
    """
    count, height, width, channels = images.shape
    rows = _triangle(start[:, 0], length[:, 0], height, size)
    columns = _triangle(start[:, 1], length[:, 1], width, size)
    flat = images.to(rows.dtype).reshape(count, height, width * channels)
    half = torch.bmm(rows, flat).reshape(count, size, width, channels)
    whole = torch.einsum("nxw,nywc->nyxc", columns, half)
    return whole.round().clamp(0, 255).to(torch.uint8)


def _triangle(
    start: torch.Tensor, length: torch.Tensor, pixels: int, size: int
) -> torch.Tensor:
    """Weight of each source pixel in each target pixel, shape (N, size, pixels)."""
    scale = (length / size)[:, None, None]
    target = torch.arange(size, device=start.device)[None, :, None]
    source = torch.arange(pixels, device=start.device)[None, None, :]
    centre = start[:, None, None] + (target + 0.5) * scale
    weight = 1 - (source + 0.5 - centre).abs() / scale.clamp_min(1.0)
    begin, end = start[:, None, None], (start + length)[:, None, None]
    inside = (source >= begin) & (source < end)
    weight = weight.clamp_min(0) * inside
    return weight / weight.sum(dim=2, keepdim=True)
