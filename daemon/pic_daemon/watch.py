"""Hints from the file system, through watchdog.

Events only shorten latency: the kernel drops them when a burst overflows its
queue, and a folder filled before its watch existed announces nothing. Comparing
the disk with the match log is what finds every file; see `service`.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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

from pic_daemon.errors import InputError
from pic_daemon.folders import Folder


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

_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent, FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent,
]  # fmt: skip


@contextmanager
def watching(folders: Sequence[Folder], send: Callable[[Hint], None]) -> Iterator[None]:
    """Call `send` from another thread for every hint until the context ends.

    Raises InputError where a folder cannot be watched.
    """
    observer = _observer()
    handler = _Handler(send)
    overflow = _OverflowListener(send)
    loggers = [logging.getLogger("watchdog.observers.inotify_c")]
    for logger in loggers:
        logger.addHandler(overflow)
    try:
        observer.start()
        for folder in folders:
            try:
                observer.schedule(
                    handler,
                    str(folder.path),
                    recursive=folder.recursive,
                    event_filter=_EVENTS,
                )
            except OSError as error:
                raise InputError(
                    f"{folder.path} cannot be watched: {error.strerror or error}."
                ) from error
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(overflow)
        observer.stop()
        observer.join()


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
