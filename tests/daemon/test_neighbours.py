"""The nearest-neighbour search, on made-up vectors."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pic_daemon.neighbours import EXACT, Neighbours

WIDTH = 24


def directions(count: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def keys_near(neighbours: Neighbours, vectors: NDArray[np.float32]) -> list[int]:
    return [near[0][0] for near in neighbours.nearest(vectors, 3)]


def test_few_vectors_are_all_compared() -> None:
    vectors, queries = directions(500), directions(50, seed=1)
    neighbours = Neighbours(WIDTH)
    neighbours.add(np.arange(500) * 7, vectors)
    cosines = queries @ vectors.T
    assert keys_near(neighbours, queries) == (cosines.argmax(axis=1) * 7).tolist()
    (near,) = neighbours.nearest(queries[:1], 3)
    found = [cosine for _, cosine in near]
    assert found == pytest.approx(np.sort(cosines[0])[:-4:-1].tolist(), abs=2e-3)


def test_no_more_neighbours_come_than_there_are() -> None:
    neighbours = Neighbours(WIDTH)
    neighbours.add(np.arange(2), directions(2))
    (near,) = neighbours.nearest(directions(1), 10)
    assert sorted(key for key, _ in near) == [0, 1]


def test_many_vectors_are_found_again_through_lists() -> None:
    vectors = directions(EXACT + 30_000)  # 100 lists, of which 64 are looked into
    neighbours = Neighbours(WIDTH)
    neighbours.add(np.arange(EXACT), vectors[:EXACT])
    neighbours.add(np.arange(EXACT, len(vectors)), vectors[EXACT:])
    again = Neighbours.from_bytes(neighbours.to_bytes())
    asked = np.arange(0, len(vectors), 97)
    copies = 0.9 * vectors[asked] + (1 - 0.9**2) ** 0.5 * directions(len(asked), seed=1)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    exact = (copies @ vectors.T).argmax(axis=1)
    found = np.array(keys_near(again, copies))
    assert (found == exact).mean() > 0.99
    assert len(list(again.stored())) > 1


def test_removed_vectors_do_not_come_back() -> None:
    vectors = directions(300)
    neighbours = Neighbours(WIDTH)
    neighbours.add(np.arange(300), vectors)
    neighbours.remove(np.array([5, 6, 12345]))
    again = Neighbours.from_bytes(neighbours.to_bytes())
    assert len(again) == 298
    assert not {5, 6} & set(keys_near(again, vectors))
    again.add(np.array([5]), vectors[6:7])
    assert keys_near(again, vectors[6:7]) == [5]


def test_other_bytes_are_refused() -> None:
    whole = Neighbours(WIDTH).to_bytes()
    for data in (b"", b"no index at all", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="faiss index"):
            Neighbours.from_bytes(data)
