"""Hints from the file system, through watchdog.

Events only shorten latency: the kernel drops them when a burst overflows its
queue, and a folder filled before its watch existed announces nothing. Comparing
the disk with the match log is what finds every file; see `scanning`.
"""

import errno
import logging
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from pic_daemon.folders import FileStamp, Folder, Mount, mount_of, stamp_of
from pic_daemon.inotify_limits import watches_left, watches_needed

logger = logging.getLogger("pic_daemon")


@dataclass(frozen=True)
class FileHint:
    """Something happened to the file; `complete` if it was closed or renamed into place.

    `heard_in` is the folder whose watch told of it: those around it may tell too.
    """

    path: str
    stamp: FileStamp
    complete: bool
    heard_in: Path


@dataclass(frozen=True)
class HintsLost:
    """The kernel dropped events: scan everything."""


_WATCHDOG_LOG = logging.getLogger("watchdog.observers.inotify_c")

_REMEDIES = {
    errno.ENOSPC: "no inotify watches left, raise fs.inotify.max_user_watches with sysctl",
    errno.EMFILE: "raise fs.inotify.max_user_instances with sysctl",
}

_PASSING = (errno.ENOENT, errno.ENOTDIR, errno.ENOTCONN, errno.ESTALE)
"""What a folder says that goes while its watch is made."""

_COUNT_EVERY_S = 60.0  # between two looks at the watches that all processes hold

_NO_WATCH = -1  # under which watchdog keeps a folder that it could not watch

_RENEW_S = 300.0  # the least between two watches of a folder from which others are moved

_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent, FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent,
]  # fmt: skip


class FolderWatch:
    """The watch on one folder, while it is there; all but `online` is for one thread.

    `send` gets hints of files that the folder wants, `scan` the path of a folder that
    appeared below, perhaps already filled; both from a thread of this folder's own.

    The folder is offline while it is missing or shut, or while it lies on another mount
    point than when it came or on another type of file system. `mount_point` is the
    innermost on which a service has seen it, '' where none has: an empty folder that lies
    outside is one whose disk is missing, and one that is not empty may be. `progress` is
    called now and then while a look goes on.
    """

    def __init__(
        self,
        folder: Folder,
        send: Callable[[FileHint], None],
        scan: Callable[[str], None],
        mount_point: str = "",
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.mount_point = mount_point
        self._progress = progress
        self.polled = folder.mode == "poll"  # nothing announces what arrives
        self._folder = folder
        self._handler = _Handler(folder, send, scan)
        self._mount: Mount | None = None  # as first seen here
        self._inode: int | None = None
        self._observer: BaseObserver | None = None
        self._said_offline = False
        self._next_count = 0.0
        self._renew_at = 0.0

    @property
    def online(self) -> bool:
        """Whether the folder was there when last looked at."""
        return self._inode is not None

    def look(self) -> bool:
        """Bring the watch in line with the disk; returns whether the folder came (back)."""
        came = self._came()
        if self._observer and time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + _COUNT_EVERY_S
            if watches_left() == 0 and not self.polled:
                self._poll(errno.ENOSPC)
        return came

    def end(self) -> None:
        """Take the watch away."""
        if self._observer:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def _came(self) -> bool:
        inode = self._inode_there()
        as_said = inode == self._inode and (inode is not None or self._said_offline)
        if as_said and not self._watch_ended():
            return False
        self.end()
        self._inode = inode
        if inode is None:
            logger.warning("folder %s is offline", self._folder.path)
            self._said_offline = True
            return False
        if self._said_offline:
            logger.info("folder %s is back", self._folder.path)
            self._said_offline = False
        if not self.polled:
            self._begin()
        return self.online

    def _watch_ended(self) -> bool:
        """Whether the watch is lost, has gaps, or holds what is not the folder's any more.

        A folder made anew under its old inode number has lost it, and so has one that was
        unmounted and mounted again. After a queue overflow nobody knows which sub-folders
        there are. watchdog keeps watching those that were moved away, under old names, and
        never begins to with one that was shut when it appeared.
        """
        observer = self._observer
        if observer is None:
            return False
        emitting = observer.is_alive() and any(e.is_alive() for e in observer.emitters)
        if not (emitting and _hears(observer)) or self._handler.overflowed:
            return True
        stale = self._handler.moved_away or _opened(observer)
        return stale and time.monotonic() >= self._renew_at

    def _inode_there(self) -> int | None:
        path = self._folder.path
        try:
            os.scandir(path).close()  # which mounts what is mounted when it is used
            if not os.access(path, os.X_OK):
                return None
            status = os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                return None
            mount = mount_of(path)
            outside = len(mount.point) < len(self.mount_point)
            if self._mount is None:
                if outside and not os.listdir(path):
                    return None
                if outside:
                    logger.warning(
                        "folder %s was on a disk mounted at %s, which is missing; the rows "
                        "of its files are kept", path, self.mount_point,
                    )  # fmt: skip
                self._mount = mount
            elif mount.point == self.mount_point != self._mount.point:
                self._mount = mount  # the disk that was missing
        except OSError:
            return None
        if mount != self._mount:
            return None
        if not outside:
            self.mount_point = mount.point
        return status.st_ino

    def _begin(self) -> None:
        self._handler.moved_away = self._handler.overflowed = False
        self._renew_at = time.monotonic() + _RENEW_S
        try:
            # watchdog passes over sub-folders that it cannot watch, without a word.
            left = watches_left()
            if left is not None and watches_needed(self._folder, self._progress) > left:
                raise OSError(errno.ENOSPC, "inotify watch limit reached")
            self._progress()
            # An observer of its own: its threads walk and stat what is in the folder.
            self._observer = _observer()
            self._observer.start()
            self._observer.schedule(
                self._handler,
                str(self._folder.path),
                recursive=self._folder.recursive,
                event_filter=_EVENTS,
            )
            _mend(self._observer, self._handler)
        except OSError as error:
            self.end()
            if error.errno in _PASSING:
                self._inode = None  # the next look sees whether it is there
            else:
                self._poll(error.errno or 0)

    def _poll(self, reason: int) -> None:
        self.polled = True
        logger.warning(
            "folder %s cannot be watched: %s; scanning it every %g s",
            self._folder.path, _REMEDIES.get(reason, os.strerror(reason)),
            self._folder.poll_seconds,
        )  # fmt: skip


@contextmanager
def hearing_overflows(send: Callable[[HintsLost], None]) -> Iterator[None]:
    """Have `send` told of every queue overflow."""
    listener = _OverflowListener(send)
    _WATCHDOG_LOG.addHandler(listener)
    try:
        yield
    finally:
        _WATCHDOG_LOG.removeHandler(listener)


def _observer() -> BaseObserver:
    if sys.platform == "linux":
        from watchdog.observers.inotify import InotifyObserver

        # Of each folder that is shut, with the names of all that are watched.
        warnings.filterwarnings("ignore", "Callback with id .* already exists")
        # Full events tell a file moved in from outside (complete) from a new one.
        return InotifyObserver(generate_full_events=True)
    return Observer()


def _mend(observer: BaseObserver, handler: "_Handler") -> None:
    """Have watchdog forget a watch whose name it has given to another, or forgotten.

    It raises there otherwise, in the thread that reads the events or when it is to end:
    sub-folders that were moved away keep their watch under a name that comes again.

    After an overflow it would take all watches away in that same thread, and the kernel
    tell of each: with more of them than the queue holds, that overflows again, for ever.
    """

    def forget(group: Any, wd: int) -> None:
        path = group._active_callbacks_by_watch.pop(wd, None)
        if group._active_callbacks_by_path.get(path) == wd:
            del group._active_callbacks_by_path[path]

    for emitter in observer.emitters:
        group: Any = getattr(emitter, "_inotify", None)
        if hasattr(group, "_remove_watch_internally"):
            group._remove_watch_internally = partial(forget, group)
        if hasattr(group, "on_queue_overflow"):
            group.on_queue_overflow = handler.overflow


def _hears(observer: BaseObserver) -> bool:
    """Whether the thread that reads inotify's events lives and has a watch left.

    watchdog does not tell, so that its own state is asked, where it is as we know it.
    """
    reader = getattr(observer, "_inotify_fd", None)
    if reader is None:
        return True
    held = list(getattr(reader, "_watch_for_wd", {0: None}))
    return reader.is_alive() and any(number != _NO_WATCH for number in held)


def _opened(observer: BaseObserver) -> bool:
    """Whether a folder may be read that watchdog, without a word, could not watch."""
    for emitter in observer.emitters:
        group = getattr(emitter, "_inotify", None)
        held = dict(getattr(group, "_active_callbacks_by_path", {}))
        if any(wd == _NO_WATCH and os.access(path, os.R_OK) for path, wd in held.items()):
            return True
    return False


class _Handler(FileSystemEventHandler):
    def __init__(
        self,
        folder: Folder,
        send: Callable[[FileHint], None],
        scan: Callable[[str], None],
    ) -> None:
        self.moved_away = False  # whether a sub-folder was
        self.overflowed = False  # whether the kernel dropped events
        self._folder = folder
        self._send = send
        self._scan = scan

    def overflow(self) -> None:
        """Called by watchdog."""
        self.overflowed = True

    def dispatch(self, event: FileSystemEvent) -> None:
        moved = isinstance(event, FileMovedEvent | DirMovedEvent)
        path = os.fsdecode(event.dest_path if moved else event.src_path)
        if not path:  # moved out of the tree
            self.moved_away |= event.is_directory
        elif event.is_directory:
            if self._folder.recursive:
                self._scan(path)
        elif self._folder.wants(path) and (stamp := stamp_of(path)):
            complete = moved or isinstance(event, FileClosedEvent)
            self._send(FileHint(path, stamp, complete, self._folder.path))


class _OverflowListener(logging.Handler):
    """watchdog reports a queue overflow only in its log; turn that into a hint."""

    def __init__(self, send: Callable[[HintsLost], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage():
            self._send(HintsLost())
