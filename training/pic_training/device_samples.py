"""Training samples made on the device, for one that is faster than the CPU beside it.

Every picture is rendered on the CPU in several versions, resized and compressed by
the real codec, because nothing else leaves a real codec's traces. The versions lie on
the device as uint8, each with the crop that it was rendered for. There each sample takes
one of them, cuts that crop anywhere, and resamples it with Pillow's own filter, in batches.
Before each epoch the oldest versions give way to new ones.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

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
from pic_training.samples import Batch, SampleSet, labels_of, rendered
from pic_training.sources import Source

MAX_VERSIONS = 16

SAMPLES_A_VERSION = 3
"""Samples for each version that an epoch renders anew. Those of the first epoch alone, seen
again and again, left twice the loss after five (bench/results/gpu.md)."""

RENDERED_BYTES = 512 * 2**20
"""Pixels cut from at once, as float32: several small batches, which one by one would wait
for launches rather than for the GPU."""


def versions_for(samples: SampleSet, side: int, room: int) -> int:
    """How many versions of each picture fit into `room` bytes; 0: not even one."""
    pictures = sum(len(samples.sources.of(kind, "train")) for kind in ("catalog", "other"))
    return min(MAX_VERSIONS, room // (pictures * side * side * 3))


class Pool:
    """Versions of the pictures to train on, `versions` of each at a time, on the device.

    `pixels`: uint8, shape (P, V, side, side, 3), each in the upper left corner;
    `sizes`: int64, shape (P, V, 2), height and width; `crops`, the same, of the piece
    to be cut from it. Pictures are those of the catalog, then the others, in the order
    of `Sources.of`.
    """

    def __init__(
        self,
        samples: SampleSet,
        versions: int,
        side: int,
        workers: int,
        device: torch.device,
    ) -> None:
        sources = samples.sources
        self.pictures = [*sources.of("catalog", "train"), *sources.of("other", "train")]
        shape = (len(self.pictures), versions, side, side, 3)
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.sizes = torch.zeros((*shape[:2], 2), dtype=torch.int64, device=device)
        self.crops = torch.zeros_like(self.sizes)
        # One for all epochs: memory goes back to the stream that it was taken for.
        self.beside = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        fresh = samples.count // (SAMPLES_A_VERSION * len(self.pictures))
        self._fresh = min(versions, max(1, fresh))
        self._samples = samples
        self._workers = workers
        self._held = range(0)

    def renew(self, epoch: int) -> None:
        """Hold the versions of this epoch: of an endless row a window, which moves on."""
        begin = epoch * self._fresh
        wanted = range(begin, begin + self.pixels.shape[1])
        if missing := [number for number in wanted if number not in self._held]:
            self._render(missing)
        self._held = wanted

    def _render(self, numbers: Sequence[int]) -> None:
        held = self.pixels.shape[1]
        slots = torch.tensor([number % held for number in numbers])
        versions = _Versions(self._samples, self.pictures, numbers)
        every = range(len(self.pictures))
        most = math.prod(self.pixels.shape[2:]) * len(numbers)
        sizes, crops = self.sizes.cpu(), self.crops.cpu()
        for picture, (flat, extents) in enumerate(
            rendered(versions, every, self._workers, 2, most)
        ):
            sizes[picture, slots], crops[picture, slots] = torch.tensor(extents).unbind(1)
            lengths = [math.prod(size) * 3 for size, _ in extents]
            parts = flat.to(self.pixels.device).split(lengths)  # type: ignore[no-untyped-call]
            for slot, part, (size, _) in zip(slots, parts, extents, strict=True):
                target = self.pixels[picture, slot, : size[0], : size[1]]
                target.copy_(part.view_as(target))
        self.sizes.copy_(sizes)
        self.crops.copy_(crops)


_Extent = tuple[int, int]
"""Height and width in pixels."""

_Rendered = tuple[torch.Tensor, list[tuple[_Extent, _Extent]]]
"""Versions of a picture: their pixels one after the other, uint8, shape (bytes,), which is
what goes from process to process; and of each its size and its crop's."""


class _Versions(Dataset[_Rendered]):
    def __init__(
        self, samples: SampleSet, pictures: list[Source], numbers: Sequence[int]
    ) -> None:
        self._samples = samples
        self._pictures = pictures
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, place: int) -> _Rendered:
        picture = self._samples.sources.image(self._pictures[place])
        drawn = [
            _version(
                picture,
                np.random.default_rng([self._samples.seed, place, number]),
                self._samples.augmentation,
            )
            for number in self._numbers
        ]
        flat = np.concatenate([image.ravel() for image, _ in drawn])
        extents = [((image.shape[0], image.shape[1]), crop) for image, crop in drawn]
        return torch.from_numpy(flat), extents


def _version(
    image: Image.Image, draw: np.random.Generator, ranges: Augmentation
) -> tuple[NDArray[np.uint8], _Extent]:
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
        self.pool.renew(epoch)
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

        def render(part: torch.Tensor) -> torch.Tensor:
            pixels = self.pool.pixels[picture[part], version[part]]
            images = resample(pixels, start[part], length[part], self.samples.size)
            images = images.gather(3, channels[part][:, None, None].expand_as(images))
            images = (images / 255) ** exponents[part][:, None, None] * 255
            flipped = mirrored[part][:, None, None, None]
            images = torch.where(flipped, images.flip(2), images)
            return images.round().to(torch.uint8)

        def batches(shares: list[range]) -> list[Batch]:
            numbers = [torch.arange(share.start, share.stop) for share in shares]
            part = torch.cat(numbers).to(device)
            lengths = [len(share) for share in shares]
            drawn = (torch.split(whole, lengths) for whole in (render(part), label[part]))
            return list(zip(*drawn, strict=True))

        parts = self._parts(first, batch_size, processes)
        yield from _ahead(batches, parts, self.pool.beside)

    def _parts(
        self, first: int, batch_size: int, processes: Processes
    ) -> Iterator[list[range]]:
        """This process's shares of the batches from number `first` on, as many at a time
        as are rendered at once."""
        shares = (
            self.samples.share(number, batch_size, processes)
            for number in range(first, self.samples.batches(batch_size))
        )
        one = math.prod(self.pool.pixels.shape[2:]) * 4  # bytes of a version as float32
        at_once = max(1, RENDERED_BYTES // (one * batch_size))
        while some := list(islice(shares, at_once)):
            yield some

    def _labels(self) -> torch.Tensor:
        """The label of each picture by its place in the pool."""
        labels = labels_of(self.samples)
        return torch.tensor([labels[picture.path] for picture in self.pool.pictures])

    def _pictures(self, epoch: int) -> torch.Tensor:
        """The picture behind each sample, by its place in the pool, shape (N,)."""
        position = {source.path: n for n, source in enumerate(self.pool.pictures)}
        orders = [
            torch.tensor([position[s.path] for s in self.samples.order(kind, epoch)])
            for kind in ("other", "catalog")
        ]
        number = torch.arange(self.samples.count)
        rounds = [order[number // 2 % len(order)] for order in orders]
        return torch.where(number % 2 == 1, rounds[1], rounds[0])


def _ahead(
    make: Callable[[list[range]], list[Batch]],
    parts: Iterable[list[range]],
    beside: torch.cuda.Stream | None,
) -> Iterator[Batch]:
    """The batches of each part, which a GPU makes while it learns from the part before."""
    if not beside:
        for part in parts:
            yield from make(part)
        return
    current = torch.cuda.current_stream()
    made: list[Batch] = []
    try:
        for part in parts:
            # Memory that it takes may be that of a batch just learned from.
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                following = make(part)
            yield from made
            current.wait_stream(beside)
            made = following
        yield from made
    finally:  # what it still reads is given back when this ends
        current.wait_stream(beside)


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
