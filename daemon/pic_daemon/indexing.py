"""Bring an index in line with its folder: describe what is new, drop what is gone."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from pic_daemon.catalog_index import CatalogIndex, Item, Refused, files_in, within
from pic_daemon.confirmation import agreement
from pic_daemon.cores import cores
from pic_daemon.decoding import worker_context
from pic_daemon.descriptor import Descriptor
from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp, text_of
from pic_daemon.identification import CANDIDATES, DEFAULT_THRESHOLD, joint_score, side_for
from pic_daemon.images import ImageError, Pixels, open_rgb, to_pixels
from pic_daemon.landmarks import Landmarks, landmarks
from pic_daemon.margins import within_margins
from pic_daemon.neighbours import Vectors
from pic_daemon.onnx_session import GPU_BATCH
from pic_daemon.reading import read_bytes

T = TypeVar("T")

_SAME_BYTES = "same bytes as "
_PASSING = ("cannot be read", "decoding needs more memory")  # how such reasons begin

SLICE = 64
"""Pictures described between two reports, and held in memory at a time."""


@dataclass(frozen=True)
class Twins:
    """Two items that would be taken for each other; `score` is their joint score."""

    item: str
    other: str
    score: float


@dataclass
class Update:
    """What was done to an index, by item; `refused` are files seen for the first time.

    `fresh` has a vector of each new item by its number, for `find_twins`; `shut` are the
    folders that could not be read, and why; `passed_over` as in `Folder.walk`.
    """

    added: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    fresh: dict[int, Vectors] = field(default_factory=dict)
    twins: list[Twins] = field(default_factory=list)
    shut: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Prepared:
    """One picture, ready to be described: views is uint8, shape (views, H, W, 3)."""

    sha256: str
    views: Pixels
    landmarks: bytes


@contextmanager
def workers(*preload: str) -> Iterator[ProcessPoolExecutor]:
    """Processes for what no network does; one a core. Raises InputError where one dies.

    The modules named by `preload` are imported once for all.
    """
    try:
        with ProcessPoolExecutor(cores(), worker_context(*preload), _start_worker) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise InputError(
            "a process that decodes pictures was ended, as the kernel does where memory "
            "runs out: give it more, or fewer pictures."
        ) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process's to handle
    # A parent that is killed tells nobody: its workers would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def looked_at(
    pool: ProcessPoolExecutor,
    look: Callable[[str, int], T],
    paths: Sequence[str],
    size: int,
) -> list[T]:
    """`look(path, size)` of each, in a process of the pool.

    Raises InputError where one of these processes dies.
    """
    try:
        return list(pool.map(look, paths, [size] * len(paths)))
    except BrokenProcessPool as error:
        raise InputError(
            f"a process that decodes pictures was ended, at one of {len(paths)} from "
            f"{text_of(paths[0])} to {text_of(paths[-1])}: by the kernel, where memory "
            "runs out, or by a picture that its decoder does not survive; give it more, or "
            "leave that picture out."
        ) from error


def update(
    index: CatalogIndex,
    descriptor: Descriptor,
    pool: ProcessPoolExecutor,
    show: Callable[[int], None],
) -> Update:
    """Make `index` say what its catalog folder holds now; unchanged files are not read.

    `show` is told how many files are done. Raises InputError where no picture is left, or
    where some cannot be looked for.
    """
    folder = Path(index.about.catalog)
    done = Update()
    there = dict(sorted(files_in(folder, done.shut, done.passed_over)))
    check_shut(index.items.values(), folder, done.shut)
    before = {item.name: n for n, item in index.items.items()}
    kept = {
        before[name]
        for name, stamp in there.items()
        if name in before and _unchanged(index.items[before[name]], stamp)
    }
    refused = {r.name: r for r in index.refused}
    names_kept = {index.items[number].name for number in kept}
    refused = {
        name: refused[name]
        for name, stamp in there.items()
        if name in refused
        and _unchanged(refused[name], stamp)
        and _still_holds(refused[name].reason, names_kept)
    }
    known = refused.keys() | names_kept
    todo = [name for name in there if name not in known]
    contents = {item.sha256: n for n, item in index.items.items()}
    size = descriptor.info.input_size
    for names in slices(todo):
        paths = [str(folder / name) for name in names]
        prepared = looked_at(pool, _prepare, paths, size)
        vectors = _described(descriptor, names, prepared)
        for name, one in zip(names, prepared, strict=True):
            stamp = there[name]
            if isinstance(one, str):
                refused[name] = Refused(name, stamp.bytes, stamp.mtime_ns, one)
                done.refused.append(refused[name])
                continue
            own = next(vectors)
            item = Item(name, one.sha256, stamp.bytes, stamp.mtime_ns)
            twin = contents.get(one.sha256)
            if twin in kept:
                reason = _SAME_BYTES + index.items[twin].name
                refused[name] = Refused(name, stamp.bytes, stamp.mtime_ns, reason)
                done.refused.append(refused[name])
            elif twin is not None:
                done.renamed += [name] if index.items[twin].name != name else []
                old = index.items[twin]
                index.items[twin] = replace(item, offset=old.offset, length=old.length)
                kept.add(twin)
            else:
                number = index.add(item, own, one.landmarks)
                contents[one.sha256] = number
                kept.add(number)
                done.fresh[number] = own[0].copy()  # not all of its views
                done.added.append(name)
        show(len(names))
    gone = index.items.keys() - kept
    done.removed += [index.items[number].name for number in gone]
    index.remove(gone)
    index.refused = list(refused.values())
    if not index.items:
        raise InputError(
            f"no picture in {folder} can be indexed"
            + (
                f"; the first is {_first(refused)}"
                if refused
                else ": it holds none (links, and names of no picture format, do not count)"
            )
            + "".join(f"; {folder / name} {why}" for name, why in done.shut.items())
            + "."
        )
    return done


def check_shut(items: Iterable[Item], folder: Path, shut: dict[str, str]) -> None:
    """Raise InputError where items lie in what `files_in` could not read of `folder`."""
    hidden = [item.name for item in items if within(item.name, shut)]
    if not hidden:
        return
    name, reason = next((f, why) for f, why in shut.items() if within(hidden[0], [f]))
    raise InputError(
        f"{folder / name} {reason}. {len(hidden)} items of the index lie in such "
        "folders and would be dropped: let this account read them, or move them away."
    )


def remove(index: CatalogIndex, names: Iterable[str]) -> None:
    """Drop items by name; raises InputError where one is unknown or none would be left."""
    by_name = {item.name: number for number, item in index.items.items()}
    gone = []
    for name in names:
        if name not in by_name:
            raise InputError(f"{index.path} holds no item {name!r}; see --list.")
        gone.append(by_name.pop(name))
    if not by_name:
        raise InputError(f"{index.path} would be empty then: remove the file instead.")
    index.remove(gone)


def slices(whole: Sequence[T]) -> Iterator[list[T]]:
    """What there is, in lists of SLICE."""
    remaining = iter(whole)
    while part := list(islice(remaining, SLICE)):
        yield part


def _prepare(path: str, size: int) -> _Prepared | str:
    """Decode one catalog file, or say why it is refused."""
    try:
        picture, sha256 = picture_at(path, size)
    except ImageError as error:
        return str(error)
    seen = landmarks(picture)
    if seen.blank:
        return "nearly uniform picture: nothing to recognise"
    views = np.stack([to_pixels(view, size) for view in _views(picture)])
    return _Prepared(sha256, views, seen.to_bytes())


def picture_at(path: str, size: int) -> tuple[Image.Image, str]:
    """An upright RGB picture for a descriptor of this input size, and its file's SHA-256.

    Raises ImageError where there is none.
    """
    reading, data = read_bytes(path)
    if not reading.sha256:
        raise ImageError(reading.error or "cannot be read: it is gone, or written to")
    picture, _ = open_rgb(data, side_for(size))
    return picture, reading.sha256


def _views(picture: Image.Image) -> list[Image.Image]:
    """What is described of each item: as it is, mirrored, grey, and within its margins.

    Descriptors are not trained with mirrors or without colour. A query is described within
    its margins, so that a border or a frame around it is of no account; a crop may have
    none left. What each view is worth: bench/results/descriptor.md.
    """
    views = [picture, ImageOps.mirror(picture), picture.convert("L").convert("RGB")]
    within = within_margins(picture)
    return views if within is None else [*views, within]


def _described(
    descriptor: Descriptor, names: Sequence[str], prepared: Sequence[_Prepared | str]
) -> Iterator[Vectors]:
    pairs = zip(names, prepared, strict=True)
    found = [(name, one) for name, one in pairs if isinstance(one, _Prepared)]
    if not found:
        return
    views = np.concatenate([one.views for _, one in found])
    # A CPU would take all of a slice at once, and the memory for it.
    batches = np.split(views, range(GPU_BATCH, len(views), GPU_BATCH))
    described = np.concatenate([descriptor.describe(batch) for batch in batches])
    ends = np.cumsum([len(one.views) for _, one in found])
    for (name, _), vectors in zip(found, np.split(described, ends[:-1]), strict=True):
        if not np.isfinite(vectors).all():
            raise InputError(
                f"{descriptor.path} gives vectors that are not numbers for {name!r}; "
                "export it again, or leave that picture out."
            )
        yield vectors


def find_twins(
    index: CatalogIndex, fresh: dict[int, Vectors], pool: ProcessPoolExecutor
) -> Iterator[Twins]:
    """Pairs with a new item in them that the joint decision would not keep apart.

    Where decoys were easy its threshold is so low that many pairs reach it, none of whose
    copies would be taken for the other.
    """
    threshold = max(index.about.promise.threshold, DEFAULT_THRESHOLD)
    pairs = {
        (min(number, near), max(number, near)): similarity
        for number, vector in fresh.items()
        for near, similarity in index.nearest(vector[None], CANDIDATES)[0]
        if near != number and joint_score(similarity, 1.0) >= threshold
    }
    for some in slices([*pairs]):  # a catalog's landmarks together are gigabytes
        both = [(index.landmarks(one), index.landmarks(other)) for one, other in some]
        for pair, value in zip(some, pool.map(_agreement, both, chunksize=8), strict=True):
            if (score := joint_score(pairs[pair], value)) >= threshold:
                one, other = (index.items[number].name for number in pair)
                yield Twins(one, other, score)


def _agreement(pair: tuple[bytes, bytes]) -> float:
    one, other = map(Landmarks.from_bytes, pair)
    return agreement(one, other)


def _unchanged(known: Item | Refused, stamp: FileStamp) -> bool:
    return (known.bytes, known.mtime_ns) == (stamp.bytes, stamp.mtime_ns)


def _still_holds(reason: str, names_kept: Collection[str]) -> bool:
    """Whether a file that did not change since is refused for the same reason today."""
    if reason.startswith(_SAME_BYTES):
        return reason.removeprefix(_SAME_BYTES) in names_kept
    return not reason.startswith(_PASSING)


def _first(refused: dict[str, Refused]) -> str:
    first = next(iter(refused.values()))
    return f"{first.name}: {first.reason}"
