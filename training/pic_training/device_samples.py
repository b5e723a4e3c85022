"""Training samples made on the device, for one that is faster than the CPU beside it.

All pictures lie there as uint8. Each sample is cropped, resized, compressed and decoded
for itself, many at once, in the ranges and with the probabilities that `augmentation` has,
and as Pillow and libjpeg would do it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations

import numpy as np
import torch

from pic_training.augmentation import BEND, BENT, MIRRORED, RECOLOURED, Augmentation
from pic_training.batched_images import Jpeg, cubic, levels, multiplied, triangle, weights
from pic_training.distributed import ALONE, Processes
from pic_training.samples import Batch, SampleSet, labels_of

RENDERED_BYTES = 32 * 2**20
"""Of pictures to make samples of at once, on 8 bits: several small batches, which one by
one would wait for launches rather than for the GPU."""


def fits(samples: SampleSet, side: int, room: int) -> bool:
    """Whether the pictures to train on fit into `room` bytes."""
    pictures = sum(len(samples.sources.of(kind, "train")) for kind in ("catalog", "other"))
    return pictures * side * side * 3 <= room


@dataclass(frozen=True)
class Drawn:
    """What was drawn for each of N samples.

    `picture` by its place in the pool. The piece to be cut has `length` pixels from `start`
    and becomes `target`; where `back`, it is then enlarged to what it was; (N, 2), height
    and width. `quality` 0 stands for no compression. Decoys are made into new ones: perhaps
    `mirrored`, the order of their `channels` and the `exponents` that bend them, (N, 3).
    """

    picture: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    target: torch.Tensor
    back: torch.Tensor
    quality: torch.Tensor
    mirrored: torch.Tensor
    channels: torch.Tensor
    exponents: torch.Tensor


class Pool:
    """The pictures to train on, on the device: the catalog's, then the others, in the order
    of `Sources.of`; and what makes samples of them.

    `pixels`: uint8, shape (P, side, 3, side), as `batched_images` has them, but nothing
    beyond a picture; `sizes`: int64, shape (P, 2), height and width; `labels`: int64, shape
    (P,), as in `SampleSet.load`; `places`: int64, by position in `sources.pictures`.
    """

    def __init__(self, samples: SampleSet, side: int, device: torch.device) -> None:
        sources = samples.sources
        self.pictures = [*sources.of("catalog", "train"), *sources.of("other", "train")]
        shape = (len(self.pictures), side, 3, side)
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        for place, picture in enumerate(self.pictures):
            rows = sources.pixels(picture).transpose(0, 2, 1)
            target = self.pixels[place, : picture.height, :, : picture.width]
            target.copy_(torch.tensor(rows))
        sizes = [(picture.height, picture.width) for picture in self.pictures]
        self.sizes = torch.tensor(sizes, device=device)
        labels = labels_of(samples)
        named = [labels[picture.path] for picture in self.pictures]
        self.labels = torch.tensor(named, device=device)
        place_of = {picture.path: place for place, picture in enumerate(self.pictures)}
        places = [place_of.get(picture.path, -1) for picture in sources.pictures]
        self.places = torch.tensor(places)
        self._size = samples.size
        on_gpu = device.type == "cuda"
        # Half precision tells levels apart by an eighth, and is half as much to move.
        self._dtype = torch.float16 if on_gpu else torch.float32
        self._jpeg = Jpeg(side, device, self._dtype)
        self.render: Callable[[Drawn], torch.Tensor] = (
            torch.compile(self._render, dynamic=False) if on_gpu else self._render
        )
        # One for all epochs: memory goes back to the stream that it was taken for.
        self.beside = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if on_gpu
            else None
        )

    def _render(self, drawn: Drawn) -> torch.Tensor:
        """The samples, uint8, shape (N, size, size, 3)."""
        side, size = self.pixels.shape[1], self._size
        whole = torch.where(drawn.back[:, None], drawn.length, drawn.target)
        nowhere = torch.zeros_like(drawn.picture)

        def resized(axis: int) -> torch.Tensor:
            start, length = drawn.start[:, axis], drawn.length[:, axis]
            target, final = drawn.target[:, axis], whole[:, axis]
            smaller = weights(cubic, start, length, target, side, side).to(self._dtype)
            larger = weights(cubic, nowhere, target, final, side, side).to(self._dtype)
            return larger @ smaller

        images = self.pixels[drawn.picture].to(self._dtype)
        images = levels(multiplied(images, resized(0), resized(1)))
        # The smallest scale that leaves both sides `size`, as the daemon decodes.
        eighths = (8 * (size - 1) // whole.amin(dim=1) + 1).clamp_max(8)
        compressed = drawn.quality > 0
        eighths = torch.where(compressed, eighths, 8)
        decoded = self._jpeg(images, whole[:, 0], drawn.quality.clamp_min(1), eighths)
        images = torch.where(compressed[:, None, None, None], decoded, images)
        shown = (whole * eighths[:, None] + 7) // 8

        def fitted(axis: int) -> torch.Tensor:
            final = torch.full_like(nowhere, size)
            made = weights(triangle, nowhere, shown[:, axis], final, side, size)
            return made.to(self._dtype)

        images = levels(multiplied(images, fitted(0), fitted(1))).transpose(2, 3).float()
        order = drawn.channels[:, None, None].expand_as(images)
        images = (images.gather(3, order) / 255) ** drawn.exponents[:, None, None] * 255
        mirrored = drawn.mirrored[:, None, None, None]
        images = torch.where(mirrored, images.flip(2), images)
        return images.round().to(torch.uint8)


@dataclass(frozen=True)
class DeviceSamples:
    """What `samples` would be, drawn from a pool on its device."""

    samples: SampleSet
    pool: Pool

    def load(
        self, epoch: int, batch_size: int, first: int = 0, processes: Processes = ALONE
    ) -> Iterator[Batch]:
        """This process's share of each batch from number `first` on, on the device.

        Images are uint8 (N, size, size, 3), labels as there, int64 (N,). What is drawn
        for a sample depends on seed, epoch, its number and the count of samples alone.
        """
        drawn = self.draw(epoch)
        labels = self.pool.labels[drawn.picture]
        longest = -(-batch_size // processes.count)
        at_once = max(1, RENDERED_BYTES // (self.pool.pixels[0].numel() * longest))
        # Always as many: what is compiled is compiled for a number of samples.
        most = at_once * longest

        def batches(shares: list[range]) -> list[Batch]:
            # Made there: to copy them would be to wait for all that the GPU has to do.
            part = torch.cat(
                [torch.arange(s.start, s.stop, device=labels.device) for s in shares]
            )
            filled = part.repeat(-(-most // len(part)))[:most]
            images = self.pool.render(_of(drawn, filled))
            lengths = [len(share) for share in shares]
            made = (torch.split(of[: len(part)], lengths) for of in (images, labels[part]))
            return list(zip(*made, strict=True))

        shares = (
            self.samples.share(number, batch_size, processes)
            for number in range(first, self.samples.batches(batch_size))
        )
        parts = iter(lambda: list(islice(shares, at_once)), [])
        yield from _ahead(batches, parts, self.pool.beside)

    def draw(self, epoch: int) -> Drawn:
        """For every sample of an epoch, as `augmentation` draws for one."""
        ranges, count = self.samples.augmentation, self.samples.count
        device = self.pool.pixels.device
        draw = self.samples.generator(epoch)

        def uniform(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return torch.rand(count, generator=draw).to(device) * (high - low) + low

        def happens(probability: float) -> torch.Tensor:
            return uniform() < probability

        drawn = torch.from_numpy(self.samples.sources_drawn(epoch))
        picture = self.pool.places[drawn].to(device)
        size = self.pool.sizes[picture]
        start, length = _cut(size, ranges, uniform)
        shrunk, back = happens(ranges.probability), happens(0.5)
        low, high = np.log(ranges.side)
        factor = uniform(low, high).exp() / length.amax(dim=1)
        shrunk &= factor < 1
        smaller = (length * factor[:, None]).round().long().clamp_min(1)
        target = torch.where(shrunk[:, None], smaller, length)
        best, worst = ranges.quality[1], ranges.quality[0]
        quality = uniform(worst, best + 1).long().clamp_max(best)
        varied = (self.pool.labels[picture] == 0) & self.samples.varied
        orders = torch.tensor([*permutations(range(3))], device=device)
        recoloured = varied & happens(RECOLOURED)
        bent = varied & happens(BENT)
        bend = torch.stack([uniform(-BEND, BEND) for _ in range(3)], dim=1)
        return Drawn(
            picture=picture,
            start=start,
            length=length,
            target=target,
            back=back,
            quality=quality * happens(ranges.probability),
            mirrored=varied & happens(MIRRORED),
            channels=orders[(uniform() * len(orders)).long() * recoloured],
            exponents=(bend * bent[:, None]).exp(),
        )


def _of(drawn: Drawn, numbers: torch.Tensor) -> Drawn:
    """What was drawn for the samples with these numbers."""
    return Drawn(**{name: every[numbers] for name, every in vars(drawn).items()})


def _cut(
    size: torch.Tensor, ranges: Augmentation, uniform: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where pieces of pictures of `size` begin, and their length; all int64, (N, 2)."""
    cropped = uniform() < ranges.probability
    area = uniform(*ranges.crop_area)
    stretch = ranges.crop_aspect ** uniform(-1, 1)
    share = torch.stack([area / stretch, area * stretch], dim=1).sqrt()
    share = torch.where(cropped[:, None], share.clamp_max(1), 1.0)
    length = (size * share).round().long().clamp_min(1)
    place = torch.stack([uniform(), uniform()], dim=1)
    return (place * (size - length + 1)).long(), length


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
