"""Small copies of recorded pictures, and of those they were matched to.

A file is shown only where it is a recorded row's and lies in a watched folder, or where
a row names it in the catalog. No link is followed on the way to it.
"""

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pic_daemon.folders import FileStamp
from pic_daemon.images import ImageError, open_rgb
from pic_daemon.match_log import STALE

SIDES = {"small": 256, "large": 768}
"""Longest side of a copy in pixels: in a list at twice its size there, and alone."""

MAX_PIXELS = 50_000_000
"""Largest picture decoded for a look at it: 150 MB while it is in memory, five times that
where it is transparent or has 16 bits a sample."""

MAX_BYTES = 64 << 20
"""Largest file read for a look at it."""

_QUALITY = 80
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotShown(Exception):
    """This picture is not shown; the message says why, in a few words."""


def dropped(row: dict[str, Any], folders: Iterable[str], side: int) -> bytes:
    """A JPEG of the file of a row of `images`, its longer side at most `side` pixels.

    Raises NotShown unless the file lies in one of `folders`, is the one that was
    recorded, and was decoded by the service, which does so in a process of its own.
    """
    return _smaller(_dropped_file(row, folders), side)


def missing(
    row: dict[str, Any], folders: Iterable[str], catalog: Path | None
) -> dict[str, str]:
    """Why the pictures of a row are not shown, as far as can be told without them."""
    reasons = {}
    for of in ("dropped", "catalog"):
        try:
            if of == "dropped":
                _dropped_file(row, folders, 0)
            else:
                _catalog_file(row, catalog, 0)
        except NotShown as reason:
            reasons[of] = str(reason)
    return reasons


def _dropped_file(
    row: dict[str, Any], folders: Iterable[str], most: int = MAX_BYTES
) -> bytes:
    if row["status"] == "failed":
        raise NotShown("could not be decoded")
    for folder in folders:
        inside = folder.rstrip("/") + "/"
        if row["path"].startswith(inside):
            data, stamp = read_beneath(Path(folder), row["path"][len(inside) :], most)
            break
    else:
        raise NotShown("not in a watched folder")
    if stamp.bytes != row["bytes"] or row["mtime_ns"] not in (STALE, stamp.mtime_ns):
        raise NotShown("changed since")
    return data


def of_catalog(row: dict[str, Any], catalog: Path | None, side: int) -> bytes:
    """The same of the catalog picture that a row names. Raises NotShown."""
    return _smaller(_catalog_file(row, catalog), side)


def _catalog_file(
    row: dict[str, Any], catalog: Path | None, most: int = MAX_BYTES
) -> bytes:
    if not row["catalog_item"]:
        raise NotShown("no product named")
    if catalog is None:
        raise NotShown("no catalog given")
    return read_beneath(catalog, row["catalog_item"], most)[0]


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
        raise NotShown("no longer there") from error


def instead(reason: str) -> bytes:
    """An SVG that says why there is no picture."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 160">'
        '<rect width="160" height="160" fill="#8883"/>'
        '<text x="80" y="84" text-anchor="middle" fill="#888" '
        f'font-family="sans-serif" font-size="12">{reason}</text></svg>'
    ).encode()


def _smaller(data: bytes, side: int) -> bytes:
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
