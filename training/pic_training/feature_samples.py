"""Samples as what a frozen trunk made of them, and the catalog as it is."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pic_daemon.images import to_pixels
from pic_training.distributed import ALONE, Processes
from pic_training.samples import Batch, SampleSet
from pic_training.sources import Sources


@dataclass(frozen=True)
class FeatureSamples:
    """The samples of epoch 0, which every epoch goes over in an order of its own.

    `features`, float32, shape (N, F); `labels`, shape (N,). Copies of a picture that
    follow each other stay in one batch.
    """

    samples: SampleSet
    features: torch.Tensor
    labels: torch.Tensor

    def load(
        self, epoch: int, batch_size: int, first: int = 0, processes: Processes = ALONE
    ) -> Iterator[Batch]:
        """This process's share of each batch from number `first` on."""
        copies = self.samples.copies
        draw = self.samples.generator(epoch)
        groups = torch.randperm(self.samples.count // copies, generator=draw)
        order = (groups[:, None] * copies + torch.arange(copies)).flatten()
        for number in range(first, self.samples.batches(batch_size)):
            mine = self.samples.share(number, batch_size, processes)
            chosen = order[mine.start : mine.stop]
            yield self.features[chosen], self.labels[chosen]


def unaltered(sources: Sources, size: int, batch_size: int) -> Iterator[Batch]:
    """The catalog's pictures unaltered: uint8 (N, size, size, 3), and labels 1, (N,)."""
    catalog = sources.of("catalog", "val")
    for start in range(0, len(catalog), batch_size):
        part = catalog[start : start + batch_size]
        pixels = np.stack([to_pixels(sources.image(p), size) for p in part])
        yield torch.from_numpy(pixels), torch.ones(len(part))
