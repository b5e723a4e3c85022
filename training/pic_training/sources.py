"""The pictures of a run: found, hashed, decoded once, told apart and split.

Every picture is decoded once, by the daemon's decoder, into a working copy in one
flat file that the sample workers read from.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pic_daemon.corrections import Correction
from pic_daemon.errors import InputError
from pic_daemon.folders import Folder, about_names
from pic_daemon.images import ImageError, Pixels, is_blank, open_rgb, to_pixels
from pic_daemon.reading import read_bytes
from pic_training.near_duplicates import Look, first_copies, groups_of, look_of
from pic_training.process import cores

Split = Literal["train", "val"]
Kind = Literal["catalog", "other"]

VALIDATION_SHARE = 0.2
"""Share of the other images held back where no folder for validation is given."""


@dataclass(frozen=True)
class Source:
    """One picture. Its working copy is uint8 RGB of shape (height, width, 3), at
    `offset` bytes into the working file. `stored_width` and `stored_height` are the
    file's own. A catalog picture is in both splits, under different augmentations.
    Pictures of one `group` are near-duplicates, and always on the same side of a split.
    """

    path: str
    sha256: str
    kind: Kind
    split: Split
    group: str
    offset: int
    height: int
    width: int
    stored_width: int
    stored_height: int


@dataclass(frozen=True)
class LeftOut:
    """A file that takes no part, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Sources:
    """All pictures of a run and the file with their working copies."""

    pictures: tuple[Source, ...]
    left_out: tuple[LeftOut, ...]
    file: Path

    def of(self, kind: Kind, split: Split) -> list[Source]:
        """The pictures to draw samples from."""
        return [
            p
            for p in self.pictures
            if p.kind == kind and (kind == "catalog" or p.split == split)
        ]

    def pixels(self, source: Source) -> Pixels:
        """The working copy of one of the pictures, as `pixels_of`."""
        return pixels_of(source, self.file)

    def image(self, source: Source) -> Image.Image:
        """The same as Pillow has it."""
        return Image.fromarray(self.pixels(source))

    def tested(self) -> NDArray[np.bool_]:
        """For each picture, whether it is a held-back decoy of the test half.

        The other held-back decoys calibrate.
        """
        test = test_half(self.of("other", "val"))
        return np.array([p.split == "val" and p.group in test for p in self.pictures])

    def groups(self) -> NDArray[np.int64]:
        """The number of each picture's group, by which intervals are bootstrapped."""
        names = [f"{p.kind} {p.group}" for p in self.pictures]
        return np.unique(names, return_inverse=True)[1]

    def digest_of(self, kind: Kind) -> str:
        """SHA-256 over the sorted hashes of the pictures of a kind."""
        hashes = sorted(p.sha256 for p in self.pictures if p.kind == kind)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """As `digest_of`, of every picture, in order."""
        return digest_of((p.sha256, p.kind, p.split) for p in self.pictures)


def digest_of(pictures: Iterable[tuple[str, str, str]]) -> str:
    """SHA-256 over the content's SHA-256, kind and split of pictures, in order."""
    lines = (f"{sha256} {kind} {split}\n" for sha256, kind, split in pictures)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def scratch_file() -> Iterator[Path]:
    """A name for working copies that are needed for a while.

    Raises InputError where there is no folder for such files.
    """
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise InputError(
            f"no room for working copies: {error.strerror}. TMPDIR names another folder."
        ) from error
    with folder as place:
        yield Path(place) / "sources.rgb"


def pixels_of(source: Source, file: Path) -> Pixels:
    """A picture's copy in the working file, uint8 RGB, (height, width, 3)."""
    shape = (source.height, source.width, 3)
    count = int(np.prod(shape))
    return np.fromfile(file, np.uint8, count, offset=source.offset).reshape(shape)


def test_half(decoys: Iterable[Source]) -> set[str]:
    """The groups that test, every other one by name; the others calibrate."""
    return set(sorted({decoy.group for decoy in decoys})[1::2])


@dataclass(frozen=True)
class _Decoded:
    path: str
    sha256: str
    pixels: NDArray[np.uint8]
    stored: tuple[int, int]
    look: Look
    blank: bool


@dataclass(frozen=True)
class _Found:
    """A decoded picture without its pixels, which lie in the working file."""

    path: str
    sha256: str
    kind: Kind
    split: Split | None
    offset: int
    height: int
    width: int
    stored: tuple[int, int]
    look: Look


@dataclass(frozen=True)
class _Origin:
    """Files of one kind: all below `folder`, or those that were corrected."""

    kind: Kind
    split: Split | None
    folder: Path | None = None
    corrected: tuple[Correction, ...] = ()

    def paths(self, left_out: list[LeftOut]) -> list[str]:
        """The files; folders that cannot be read are added to `left_out`."""
        if not self.folder:
            return [c.path for c in self.corrected]

        refused: dict[str, LeftOut] = {}

        def refuse(path: str, error: OSError) -> None:
            problem = f"this cannot be looked at: {error.strerror}"
            refused[path] = LeftOut(path, problem)

        passed_over: Counter[str] = Counter()
        found = _files(self.folder, refuse, passed_over)
        left_out += refused.values()
        if passed_over:
            left_out.append(LeftOut(str(self.folder.resolve()), about_names(passed_over)))
        return found


def working_side(size: int) -> int:
    """The longest side, in pixels, of working copies for a network that sees `size`."""
    return max(256, 2 * size)


def gather(
    catalog: Path,
    others: Path,
    others_val: Path | None,
    file: Path,
    size: int,
    corrections: Sequence[Correction] = (),
) -> Sources:
    """Decode every picture below the folders into `file`, for a network that sees `size`.

    Pictures that somebody called ours join the catalog's, those called not ours join the
    others, where their files still are what was judged.

    Leaves out what cannot be decoded, what repeats another picture byte for byte, what is
    nearly uniform, other images that are copies of a catalog image, and images for
    validation with a near-duplicate among those trained on. Without `others_val`, a fifth
    of the other images is held back for validation, and with it a fifth of those called not
    ours, and what is like others held back: whole groups of near-duplicates, by content
    hash.
    Raises InputError where a folder holds no usable image or the disk is full; then
    `file` is not there. It is where no other is left to train on or to validate against,
    as all turned out to be copies.
    """
    ours = tuple(c for c in corrections if c.label == "ours")
    not_ours = tuple(c for c in corrections if c.label == "not-ours")
    of_others: Split | None = "train" if others_val else None
    origins = [
        _Origin("catalog", "train", catalog),
        _Origin("catalog", "train", corrected=ours),
        _Origin("other", of_others, others),
    ]
    if others_val:
        origins.append(_Origin("other", "val", others_val))
    # Last: one that was held back stays so, although it was called not ours.
    origins.append(_Origin("other", None, corrected=not_ours))
    found, left_out = _decode_into(file, origins, size)
    found = _without(found, _copies_among_others(found), left_out)
    groups: dict[str, str] = {}
    for kind in get_args(Kind):
        groups |= groups_of({f.sha256: f.look for f in found if f.kind == kind})
    found = _split(found, groups)
    found = _without(found, _leaking(found, groups), left_out)
    pictures = tuple(
        Source(
            path=f.path,
            sha256=f.sha256,
            kind=f.kind,
            split=f.split or "train",
            group=groups[f.sha256],
            offset=f.offset,
            height=f.height,
            width=f.width,
            stored_width=f.stored[0],
            stored_height=f.stored[1],
        )
        for f in found
    )
    sources = Sources(pictures, tuple(left_out), file)
    for split in get_args(Split):
        if not sources.of("other", split):
            where = others_val if others_val and split == "val" else others
            first = _first_left_out(where, left_out)
            raise InputError(
                f"no image in {where} is left to use as a decoy ({split}){first}."
            )
    return sources


def _decode_into(
    file: Path, origins: Sequence[_Origin], size: int
) -> tuple[list[_Found], list[LeftOut]]:
    found: list[_Found] = []
    left_out: list[LeftOut] = []
    seen: dict[str, str] = {}
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as out:
            for origin in origins:
                before = len(found)
                judged = {c.path: c.sha256 for c in origin.corrected}
                for item in _decode_all(origin.paths(left_out), size):
                    if isinstance(item, LeftOut):
                        left_out.append(item)
                    elif reason := _reason_against(item, origin, judged, seen):
                        left_out.append(LeftOut(item.path, reason))
                    else:
                        seen[item.sha256] = item.path
                        found.append(_kept(item, origin, out.tell()))
                        out.write(item.pixels.tobytes())
                if origin.folder and len(found) == before:
                    raise InputError(_nothing_in(origin.folder, left_out))
        temporary.replace(file)
    except OSError as error:
        elsewhere = file.is_relative_to(tempfile.gettempdir())
        remedy = " TMPDIR names another folder for it." if elsewhere else ""
        raise InputError(f"cannot write {file}: {error.strerror}.{remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return found, left_out


def _kept(item: _Decoded, origin: _Origin, offset: int) -> _Found:
    height, width, _ = item.pixels.shape
    return _Found(
        item.path,
        item.sha256,
        origin.kind,
        origin.split,
        offset,
        height,
        width,
        item.stored,
        item.look,
    )


def _reason_against(
    item: _Decoded, origin: _Origin, judged: dict[str, str], seen: dict[str, str]
) -> str | None:
    """Why a decoded picture takes no part, if so; `seen` are paths by content hash."""
    if judged.get(item.path, item.sha256) != item.sha256:
        return "changed since it was corrected"
    if twin := seen.get(item.sha256):
        if twin != item.path:
            return f"same bytes as {twin}"
        overlap = "the folders overlap, or it was corrected"
        before = overlap if origin.folder else "it lies in a folder that was given"
        return f"it takes part already: {before}"
    # The service never matches one, whatever the network: it is not to choose a threshold.
    if item.blank:
        return "nearly uniform picture: nothing to recognise"
    return None


def _without(
    found: Sequence[_Found], reasons: dict[str, str], left_out: list[LeftOut]
) -> list[_Found]:
    """What is left of `found` after the paths in `reasons` are noted as left out."""
    left_out += [LeftOut(path, reason) for path, reason in reasons.items()]
    return [f for f in found if f.path not in reasons]


def looks_at(pictures: Mapping[str, str], size: int) -> Iterator[Look]:
    """How pictures look that are where they were, given path -> sha256, and still those."""
    for item in _decode_all(pictures, size):
        if isinstance(item, _Decoded) and item.sha256 == pictures[item.path]:
            yield item.look


def _files(
    folder: Path, refused: Callable[[str, OSError], None], passed_over: Counter[str]
) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist or is no folder.")
    whole = Folder(folder.resolve())
    walk = whole.walk(str(whole.path), refused, passed_over)
    return sorted(found[0] for found in walk if found)


def _nothing_in(folder: Path, left_out: Sequence[LeftOut]) -> str:
    if not (first := _first_left_out(folder, left_out)):
        return (
            f"{folder} holds no image files (looked below it, by file name; "
            "links and hidden folders are passed over)."
        )
    return f"none of the files in {folder} can be used{first}."


def _first_left_out(folder: Path, left_out: Sequence[LeftOut]) -> str:
    """The first that was left out below a folder and the count of them, if any."""
    inside = [item for item in left_out if Path(item.path).is_relative_to(folder.resolve())]
    if not inside:
        return ""
    return f"; left out: {len(inside)}, first {inside[0].path}: {inside[0].reason}"


def _decode_all(paths: Iterable[str], size: int) -> Iterator[_Decoded | LeftOut]:
    workers = cores()
    remaining = iter(paths)
    with ThreadPoolExecutor(workers) as pool:
        # In slices, so that no more than one of them is in memory at a time.
        while chunk := list(islice(remaining, 64 * workers)):
            yield from pool.map(lambda path: _decode(path, size), chunk)


def _decode(path: str, size: int) -> _Decoded | LeftOut:
    reading, data = read_bytes(path)
    if not reading.sha256:
        gone = "changed while it was read" if reading.changed else "no longer there"
        return LeftOut(path, reading.error or gone)
    side = working_side(size)
    try:
        image, stored = open_rgb(data, side)
    except ImageError as error:
        return LeftOut(path, str(error))
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    pixels, blank = np.asarray(image), is_blank(to_pixels(image, size))
    return _Decoded(path, reading.sha256, pixels, stored, look_of(image), blank)


def _copies_among_others(found: Sequence[_Found]) -> dict[str, str]:
    """Path of each other image that is a copy of a catalog image -> of which."""
    catalog = [f for f in found if f.kind == "catalog"]
    others = [f for f in found if f.kind == "other"]
    twins = first_copies([f.look for f in others], [f.look for f in catalog])
    return {
        other.path: f"copy of {catalog[twin].path}"
        for other, twin in zip(others, twins, strict=True)
        if twin is not None
    }


def _split(found: Sequence[_Found], groups: dict[str, str]) -> list[_Found]:
    """The same, where none was said: to train on, or held back."""
    trained_on, measured = (
        {groups[f.sha256] for f in found if f.kind == "other" and f.split == split}
        for split in get_args(Split)
    )
    open_groups = [groups[f.sha256] for f in found if f.split is None]
    settled = trained_on | measured
    held_back = _held_back([group for group in open_groups if group not in settled])
    held_back |= measured - trained_on
    return [
        replace(f, split=f.split or ("val" if groups[f.sha256] in held_back else "train"))
        for f in found
    ]


def _leaking(found: Sequence[_Found], groups: dict[str, str]) -> dict[str, str]:
    """Path of each image given for validation that has a twin given for training."""
    trained_on = {
        groups[f.sha256]: f.path for f in found if f.kind == "other" and f.split == "train"
    }
    return {
        f.path: f"near-duplicate of {trained_on[groups[f.sha256]]}, which is trained on"
        for f in found
        if f.split == "val" and groups[f.sha256] in trained_on
    }


def _held_back(groups: Sequence[str]) -> set[str]:
    """Whole groups that make up VALIDATION_SHARE of the pictures, or as near as can be,
    and of the groups: beside one large scene all the others would be held back.

    In the order of their names' hashes: in that of the names, which are the smallest
    of several hashes, large groups would come first.
    """
    sizes = Counter(groups)
    if len(sizes) < 2:
        return set()
    order = sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    wanted, most = (max(1, round(VALIDATION_SHARE * len(of))) for of in (groups, sizes))
    chosen: set[str] = set()
    count = 0
    for group in order:
        if count + sizes[group] <= wanted and len(chosen) < most:
            chosen.add(group)
            count += sizes[group]
    return chosen or {min(order, key=lambda group: sizes[group])}
