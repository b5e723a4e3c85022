"""The catalog index: one file that says which pictures the catalog holds.

It keeps, of every item, its vectors for the nearest-neighbour search and the landmarks by
which a match is confirmed, and the threshold of the joint decision with its promise. It
belongs to one descriptor, by hash. The file is an uncompressed zip archive, so that every
part has its checksum and the landmarks of one item can be read without the others.
"""

import hashlib
import json
import os
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from pic_daemon.descriptor import Descriptor
from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp, Folder
from pic_daemon.identification import CANDIDATES, Candidate
from pic_daemon.landmarks import Landmarks
from pic_daemon.neighbours import Neighbours, Vectors
from pic_daemon.promise import Interval

FORMAT = "product-image-index"
FORMAT_VERSION = 2  # 1 had no views without colour or margins

_ABOUT, _ITEMS = "about.json", "items.json"
_VECTORS, _LANDMARKS = "vectors.faiss", "landmarks.bin"
_AGAIN = "remove it and make it again, with --others where its threshold was measured"
_DAMAGED = (  # RuntimeError: said to be encrypted, or written by a later zip
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, RuntimeError,
)  # fmt: skip
_VIEW_BITS = 3  # a vector's key is its item's number and, in these bits, its view's


@dataclass(frozen=True)
class Item:
    """A catalog picture: path within the folder, content, where its landmarks lie.

    `bytes` and `mtime_ns` are the file's, as last seen.
    """

    name: str
    sha256: str
    bytes: int
    mtime_ns: int
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class Refused:
    """A file of the catalog folder that is not in the index, and why."""

    name: str
    bytes: int
    mtime_ns: int
    reason: str


@dataclass(frozen=True)
class Promise:
    """The threshold of the joint score, in [0, 1], and what is promised of it.

    `rule` says how it was chosen. `rate` is the share of decoy samples that matched at
    it, None where it was not measured; `catalog_size` is the number of items then, and
    `catalog_digest` what `CatalogIndex.digest` was, '' in files of earlier versions.
    """

    threshold: float
    rule: str
    measured_at: str
    catalog_size: int
    target_fpr: float | None = None
    rate: Interval | None = None
    catalog_digest: str = ""


@dataclass(frozen=True)
class About:
    """What the index is of. `descriptor` is the SHA-256 of the descriptor's file."""

    descriptor: str
    dimensions: int
    catalog: str
    created_at: str
    promise: Promise


@dataclass(frozen=True)
class Changes:
    """How a catalog folder differs from its index, by path within the folder."""

    new: list[str]
    changed: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.removed)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what} ({', '.join(map(repr, names[:3]))}"
            f"{', ...' if len(names) > 3 else ''})"
            for what in ("new", "changed", "removed")
            if (names := getattr(self, what))
        ]
        return ", ".join(parts)


@dataclass
class CatalogIndex:
    """An index in memory; `items` are by number. Not shared between threads.

    `sha256` is that of the file, '' for one that was not written yet.
    """

    path: Path
    about: About
    items: dict[int, Item] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    sha256: str = ""
    vectors: Neighbours = field(default_factory=lambda: Neighbours(1))
    _stored: int | None = None  # file descriptor
    _new: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def empty(cls, path: Path, about: About) -> Self:
        """An index of nothing, to be filled."""
        return cls(path, about, vectors=Neighbours(about.dimensions))

    def digest(self) -> str:
        """SHA-256 over the sorted hashes of the items: names them, whatever their paths."""
        hashes = sorted(item.sha256 for item in self.items.values())
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def about_promise(self) -> str:
        """The threshold and what is promised of it, in a sentence."""
        promise = self.about.promise
        text = f"threshold {promise.threshold:.6g}, {promise.rule}"
        if promise.rate and promise.rate.value is not None:
            text += (
                f"; of {promise.rate.of} samples of others {promise.rate.value:.3g} "
                f"matched (95% interval {promise.rate.low:.2g} to {promise.rate.high:.2g})"
            )
        exchanged = promise.catalog_digest and promise.catalog_digest != self.digest()
        if promise.rate and (exchanged or promise.catalog_size != len(self.items)):
            text += (
                f"; measured with {promise.catalog_size} items, now {len(self.items)}, not "
                "all of them the same: measure again with --others"
            )
        return text

    def add(self, item: Item, vectors: Vectors, landmarks: bytes) -> int:
        """Add an item by its vectors, float32, shape (views, D); returns its number."""
        number = next(reversed(self.items), -1) + 1  # they are in order
        self.vectors.add(np.arange(len(vectors)) + (number << _VIEW_BITS), vectors)
        self.items[number] = item
        self._new[number] = landmarks
        return number

    def remove(self, numbers: Collection[int]) -> None:
        """Drop items; all vectors are looked through once."""
        for number in numbers:
            del self.items[number]
            self._new.pop(number, None)
        first = np.array(list(numbers), np.int64)[:, None] << _VIEW_BITS
        self.vectors.remove((first + np.arange(1 << _VIEW_BITS)).ravel())

    def landmarks(self, number: int) -> bytes:
        """The Landmarks of an item, as bytes."""
        if number in self._new:
            return self._new[number]
        item = self.items[number]
        assert self._stored is not None
        # Not mapped: a file that somebody cuts off would end the process by a signal.
        return os.pread(self._stored, item.length, item.offset)

    def nearest(self, vectors: Vectors, count: int) -> list[list[tuple[int, float]]]:
        """The `count` nearest items of each vector, float32, shape (N, D), by cosine.

        As (number, cosine in [-1, 1]), nearest first; an item counts by its nearest view.
        """
        found = []
        for near in self.vectors.nearest(vectors, count << _VIEW_BITS):
            best: dict[int, float] = {}
            for key, cosine in near:
                best.setdefault(key >> _VIEW_BITS, cosine)
            found.append(list(best.items())[:count])
        return found

    def look_up(self, vectors: Vectors, count: int = CANDIDATES) -> list[list[Candidate]]:
        """The `count` items that each picture may be a copy of, nearest first."""
        return [
            [
                Candidate(self.items[number].name, similarity, self.landmarks(number))
                for number, similarity in near
            ]
            for near in self.nearest(vectors, count)
        ]

    def changes(self) -> Changes | None:
        """How the catalog folder differs by now; None where it cannot be reached."""
        folder = Path(self.about.catalog)
        if not os.path.isdir(folder):
            return None
        shut: dict[str, str] = {}
        there = dict(files_in(folder, shut))
        known = {
            file.name: (file.bytes, file.mtime_ns)
            for files in (self.items.values(), self.refused)
            for file in files
        }
        differ = [
            name
            for name in sorted(there.keys() & known.keys())
            if (there[name].bytes, there[name].mtime_ns) != known[name]
        ]
        by_name = {item.name: item for item in self.items.values()}
        changed = [n for n in differ if not _same_content(folder / n, by_name.get(n))]
        return Changes(
            sorted(there.keys() - known.keys()),
            changed,
            sorted(name for name in known.keys() - there.keys() if not within(name, shut)),
        )

    def first_vectors(self) -> dict[int, Vectors]:
        """The vector of each item as it is, float32, shape (D,), by its number."""
        return {
            int(key) >> _VIEW_BITS: vector.astype(np.float32)
            for keys, vectors in self.vectors.stored()
            for key, vector in zip(keys, vectors, strict=True)
            if not key % (1 << _VIEW_BITS)
        }

    def save(self, path: Path | None = None) -> None:
        """Write the file: under a temporary name first, then renamed into place.

        `path` is another place. Raises InputError where it cannot be written.
        """
        path = Path(os.path.realpath(path or self.path))  # what a link names
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                self._write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}.") from error
        finally:
            with suppress(OSError):  # a disk that became read-only, a name too long
                temporary.unlink(missing_ok=True)

    def _write(self, file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            start, items = 0, {}
            with archive.open(_LANDMARKS, "w", force_zip64=True) as out:
                for number, item in self.items.items():
                    data = self.landmarks(number)
                    if number not in self._new and len(data) < item.length:
                        raise InputError(_damaged(self.path, "cut off while in use"))
                    out.write(data)
                    items[number] = asdict(replace(item, offset=start, length=len(data)))
                    start += len(data)
            with archive.open(_VECTORS, "w", force_zip64=True) as out:
                out.write(self.vectors.to_bytes())
            refused = [asdict(r) for r in self.refused]
            archive.writestr(_ITEMS, json.dumps({"items": items, "refused": refused}))
            about = {"format": FORMAT, "format_version": FORMAT_VERSION}
            archive.writestr(_ABOUT, json.dumps({**about, **asdict(self.about)}))


def files_in(
    folder: Path, shut: dict[str, str], passed_over: Counter[str] | None = None
) -> Iterator[tuple[str, FileStamp]]:
    """Every picture of a catalog folder by its path within, links passed over.

    `shut` gets what could not be looked at, folders mostly, the same way, and why;
    `passed_over` as in `Folder.walk`.
    """
    home = folder.resolve()

    def refuse(below: str, error: OSError) -> None:
        shut[os.path.relpath(below, home)] = f"cannot be read: {error.strerror}"

    for found in Folder(home).walk(str(home), refuse, passed_over):
        if found:
            yield os.path.relpath(found[0], home), found[1]


def within(name: str, folders: Iterable[str]) -> bool:
    """Whether a file is or lies in one of these, all by their paths within a catalog."""
    return any(f in (".", name) or name.startswith(f"{f}/") for f in folders)


def load_index(path: Path) -> CatalogIndex:
    """Read and check an index; raises InputError where it is missing, damaged or empty."""
    try:
        with path.open("rb") as file:
            return _load(path, file)
    except OSError as error:
        raise InputError(f"index {path}: {error.strerror or error}.") from error
    except _DAMAGED as error:
        raise InputError(_damaged(path, error)) from error


def check_belongs(index: CatalogIndex, descriptor: Descriptor) -> None:
    """Raise InputError where the index was made with another descriptor."""
    if index.about.descriptor != descriptor.sha256:
        raise InputError(
            f"index {index.path} was made with another descriptor (sha256 "
            f"{index.about.descriptor[:12]}) than {descriptor.path} "
            f"({descriptor.sha256[:12]}): run pic-index again."
        )


def _no_index(path: Path) -> str:
    return (
        f"{path} is no catalog index, or is cut off: name another file, or remove it and "
        "make it with pic-index."
    )


def _load(path: Path, file: IO[bytes]) -> CatalogIndex:
    if not zipfile.is_zipfile(file):
        raise InputError(_no_index(path))
    with zipfile.ZipFile(file) as archive:
        if {_ABOUT, _ITEMS, _VECTORS, _LANDMARKS} - set(archive.namelist()):
            raise InputError(_no_index(path))
        about = _about(path, archive.read(_ABOUT))
        if damaged := archive.testzip():
            raise InputError(_damaged(path, f"the checksum of {damaged} is wrong"))
        start = _start_of(archive.getinfo(_LANDMARKS), file)
        listed = json.loads(archive.read(_ITEMS))
        try:
            vectors = Neighbours.from_bytes(archive.read(_VECTORS))
        except ValueError as error:
            raise InputError(_damaged(path, error)) from error
    items = {int(number): Item(**values) for number, values in listed["items"].items()}
    items = {n: replace(item, offset=item.offset + start) for n, item in items.items()}
    _check_vectors(path, about, items, vectors)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    stored = os.dup(file.fileno())
    refused = [Refused(**values) for values in listed["refused"]]
    index = CatalogIndex(path, about, items, refused, digest, vectors, stored)
    weakref.finalize(index, os.close, stored)
    try:
        Landmarks.from_bytes(index.landmarks(next(iter(items))))
    except ValueError as error:
        problem = "its landmarks are those of another version"
        raise InputError(f"index {path}: {problem}; {_AGAIN}.") from error
    return index


def _about(path: Path, data: bytes) -> About:
    values: dict[str, Any] = json.loads(data)
    if values.pop("format", None) != FORMAT:
        raise InputError(_no_index(path))
    version = values.pop("format_version", 0)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}; this program reads {FORMAT_VERSION}. "
            f"Upgrade product-image-classifier, or {_AGAIN}."
        )
    promise = values.pop("promise")
    rate = promise.pop("rate")
    return About(
        **values, promise=Promise(**promise, rate=Interval(**rate) if rate else None)
    )


def _check_vectors(
    path: Path, about: About, items: Collection[int], vectors: Neighbours
) -> None:
    if not items:
        raise InputError(f"index {path} is of an empty catalog: {_AGAIN}.")
    if vectors.dimensions != about.dimensions:
        raise InputError(_damaged(path, "its vectors have another length than it says"))
    numbers: set[int] = set()
    for keys, stored in vectors.stored():
        if not np.isfinite(stored).all():
            raise InputError(_damaged(path, "it holds vectors that are not numbers"))
        numbers.update((keys >> _VIEW_BITS).tolist())
    if numbers != set(items):
        raise InputError(_damaged(path, "its vectors and its items do not agree"))


def _start_of(member: zipfile.ZipInfo, file: IO[bytes]) -> int:
    """Where the bytes of an uncompressed member begin (APPNOTE.TXT 4.3.7)."""
    file.seek(member.header_offset + 26)
    name = int.from_bytes(file.read(2), "little")
    extra = int.from_bytes(file.read(2), "little")
    return member.header_offset + 30 + name + extra


def _same_content(path: Path, item: Item | None) -> bool:
    with suppress(OSError), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return item is not None and digest == item.sha256
    return False


def _damaged(path: Path, problem: object) -> str:
    return f"index {path} is damaged ({problem}): {_AGAIN}."
