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
from dataclasses import dataclass
from pathlib import Path

from pic_daemon.folders import FileStamp, stamp_of
from pic_daemon.match_log import Outcome

logger = logging.getLogger("pic_daemon")

_PART = ".pic-daemon.part"
_QUIET_S = 60.0  # since a file was written to: an upload that pauses is not to be moved
_LONGEST_NAME = 255  # bytes, on the common file systems
_AT_ONCE = 100  # moves under way: each is a row to change before anything else is done
_MOST_WAITING = 10_000  # files that failed before; the next scan meets the others
_END_S = 5.0  # the longest that the end of the service waits for what is to be moved


@dataclass(frozen=True)
class SetAside:
    """A file was moved to `target`; None: it had changed or was gone, or `problem`."""

    outcome: Outcome
    target: Path | None
    problem: str = ""


class Mover:
    """Moves files that failed into `folder`, once nobody has written to them for a minute;
    without a folder it leaves them.

    `send` gets a SetAside of each from the thread that moves, and is to `note` it. One that
    cannot be moved is left until it fails again, or the next start.
    """

    def __init__(self, folder: Path | None, send: Callable[[SetAside], None]) -> None:
        self._folder = folder
        self._send = send
        self._waiting: dict[str, Outcome] = {}  # by path
        self._moving: set[str] = set()
        self._left: set[str] = set()  # could not be moved
        self._asked: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, args=[folder], name="set aside", daemon=True
        )
        if folder:
            self._thread.start()

    def heed(self, outcome: Outcome) -> None:
        """Take note of what became of a file; returns at once."""
        self._waiting.pop(outcome.path, None)
        self._left.discard(outcome.path)
        if outcome.status == "failed":
            self._move_once_quiet(outcome)

    def meet(self, outcome: Outcome) -> None:
        """Take note of a file that failed before and is where it was; returns at once."""
        if outcome.path in self._moving or outcome.path in self._left:
            return
        self._waiting.pop(outcome.path, None)  # its time may be another now
        if len(self._waiting) < _MOST_WAITING:
            self._move_once_quiet(outcome)

    def look(self) -> None:
        """Have those moved that nobody has written to since."""
        waiting, self._waiting = self._waiting, {}
        for outcome in waiting.values():
            self._move_once_quiet(outcome)

    def note(self, moved: SetAside) -> None:
        """Take note of what was sent."""
        self._moving.discard(moved.outcome.path)
        if moved.problem:
            self._left.add(moved.outcome.path)

    def end(self) -> None:
        """Wait a little for what is being moved."""
        if not self._folder:
            return
        self._asked.put(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            self._ended = True  # no more are begun, as nobody would note them
            logger.warning(
                "failed files could not be moved to %s before the end; they stay where "
                "they are until the next start", self._folder,
            )  # fmt: skip

    def _move_once_quiet(self, outcome: Outcome) -> None:
        if not self._folder:
            return
        quiet = abs(time.time() - outcome.stamp.mtime_ns / 1e9) >= _QUIET_S
        if quiet and len(self._moving) < _AT_ONCE:
            self._moving.add(outcome.path)
            self._asked.put(outcome)
        else:
            self._waiting[outcome.path] = outcome

    def _run(self, folder: Path) -> None:
        while (outcome := self._asked.get()) and not self._ended:
            try:
                target = set_aside(outcome.path, outcome.stamp, folder)
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
