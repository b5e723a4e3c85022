"""Nearest neighbours: which library, at which size, on one core.

    python bench/index.py [--vectors 1000000] [--library NAME ...] [--build-threads 2]

The vectors are made up: unit vectors of 256 numbers in families, as look-alikes lie, of
20 members about a centre; the centres vary in 48 directions only, as descriptors of
pictures do. A query is one of the vectors with noise that leaves a cosine of about 0.9.
What counts is whether the nearest vector by exact search is the first one returned: each
library looks harder until 99% are. Each runs in a process of its own, its queries one at a
time on one core. "effort" is nprobe for faiss, ef for hnswlib and usearch.
"""

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from numpy.typing import NDArray

from pic_daemon.neighbours import Neighbours

Floats = NDArray[np.float32]
Search = Callable[[Floats, int], int]  # a query, and how hard to look
Built = tuple[Search, list[int]]

DIMENSIONS = 256
_DIRECTIONS = 48
_FAMILY = 20
_WITHIN = 0.7  # spread of a family beside that of the centres
_NOISE = 0.48  # leaves a cosine of 0.9
_QUERIES = 1000
ENOUGH = 0.99


def unit(vectors: Floats) -> Floats:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def made_up(count: int) -> tuple[Floats, Floats]:
    """Vectors of shape (count, 256) and queries of shape (1000, 256)."""
    draw = np.random.default_rng(0)
    basis = draw.standard_normal((_DIRECTIONS, DIMENSIONS), np.float32) / 16
    families = -(-count // _FAMILY)
    centres = unit(draw.standard_normal((families, _DIRECTIONS), np.float32) @ basis)
    vectors = np.repeat(centres, _FAMILY, axis=0)[:count]
    for start in range(0, count, 100_000):
        part = vectors[start : start + 100_000]
        noise = draw.standard_normal((len(part), _DIRECTIONS), np.float32) @ basis
        part += _WITHIN * unit(noise)
        part += 0.2 * unit(draw.standard_normal(part.shape, np.float32))
        unit(part)
    chosen = draw.choice(count, _QUERIES, replace=count < _QUERIES)
    noise = unit(draw.standard_normal((_QUERIES, _DIRECTIONS), np.float32) @ basis)
    return vectors, unit(vectors[chosen] + np.float32(_NOISE) * noise)


def nearest(vectors: Floats, queries: Floats) -> NDArray[np.int64]:
    best = np.full(len(queries), -2.0, np.float32)
    which = np.zeros(len(queries), np.int64)
    for start in range(0, len(vectors), 100_000):
        alike = queries @ vectors[start : start + 100_000].T
        top = alike.argmax(axis=1)
        value = alike[np.arange(len(queries)), top]
        which = np.where(value > best, start + top, which)
        best = np.maximum(value, best)
    return which


def with_numpy(vectors: Floats, file: Path, threads: int) -> Built:
    np.save(file, vectors)
    return lambda query, _: int((vectors @ query).argmax()), [0]


def with_usearch(vectors: Floats, file: Path, threads: int) -> Built:
    import onnxruntime  # noqa: F401  # which crashes when it comes second
    from usearch.index import Index

    index = Index(
        ndim=DIMENSIONS, metric="ip", dtype="f16", connectivity=16, expansion_add=128
    )
    index.add(np.arange(len(vectors)), vectors, threads=threads)
    index.save(str(file))
    del index
    index = Index.restore(str(file))

    def search(query: Floats, effort: int) -> int:
        index.expansion_search = effort
        return int(index.search(query, 5, threads=1).keys[0])

    return search, [64, 128, 256, 512]


def with_hnswlib(vectors: Floats, file: Path, threads: int) -> Built:
    import hnswlib

    index = hnswlib.Index("ip", DIMENSIONS)
    index.init_index(len(vectors), M=16, ef_construction=128)
    index.add_items(vectors, num_threads=threads)
    index.save_index(str(file))
    index = hnswlib.Index("ip", DIMENSIONS)
    index.load_index(str(file))

    def search(query: Floats, effort: int) -> int:
        index.set_ef(effort)
        return int(index.knn_query(query, 5, num_threads=1)[0][0, 0])

    return search, [64, 128, 256, 512]


def with_faiss(vectors: Floats, file: Path, threads: int, f16: bool) -> Built:
    import faiss

    faiss.omp_set_num_threads(threads)
    lists = max(1, len(vectors) // 500)
    cells = faiss.IndexFlatIP(DIMENSIONS)
    how = DIMENSIONS, lists, faiss.METRIC_INNER_PRODUCT
    if f16:
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(cells, how[0], lists, half, how[2], False)
    else:
        index = faiss.IndexIVFFlat(cells, *how)
    draw = np.random.default_rng(0)
    index.train(vectors[draw.choice(len(vectors), min(len(vectors), 64 * lists), False)])
    for start in range(0, len(vectors), 100_000):
        index.add(vectors[start : start + 100_000])
    faiss.write_index(index, str(file))
    del index
    index = faiss.read_index(str(file))
    faiss.omp_set_num_threads(1)

    def search(query: Floats, effort: int) -> int:
        index.nprobe = effort
        return int(index.search(query[None], 5)[1][0, 0])

    return search, [16, 32, 64, 128, 256]


def as_served(vectors: Floats, file: Path, threads: int) -> Built:
    made = Neighbours(DIMENSIONS)
    for start in range(0, len(vectors), 100_000):
        part = vectors[start : start + 100_000]
        made.add(np.arange(start, start + len(part)), part)
    file.write_bytes(made.to_bytes())
    del made
    loaded = Neighbours.from_bytes(file.read_bytes())
    return lambda query, _: next(loaded.nearest(query[None], 10))[0][0], [0]


LIBRARIES: dict[str, tuple[Callable[[Floats, Path, int], Built], str]] = {
    "numpy": (with_numpy, "numpy"),
    "faiss IVF f16": (partial(with_faiss, f16=True), "faiss-cpu"),
    "faiss IVF f32": (partial(with_faiss, f16=False), "faiss-cpu"),
    "hnswlib": (with_hnswlib, "hnswlib"),
    "usearch f16": (with_usearch, "usearch"),
    "pic_daemon.neighbours": (as_served, "faiss-cpu"),
}


def memory_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(name: str, folder: Path, threads: int) -> None:
    build, package = LIBRARIES[name]
    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    truth = np.load(folder / "truth.npy")
    file = folder / "index"
    before = memory_mib()
    started = time.perf_counter()
    search, efforts = build(vectors, file, threads)
    built = time.perf_counter() - started
    used = memory_mib() - before
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    for effort in efforts:
        found, times = [], []
        for query in queries:
            begun = time.perf_counter()
            found.append(search(query, effort))
            times.append(1000 * (time.perf_counter() - begun))
        recall = float((np.array(found) == truth).mean())
        row = {
            "library": f"{name} {version(package)}",
            "vectors": len(vectors),
            "effort": effort,
            "recall@1": round(recall, 4),
            "ms median": round(float(np.median(times)), 3),
            "ms p99": round(float(np.quantile(times, 0.99)), 3),
            "build s": round(built, 1),
            "threads": threads,
            "memory MiB": round(used),
            "file MiB": round(next(folder.glob("index*")).stat().st_size / 2**20),
        }
        print(json.dumps(row), flush=True)
        if recall >= ENOUGH:
            break


@click.command()
@click.option("--vectors", "count", default=1_000_000, show_default=True)
@click.option("--library", "names", multiple=True, type=click.Choice(list(LIBRARIES)))
@click.option("--build-threads", default=os.cpu_count() or 1, show_default=True)
def main(count: int, names: tuple[str, ...], build_threads: int) -> None:
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        vectors, queries = made_up(count)
        np.save(Path(folder) / "vectors.npy", vectors)
        np.save(Path(folder) / "queries.npy", queries)
        np.save(Path(folder) / "truth.npy", nearest(vectors, queries))
        del vectors
        for name in names or LIBRARIES:
            arguments = name, Path(folder), build_threads
            process = context.Process(target=measure, args=arguments)
            process.start()
            process.join()
            for file in Path(folder).glob("index*"):
                file.unlink()


if __name__ == "__main__":
    main()
