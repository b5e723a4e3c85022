"""Drop folders: which files in them count, and what is in them now."""

import os
import queue
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, TypeVar

from pic_daemon.images import PATTERNS

T = TypeVar("T")

EXCLUDED = (".*", "*.part", "*.tmp", "*.crdownload")
"""Names left alone by default: hidden files and downloads that are not finished."""

_ENDINGS = 5  # named where files are told that were passed over


@dataclass(frozen=True)
class FileStamp:
    """How a file looked at one moment: size in bytes, mtime in ns, inode number.

    The last two wrapped into 64 bits with a sign, which is what SQLite stores: an mtime
    after 2262 and the highest inode numbers have more.
    """

    bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        """The stamp in a stat result."""
        mtime_ns, inode = (
            (number + 2**63) % 2**64 - 2**63
            for number in (status.st_mtime_ns, status.st_ino)
        )
        return cls(status.st_size, mtime_ns, inode)


@dataclass(frozen=True)
class Folder:
    """A drop folder. `include` and `exclude` are file name patterns, case ignored;
    `exclude` also keeps out sub-folders by name. With mode ``poll``, for file systems
    that announce nothing, the folder is scanned every `poll_seconds`."""

    path: Path
    recursive: bool = True
    include: tuple[str, ...] = field(default=PATTERNS)
    exclude: tuple[str, ...] = field(default=EXCLUDED)
    mode: Literal["events", "poll"] = "events"
    poll_seconds: float = 10.0

    def wants(self, path: str) -> bool:
        """Whether a file at this absolute path lies in the folder and fits the patterns."""
        relative = os.path.relpath(path, self.path)
        *parents, name = relative.split(os.sep)
        if os.pardir in parents or (parents and not self.recursive):
            return False
        return (
            _fits(name, self.include)
            and not _fits(name, self.exclude)
            and not any(_fits(parent, self.exclude) for parent in parents)
        )

    def scan(self) -> Iterator[tuple[str, FileStamp]]:
        """Every wanted regular file on the disk now, as `walk` finds them."""
        return (found for found in self.walk(str(self.path)) if found)

    def walk(
        self,
        below: str,
        refused: Callable[[str, OSError], None] = lambda *_: None,
        passed_over: Counter[str] | None = None,
    ) -> Iterator[tuple[str, FileStamp] | None]:
        """Every wanted regular file under `below` now, and None for everything else there.

        Symbolic links are not followed. What vanishes meanwhile is passed over; `refused`
        is told of what cannot be looked at, and why: of a folder that may be listed but not
        entered once for each file, but by the folder's own path. `passed_over` counts, by
        ending, the files that `include` does not name.
        """
        pending = [below]
        while pending:
            for entry in _entries(pending.pop(), refused):
                found = None
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if self.recursive and not _fits(entry.name, self.exclude):
                            pending.append(entry.path)
                    elif self.wants(entry.path) and entry.is_file(follow_symlinks=False):
                        found = entry.path, FileStamp.of(entry.stat(follow_symlinks=False))
                    elif (
                        passed_over is not None
                        and not _fits(entry.name, self.include + self.exclude)
                        and entry.is_file(follow_symlinks=False)
                    ):
                        passed_over[os.path.splitext(entry.name)[1].lower()] += 1
                except (FileNotFoundError, NotADirectoryError):
                    pass
                except PermissionError as error:
                    refused(os.path.dirname(entry.path), error)
                except OSError as error:
                    refused(entry.path, error)
                yield found


def _entries(
    folder: str, refused: Callable[[str, OSError], None]
) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        refused(folder, error)


def answer_within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What `ask`, which must not raise, returns, or None where that takes longer, as on a
    mount that hangs."""
    answers: queue.SimpleQueue[T] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(ask()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def stamp_of(path: str) -> FileStamp | None:
    """The stamp of a regular file, or None where there is none (links do not count)."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return FileStamp.of(status) if stat.S_ISREG(status.st_mode) else None


def about_names(passed_over: Counter[str]) -> str:
    """What `walk` passed over: "3 files are no images by their names: 2 .heic, 1 .txt"."""
    shown = [
        f"{count} {ascii(text_of(ending))[1:-1] or 'without an ending'}"
        for ending, count in passed_over.most_common(_ENDINGS)
    ]
    more = ", ..." if len(passed_over) > _ENDINGS else ""
    return (
        f"{passed_over.total()} files are no images by their names: "
        f"{', '.join(shown)}{more}"
    )


def text_of(path: str) -> str:
    """A path as valid Unicode: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Mount:
    """A mounted file system: where, and its type such as ``ext4``."""

    point: str = ""
    type: str = ""


def mount_of(path: Path) -> Mount:
    """The mount that holds `path` (proc(5), mountinfo); empty where unknown."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return Mount()
    target = os.path.realpath(path)
    best = Mount()
    for line in map(os.fsdecode, lines):
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best.point):
            best = Mount(point, right.split()[0])
    return best


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    lowered = name.lower()
    return any(fnmatch(lowered, pattern.lower()) for pattern in patterns)
