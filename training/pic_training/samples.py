"""Balanced batches of augmented samples, each a function of its number.

Sample `index` of epoch `epoch` is drawn from a generator seeded with (seed, split,
epoch, index) alone. A resumed run therefore sees what an unbroken one would have
seen, whatever the number of workers.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pic_daemon.errors import InputError
from pic_training.augmentation import Augmentation, sample, vary
from pic_training.distributed import ALONE, Processes
from pic_training.sources import Kind, Source, Sources, Split

Batch = tuple[torch.Tensor, torch.Tensor]

_AHEAD = 4  # batches that a worker makes before somebody takes them

_ENDED = ("is killed by signal", "exited unexpectedly")
"""What PyTorch says where a worker process was ended, mostly for want of memory."""

_TO = (
    "for the processes that render samples: give this machine or container more "
    "(docker: --shm-size, --memory), or, to train, name fewer --workers."
)

_KINDS: tuple[Kind, ...] = ("other", "catalog")

_SPLIT_NUMBER = {"train": 0, "val": 1}


@dataclass(frozen=True)
class SampleSet:
    """`count` samples of one split, odd ones from the catalog, even ones from the others.

    Validation draws the same samples whatever the epoch; training draws new ones.
    With more than one of `copies`, so many samples of one picture follow each other
    before the next of the other kind.
    """

    sources: Sources
    split: Split
    count: int
    size: int
    seed: int
    augmentation: Augmentation
    copies: int = 1

    @property
    def varied(self) -> bool:
        """Whether decoys are made into new ones; not where copies are to be told apart."""
        return self.augmentation.variety and self.split == "train" and self.copies == 1

    def batches(self, batch_size: int) -> int:
        """How many batches cover the set."""
        return -(-self.count // batch_size)

    def sources_drawn(self, epoch: int = 0) -> NDArray[np.int64]:
        """Position in `sources.pictures` of the picture behind each sample, shape (N,)."""
        position = {p.path: n for n, p in enumerate(self.sources.pictures)}
        others, catalog = (
            np.array([position[p.path] for p in self.order(kind, epoch)]) for kind in _KINDS
        )
        number = np.arange(self.count) // self.copies
        # Going round the shuffled pictures uses each equally often.
        turn, odd = number // 2, number % 2 == 1
        return np.where(odd, catalog[turn % len(catalog)], others[turn % len(others)])

    def is_test(self) -> NDArray[np.bool_]:
        """Which validation samples test rather than calibrate, shape (N,).

        Decoys go by their picture. The catalog is known to training anyway, so that
        every other sample of each of its pictures tests.
        """
        by_picture = self.sources.tested()[self.sources_drawn()]
        number = np.arange(self.count)
        turn, place = np.divmod(number // 2, len(self.sources.of("catalog", self.split)))
        return np.where(number % 2 == 1, (turn + place) % 2 == 1, by_picture)

    def order(self, kind: Kind, epoch: int) -> list[Source]:
        """The pictures of a kind as an epoch goes round them."""
        pictures = self.sources.of(kind, self.split)
        draw = np.random.default_rng([*self.key(epoch), len(pictures)])
        return [pictures[i] for i in draw.permutation(len(pictures))]

    def key(self, epoch: int) -> list[int]:
        """The seed of all draws of an epoch; validation has but one."""
        fixed = self.split == "val"
        return [self.seed, _SPLIT_NUMBER[self.split], 0 if fixed else epoch]

    def generator(self, epoch: int) -> torch.Generator:
        """For draws that PyTorch makes for all training samples of an epoch at once; the
        CPU's, which gives the same to every device."""
        return torch.Generator().manual_seed(self.seed * 100_003 + epoch)

    def share(self, number: int, batch_size: int, processes: Processes) -> range:
        """The samples of a batch that fall to this process."""
        first = number * batch_size
        whole = range(first, min(first + batch_size, self.count))
        start, end = (len(whole) * (processes.rank + n) // processes.count for n in (0, 1))
        return whole[start:end]

    def load(
        self,
        epoch: int,
        batch_size: int,
        workers: int,
        first: int = 0,
        processes: Processes = ALONE,
    ) -> Iterator[Batch]:
        """This process's share of each batch from number `first` on.

        Images are uint8 (N, size, size, 3). Labels, int64, shape (N,), are 0 for others
        and 1, 2, ... for the pictures of the catalog, in the order of `Sources.of`; where
        there are several copies of a picture they number all `sources.pictures` from 0.
        Near-duplicates have one label.
        """
        batches = _Batches(self, epoch, batch_size, processes)
        order = range(first, self.batches(batch_size))
        return _rendered(batches, order, workers, batch_size * self.size**2 * 3)


def labels_of(samples: SampleSet) -> dict[str, int]:
    """The label of each picture by its path, as in `SampleSet.load`."""
    if samples.copies > 1:
        return _numbered(samples.sources.pictures, 0)
    catalog = samples.sources.of("catalog", samples.split)
    others = samples.sources.of("other", samples.split)
    return _numbered(catalog, 1) | {p.path: 0 for p in others}


def _numbered(pictures: Sequence[Source], start: int) -> dict[str, int]:
    numbers: dict[tuple[Kind, str], int] = {}
    return {
        p.path: numbers.setdefault((p.kind, p.group), start + len(numbers))
        for p in pictures
    }


class _Batches(Dataset[Batch]):
    def __init__(
        self, samples: SampleSet, epoch: int, batch_size: int, processes: Processes
    ) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._processes = processes
        self._key = samples.key(epoch)
        self._drawn = samples.sources_drawn(epoch)
        self._label = labels_of(samples)

    def __getitem__(self, number: int) -> Batch:
        indices = self._samples.share(number, self._batch_size, self._processes)
        images = np.stack([self._draw(index) for index in indices])
        labels = torch.tensor([self._label[self._source(i).path] for i in indices])
        return torch.from_numpy(images), labels

    def _source(self, index: int) -> Source:
        return self._samples.sources.pictures[int(self._drawn[index])]

    def _draw(self, index: int) -> NDArray[np.uint8]:
        whole = self._samples.sources.pixels(self._source(index))
        draw = np.random.default_rng([*self._key, index])
        pixels = sample(whole, draw, self._samples.augmentation, self._samples.size)
        return vary(pixels, draw) if self._samples.varied and index % 2 == 0 else pixels


def _rendered(
    batches: Dataset[Batch], order: Sequence[int], workers: int, size: int
) -> Iterator[Batch]:
    """Those of `batches` in `order`, each worker process some ahead of who takes them.

    A batch has at most `size` bytes. Raises InputError where the machine has no room.
    """
    # Found out by the worker, it would be told to nobody, and waited for without end.
    if workers * (_AHEAD + 1) * size > (left := _shared_memory()):
        raise InputError(f"/dev/shm has {left >> 20} MB left, too little {_TO}")
    loader: DataLoader[Batch] = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_start_worker,
        # Started otherwise, each would need a copy of all that is known of the pictures.
        multiprocessing_context="fork" if workers else None,
    )
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # later than multiprocessing's, and so called before it
    with saying_who_was_killed():
        try:
            yield from loader
        except (EOFError, ConnectionError) as error:  # by what it had made already
            raise RuntimeError(_ENDED[0]) from error


@contextmanager
def saying_who_was_killed() -> Iterator[None]:
    """Raise InputError where a process that renders samples was killed.

    PyTorch says so wherever the process that it belongs to is just then.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _ENDED):
            raise
        raise InputError(f"a process was killed: too little memory {_TO}") from error


def _shared_memory() -> int:
    """Bytes through which processes can hand each other samples."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return sys.maxsize  # other systems have no such folder
    return found.f_bavail * found.f_frsize


def _end_workers() -> None:
    """End workers that an error nobody foresaw has kept: multiprocessing waits for them
    without end, as they ignore what it would end them by."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would report them as killed
    for worker in multiprocessing.active_children():
        worker.kill()


def _start_worker(_: int) -> None:
    """Make a process one that renders samples beside the one that trains."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process's to handle
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.nice(19)  # a step in hand goes before the batch after next
