"""Nearest neighbours by cosine: faiss inverted lists of 16-bit floats.

A vector lies in the list of its nearest centre, and a query looks into the lists of the
centres nearest to it. Up to EXACT vectors there is one list, so that every vector is
compared.
"""

from collections.abc import Iterator
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from pic_daemon.cores import cores

Vectors = NDArray[np.float32]
Keys = NDArray[np.int64]

EXACT = 20_000
"""Up to so many vectors all are compared: 1 ms on one core at 256 dimensions."""

_PER_LIST = 500  # vectors; lists are made anew once they hold four times as many
_TO_TRAIN = 64  # vectors a list
_PROBED = 1 / 16  # share of the lists that is looked into, and
_AT_LEAST = 64  # so many of them: bench/results/index.md

faiss.omp_set_num_threads(1)  # a query is too short to share


class Neighbours:
    """Unit vectors, float32, shape (N, D), by keys, int64, shape (N,)."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._lists = _trained(np.zeros((0, dimensions), np.float32), 1)

    def __len__(self) -> int:
        return int(self._lists.ntotal)

    def add(self, keys: Keys, vectors: Vectors) -> None:
        """Add vectors under keys that are not taken."""
        self._lists.add_with_ids(vectors, keys)
        wanted = _lists_for(len(self))
        if wanted > 4 * self._lists.nlist or wanted > self._lists.nlist == 1:
            self._arrange(wanted)

    def remove(self, keys: Keys) -> None:
        """Drop the vectors with these keys, as far as there are any."""
        self._lists.remove_ids(keys)

    def nearest(self, vectors: Vectors, count: int) -> Iterator[list[tuple[int, float]]]:
        """The nearest keys of each vector and their cosines, in [-1, 1], falling."""
        lists = self._lists.nlist
        self._lists.nprobe = min(lists, max(_AT_LEAST, round(lists * _PROBED)))
        cosines, keys = self._lists.search(np.ascontiguousarray(vectors), count)
        for near, alike in zip(keys.tolist(), cosines.tolist(), strict=True):
            # -1: there are fewer than `count`
            yield [pair for pair in zip(near, alike, strict=True) if pair[0] >= 0]

    def stored(self) -> Iterator[tuple[Keys, NDArray[np.float16]]]:
        """Every key and vector, as they are kept, list by list."""
        lists = self._lists.invlists
        for number in range(self._lists.nlist):
            size = lists.list_size(number)
            if size:
                keys = faiss.rev_swig_ptr(lists.get_ids(number), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
                yield keys.copy(), codes.copy().view(np.float16).reshape(size, -1)

    def to_bytes(self) -> bytes:
        """For `from_bytes`."""
        return bytes(faiss.serialize_index(self._lists).tobytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError where `data` was not written by `to_bytes`."""
        try:
            lists = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            raise ValueError("not a faiss index") from error
        if not isinstance(lists, faiss.IndexIVFScalarQuantizer):
            raise ValueError("not the kind of faiss index that is kept here")
        made = cls(lists.d)
        made._lists = lists
        return made

    def _arrange(self, lists: int) -> None:
        parts = list(self.stored())
        keys = np.concatenate([part for part, _ in parts])
        vectors = np.concatenate([part for _, part in parts]).astype(np.float32)
        self._lists = _trained(vectors, lists)
        self._lists.add_with_ids(vectors, keys)


def _lists_for(vectors: int) -> int:
    return 1 if vectors <= EXACT else vectors // _PER_LIST


def _trained(vectors: Vectors, lists: int) -> Any:
    dimensions = vectors.shape[1]
    centres = faiss.IndexFlatIP(dimensions)
    made = faiss.IndexIVFScalarQuantizer(
        centres, dimensions, lists, faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT, False,
    )  # fmt: skip
    if lists == 1:
        centres.add(np.zeros((1, dimensions), np.float32))
        made.is_trained = True
    else:
        draw = np.random.default_rng(0)
        chosen = draw.choice(len(vectors), min(len(vectors), _TO_TRAIN * lists), False)
        faiss.omp_set_num_threads(cores())
        made.train(vectors[chosen])
        faiss.omp_set_num_threads(1)
    return made
