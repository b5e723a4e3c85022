"""Small copies of recorded pictures, and of those they were matched to.

A file is shown only where it is a recorded row's and lies in a watched folder, or where
a row names it in the catalog. No link is followed on the way to it.
"""

import io
import os
import re
import stat
import textwrap
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from PIL import Image

from pic_daemon.folders import FileStamp
from pic_daemon.images import ImageError, open_rgb

SIDES = {"small": 256, "large": 768}
"""Longest side of a copy in pixels: in a list at twice its size there, and alone."""

MAX_PIXELS = 50_000_000
"""Largest picture decoded for a look at it: 150 MB while it is in memory, five times that
where it is transparent or has 16 bits a sample."""

MAX_BYTES = 64 << 20
"""Largest file read for a look at it."""

Of = Literal["dropped", "catalog"]
PAIR: tuple[Of, ...] = get_args(Of)
"""The pictures of a row."""

_QUALITY = 80
_NOT_UTF8 = re.compile(r"\\x[89a-f][0-9a-f]")  # as folders.text_of records such bytes
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotShown(Exception):
    """This picture is not shown; the message says why, in a few words."""


def place(
    row: dict[str, Any], of: Of, folders: Iterable[str], catalog: Path | None
) -> tuple[Path, str]:
    """The folder that a picture of a row of `images` may be shown from, and where in it.

    Looks at no disk. Raises NotShown unless the dropped file lies in one of `folders` and
    was decoded by the service, which does so in a process of its own, or the row names a
    picture of `catalog`.
    """
    if of == "catalog":
        if not row["catalog_item"]:
            raise NotShown("no product named")
        if catalog is None:
            raise NotShown("no catalog given")
        return catalog, row["catalog_item"]
    if row["status"] == "failed":
        raise NotShown("could not be decoded")
    # The innermost: another file system inside a folder is watched by itself.
    for folder in sorted(folders, key=len, reverse=True):
        inside = folder.rstrip("/") + "/"
        if row["path"].startswith(inside):
            return Path(folder), row["path"][len(inside) :]
    raise NotShown("not in a watched folder")


def unplaced(
    row: dict[str, Any], folders: Iterable[str], catalog: Path | None
) -> dict[Of, str]:
    """Why pictures of a row are not shown, as far as can be told without the disk."""
    reasons = {}
    for of in PAIR:
        try:
            place(row, of, folders, catalog)
        except NotShown as reason:
            reasons[of] = str(reason)
    return reasons


def read(
    row: dict[str, Any], of: Of, folder: Path, relative: str, most: int = MAX_BYTES
) -> bytes:
    """At most the first bytes of a picture whose place is known; looks at the disk.

    Raises NotShown where they cannot be had, or a dropped file is not the recorded one.
    """
    data, stamp = read_beneath(folder, relative, most)
    if of == "dropped":
        other = most and sha256(data).hexdigest() != row["sha256"]
        if other or stamp.bytes != row["bytes"]:
            raise NotShown("changed since")
    return data


def read_beneath(
    folder: Path, relative: str, most: int = MAX_BYTES
) -> tuple[bytes, FileStamp]:
    """At most the first bytes of a regular file below `folder`, opened without links.

    Raises NotShown where a step leads out of the folder, is a link or is not there.
    """
    steps = relative.split("/")
    if "\0" in relative or any(step in ("", ".", "..") for step in steps):
        raise NotShown("not in the folder")
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for step, flags in zip(
            steps, [_DIRECTORY] * (len(steps) - 1) + [_FILE], strict=True
        ):
            before = at
            try:
                at = os.open(step, flags, dir_fd=before)
            finally:
                os.close(before)
        status = os.fstat(at)
        if not stat.S_ISREG(status.st_mode):
            os.close(at)
            raise NotShown("not a file")
        with open(at, "rb") as file:
            if status.st_size > MAX_BYTES:
                raise NotShown("too large to show")
            return file.read(most), FileStamp.of(status)
    except OSError as error:
        unnamed = _NOT_UTF8.search(f"{folder}/{relative}")
        reason = "its name is not UTF-8" if unnamed else "no longer there"
        raise NotShown(reason) from error


def instead(reason: str) -> bytes:
    """An SVG that says why there is no picture; readable at 120 pixels, as in a list."""
    lines = textwrap.wrap(reason, 16)
    top = 86 - 11 * (len(lines) - 1)
    text = "".join(
        f'<tspan x="80" y="{top + 22 * n}">{line}</tspan>' for n, line in enumerate(lines)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 160">'
        '<rect width="160" height="160" fill="#eceff3"/>'
        '<text text-anchor="middle" fill="#444" font-family="sans-serif" font-size="18">'
        f"{text}</text></svg>"
    ).encode()


def smaller(data: bytes, side: int) -> bytes:
    """A JPEG of a picture, its longer side at most `side` pixels. Raises NotShown."""
    try:
        image, _ = open_rgb(data, side, MAX_PIXELS)
    except ImageError as error:
        raise NotShown("too large or not an image") from error
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


def name_of(path: str) -> tuple[str, str]:
    """File name and folder of a recorded path."""
    pure = PurePosixPath(path)
    return pure.name, str(pure.parent)
