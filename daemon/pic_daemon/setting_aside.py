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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pic_daemon.folders import FileStamp, stamp_of
from pic_daemon.match_log import Outcome

logger = logging.getLogger("pic_daemon")

_PART = ".pic-daemon.part"
_QUIET_S = 60.0  # since it was last written to: an upload that pauses is not to be moved
_LOOK_S = 1.0  # between two looks at how long that is
_END_S = 5.0  # the longest that the end of the service waits for what is to be moved


@dataclass(frozen=True)
class SetAside:
    """A file was moved to `target`; None: it had changed or was gone, or `problem`."""

    outcome: Outcome
    target: Path | None
    problem: str = ""


class Mover:
    """Moves files into `folder`; `send` gets a SetAside of each, from its thread.

    A file that was written to in the last minute waits: whoever writes may not be done.
    """

    def __init__(self, folder: Path, send: Callable[[SetAside], None]) -> None:
        self._folder = folder
        self._send = send
        self._asked: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._waiting: deque[Outcome] = deque()  # until nobody has written for a while
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="set aside", daemon=True)
        self._thread.start()

    def move(self, outcome: Outcome) -> None:
        """Ask for a file to be moved; returns at once."""
        self._asked.put(outcome)

    def end(self) -> None:
        """Wait a little for what is asked for, and tell of what is not moved then."""
        self._asked.put(None)
        self._thread.join(_END_S)
        if self._thread.is_alive() or self._waiting:
            self._ended = True  # no more are begun, as nobody would note them
            logger.warning(
                "failed files could not be moved to %s before the end; they stay where "
                "they are", self._folder,
            )  # fmt: skip

    def _run(self) -> None:
        while not self._ended:
            with suppress(queue.Empty):
                outcome = self._asked.get(timeout=_LOOK_S if self._waiting else None)
                if outcome is None:
                    return
                self._waiting.append(outcome)
            for _ in range(len(self._waiting)):
                outcome = self._waiting.popleft()
                if abs(time.time() - outcome.stamp.mtime_ns / 1e9) < _QUIET_S:
                    self._waiting.append(outcome)
                elif not self._ended:
                    self._move(outcome)

    def _move(self, outcome: Outcome) -> None:
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
    target = folder / name.name
    number = 1
    while os.path.lexists(target):
        target = folder / f"{name.stem}-{number}{name.suffix}"
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
