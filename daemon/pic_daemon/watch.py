"""Hints from the file system, through watchdog.

Events only shorten latency: the kernel drops them when a burst overflows its
queue, and a folder filled before its watch existed announces nothing. Comparing
the disk with the match log is what finds every file; see `service`.
"""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

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
from watchdog.observers.api import BaseObserver, ObservedWatch

from pic_daemon.folders import Folder, Mount, mount_of
from pic_daemon.inotify_limits import watches_left, watches_needed

logger = logging.getLogger("pic_daemon")


@dataclass(frozen=True)
class FileHint:
    """Something happened to the file; `complete` if it was closed or renamed into place."""

    path: str
    complete: bool


@dataclass(frozen=True)
class FolderHint:
    """A folder appeared, perhaps already filled: scan it."""

    path: str


@dataclass(frozen=True)
class HintsLost:
    """The kernel dropped events: scan everything."""


Hint = FileHint | FolderHint | HintsLost

_WATCHDOG_LOG = logging.getLogger("watchdog.observers.inotify_c")

_REMEDIES = {
    errno.ENOSPC: "no inotify watches left, raise fs.inotify.max_user_watches with sysctl",
    errno.EMFILE: "raise fs.inotify.max_user_instances with sysctl",
}

_COUNT_EVERY_S = 60.0  # between two looks at the watches that all processes hold

_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent, FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent,
]  # fmt: skip


@dataclass
class _Watched:
    """What is known of a folder: where it was mounted at first, and its watch."""

    mount: Mount
    inode: int | None = None
    watch: ObservedWatch | None = None
    polled: bool = False
    said_offline: bool = False


class Watches:
    """Watches on the folders that are there; `send` gets hints from another thread.

    A folder is offline while it is missing, or while another file system than at
    first is mounted where it was.
    """

    def __init__(self, folders: Sequence[Folder], send: Callable[[Hint], None]) -> None:
        self._handler = _Handler(send)
        self._overflow = _OverflowListener(send)
        self._observer = _observer()
        self._next_count = 0.0
        self._states = {
            folder: _Watched(mount_of(folder.path), polled=folder.mode == "poll")
            for folder in folders
        }

    def __enter__(self) -> Self:
        _WATCHDOG_LOG.addHandler(self._overflow)
        self._observer.start()
        return self

    def __exit__(self, *_: object) -> None:
        _WATCHDOG_LOG.removeHandler(self._overflow)
        self._observer.stop()
        self._observer.join()

    def look(self) -> list[Folder]:
        """Bring the watches in line with the disk; returns folders that came (back)."""
        came = [
            folder for folder, state in self._states.items() if self._came(folder, state)
        ]
        if time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + _COUNT_EVERY_S
            if watches_left() == 0:
                for folder, state in self._states.items():
                    if state.watch and not state.polled:
                        self._poll(folder, state, errno.ENOSPC)
        return came

    def online(self, folder: Folder) -> bool:
        """Whether the folder was there when last looked at."""
        return self._states[folder].inode is not None

    def polled(self, folder: Folder) -> bool:
        """Whether nothing announces what arrives in the folder."""
        return self._states[folder].polled

    def _came(self, folder: Folder, state: _Watched) -> bool:
        inode = self._inode(folder, state)
        if inode == state.inode and not self._watch_ended(state):
            return False
        if state.watch:
            with suppress(KeyError, OSError):  # its watch may have ended with the folder
                self._observer.unschedule(state.watch)
            state.watch = None
        state.inode = inode
        if inode is None:
            logger.warning("folder %s is offline", folder.path)
            state.said_offline = True
            return False
        if state.said_offline:
            logger.info("folder %s is back", folder.path)
            state.said_offline = False
        if not state.polled:
            self._watch(folder, state)
        return True

    def _watch_ended(self, state: _Watched) -> bool:
        """Whether a folder made anew under its old inode number has lost its watch."""
        return state.watch is not None and not any(
            emitter.watch == state.watch and emitter.is_alive()
            for emitter in self._observer.emitters
        )

    def _inode(self, folder: Folder, state: _Watched) -> int | None:
        try:
            inode = os.stat(folder.path).st_ino
        except OSError:
            return None
        return inode if mount_of(folder.path) == state.mount else None

    def _watch(self, folder: Folder, state: _Watched) -> None:
        try:
            # watchdog passes over sub-folders that it cannot watch, without a word.
            left = watches_left()
            if left is not None and watches_needed(folder) > left:
                raise OSError(errno.ENOSPC, "inotify watch limit reached")
            state.watch = self._observer.schedule(
                self._handler,
                str(folder.path),
                recursive=folder.recursive,
                event_filter=_EVENTS,
            )
        except OSError as error:
            self._poll(folder, state, error.errno or 0)

    def _poll(self, folder: Folder, state: _Watched, reason: int) -> None:
        state.polled = True
        logger.warning(
            "folder %s cannot be watched: %s; scanning it every %g s",
            folder.path, _REMEDIES.get(reason, os.strerror(reason)), folder.poll_seconds,
        )  # fmt: skip


def _observer() -> BaseObserver:
    if sys.platform == "linux":
        from watchdog.observers.inotify import InotifyObserver

        # Full events tell a file moved in from outside (complete) from a new one.
        return InotifyObserver(generate_full_events=True)
    return Observer()


class _Handler(FileSystemEventHandler):
    def __init__(self, send: Callable[[Hint], None]) -> None:
        self._send = send

    def dispatch(self, event: FileSystemEvent) -> None:
        moved = isinstance(event, FileMovedEvent | DirMovedEvent)
        path = os.fsdecode(event.dest_path if moved else event.src_path)
        if not path:
            return  # moved out of the tree
        if event.is_directory:
            self._send(FolderHint(path))
        else:
            self._send(FileHint(path, moved or isinstance(event, FileClosedEvent)))


class _OverflowListener(logging.Handler):
    """watchdog reports a queue overflow only in its log; turn that into a hint."""

    def __init__(self, send: Callable[[Hint], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage():
            self._send(HintsLost())
