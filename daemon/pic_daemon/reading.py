"""Read one file: bytes, hash and pixels from a single open, so that they agree."""

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from pic_daemon.folders import FileStamp, stamp_of
from pic_daemon.images import MAX_PIXELS, DecodedImage, ImageError, decode

MAX_BYTES = 1 << 30
"""Largest file read into memory, in bytes."""


@dataclass(frozen=True)
class Reading:
    """What reading `path` gave.

    `stamp` is None where no regular file is there any more, or where `changed`, `suspect`
    or `transient` say that nobody looked. `changed`: the file was written to meanwhile and
    nothing else here counts. Otherwise either `image` or
    `error` is set; `sha256` is '' where the bytes could not be had. `transient`: the
    error is of this one attempt, not of the content: another may succeed. `suspect`: the
    group that it was read in came to a bad end; nothing is known until it is read alone.
    `seconds` is what reading, hashing and decoding took.
    """

    path: str
    stamp: FileStamp | None
    sha256: str = ""
    image: DecodedImage | None = None
    error: str | None = None
    changed: bool = False
    transient: bool = False
    suspect: bool = False
    seconds: float = 0.0


def read_images(paths: Sequence[str], size: int, max_pixels: int) -> list[Reading]:
    """Read several files one after the other, as `read_image` does."""
    readings = []
    for path in paths:
        begun = time.perf_counter()
        reading = read_image(path, size, max_pixels)
        readings.append(replace(reading, seconds=time.perf_counter() - begun))
    return readings


def read_image(path: str, size: int, max_pixels: int = MAX_PIXELS) -> Reading:
    """Read, hash and decode one file to size x size pixels; never raises OSError."""
    reading, data = read_bytes(path)
    if not reading.sha256:
        return reading
    try:
        return replace(reading, image=decode(data, size, max_pixels))
    except ImageError as error:
        return replace(reading, error=str(error))


def read_bytes(path: str) -> tuple[Reading, bytes]:
    """Read and hash one file; without a sha256 in the Reading there are no bytes."""
    stamp = None
    try:
        with _opened(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Reading(path, None), b""
            stamp = FileStamp.of(status)
            if stamp.bytes > MAX_BYTES:
                problem = f"larger than {MAX_BYTES:,} bytes"
                return Reading(path, stamp, error=problem), b""
            data = file.read(stamp.bytes + 1)
            after = FileStamp.of(os.fstat(file.fileno()))
    except FileNotFoundError:
        return Reading(path, None), b""
    except OSError as error:
        stamp = stamp or stamp_of(path)
        problem = f"cannot be read: {error.strerror}"
        return Reading(path, stamp, error=problem, transient=True), b""
    if after != stamp or len(data) != stamp.bytes:
        return Reading(path, after, changed=True), b""
    return Reading(path, stamp, hashlib.sha256(data).hexdigest()), data


def _opened(path: str) -> BinaryIO:
    # O_NONBLOCK: opening a FIFO that was swapped in must not hang the reader.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return open(handle, "rb")
    except BaseException:  # as of a folder
        os.close(handle)
        raise
