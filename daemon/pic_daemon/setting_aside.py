"""Files that failed are moved by a thread of its own: a move on a hung mount never ends,
and a copy to another file system takes its time."""

import errno
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pic_daemon.folders import FileStamp, stamp_of
from pic_daemon.match_log import Outcome

logger = logging.getLogger("pic_daemon")

_PART = ".pic-daemon.part"
_QUIET_S = 60.0  # since a file was written to: an upload that pauses is not to be moved
_LONGEST_NAME = 255  # bytes, on the common file systems
_END_S = 5.0  # the longest that the end of the service waits for what is to be moved


@dataclass(frozen=True)
class SetAside:
    """A file was moved to `target`; None: it had changed or was gone, or `problem`."""

    outcome: Outcome
    target: Path | None
    problem: str = ""


class Mover:
    """Moves files that failed into `folder`, once nobody has written to them for a minute.

    `send` gets a SetAside of each, most from the thread that moves.
    """

    def __init__(self, folder: Path, send: Callable[[SetAside], None]) -> None:
        self._folder = folder
        self._send = send
        self._waiting: dict[str, Outcome] = {}  # by path
        self._asked: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="set aside", daemon=True)
        self._thread.start()

    def heed(self, outcome: Outcome) -> None:
        """Take note of what became of a file; returns at once."""
        self._waiting.pop(outcome.path, None)
        if outcome.status != "failed":
            return
        if abs(time.time() - outcome.stamp.mtime_ns / 1e9) >= _QUIET_S:
            self._asked.put(outcome)
        else:
            self._waiting[outcome.path] = outcome

    def touch(self, path: str, stamp: FileStamp) -> None:
        """Take note that a file which is as it was has another stamp now."""
        if outcome := self._waiting.get(path):
            self.heed(replace(outcome, stamp=stamp))

    def look(self) -> None:
        """Have those moved that nobody has written to since."""
        for outcome in list(self._waiting.values()):
            self.heed(outcome)

    def end(self) -> None:
        """Wait a little for what is to be moved, and tell of what is not moved then."""
        self._asked.put(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            self._ended = True  # no more are begun, as nobody would note them
            logger.warning(
                "failed files could not be moved to %s before the end; they stay where "
                "they are until the next start", self._folder,
            )  # fmt: skip
        for outcome in self._waiting.values():
            problem = (
                f"the service ended less than {_QUIET_S:g} s after it was written to; "
                "the next start moves it"
            )
            self._send(SetAside(outcome, None, problem))

    def _run(self) -> None:
        while (outcome := self._asked.get()) and not self._ended:
            try:
                target = set_aside(outcome.path, outcome.stamp, self._folder)
                self._send(SetAside(outcome, target))
            except OSError as error:
                self._send(SetAside(outcome, None, error.strerror or str(error)))


def set_aside(path: str, stamp: FileStamp, folder: Path) -> Path | None:
    """Move a file that still has this stamp into `folder`, under a name not taken there.

    Returns where it is now, or None where the file has changed or is gone. Raises
    OSError where it cannot be moved.
    """
    if stamp_of(path) != stamp:
        return None
    name = Path(path)
    target, stem = folder / name.name, name.stem
    number = 1
    while os.path.lexists(target):
        ending = f"-{number}{name.suffix}"
        while stem and len(os.fsencode(stem + ending)) > _LONGEST_NAME:
            stem = stem[:-1]
        target = folder / (stem + ending)
        number += 1
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return _copied(path, stamp, target)
    return target


def _copied(path: str, stamp: FileStamp, target: Path) -> Path | None:
    """The same to another file system; at no moment is the file nowhere."""
    handle, name = tempfile.mkstemp(_PART, ".", target.parent)
    part = Path(name)
    try:
        shutil.copy2(path, part)
        os.fsync(handle)
        if stamp_of(path) != stamp:  # written on meanwhile
            return None
        part.rename(target)
    finally:
        os.close(handle)
        part.unlink(missing_ok=True)
    try:
        os.unlink(path)
    except OSError:
        target.unlink(missing_ok=True)  # else each attempt would leave another
        raise
    return target
