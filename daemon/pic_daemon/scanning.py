"""Each folder is looked at from a thread of its own, as a look at a hung mount never ends.

The thread keeps the folder's watch, scans it, and looks again at single files. What it
finds goes into the service's inbox, a bounded number of files at a time however many there
are. While it does not come back from the disk its folder counts as offline, and the other
folders go on.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pic_daemon.folders import FileStamp, Folder, stamp_of, text_of
from pic_daemon.systemd import STILL_STARTING, notify
from pic_daemon.watch import FileHint, FolderWatch, HintsLost, hearing_overflows

logger = logging.getLogger("pic_daemon")

_CHUNK = 1000  # files in a message; per folder one is read while the next is gathered
_LOOK_S = 5.0  # between two looks at the folder itself
_SILENT_S = 20.0  # a single look at the disk that takes longer is a hung one
_BEAT_S = 1.0  # between two words to systemd while the first look goes on
_END_S = 2.0  # the longest that the end of the service waits for a thread


@dataclass(frozen=True)
class Found:
    """Files that a scan met; no more come from `scanner` before its `go_on`."""

    scanner: "Scanner"
    files: deque[tuple[str, FileStamp]]


@dataclass(frozen=True)
class SeenAgain:
    """Path, expected stamp and present stamp, None where there is no file any more."""

    files: list[tuple[str, FileStamp | None, FileStamp | None]]


Sight = Found | SeenAgain | FileHint | HintsLost | Exception


class Scanner:
    """One folder and its thread; `send` gets what is seen, or the error that ended it.

    All methods return at once and may be called while the thread hangs.
    """

    def __init__(
        self, folder: Folder, send: Callable[[Sight], None], mount_point: str = ""
    ) -> None:
        self.folder = folder
        self.within = os.path.join(folder.path, "")  # how all paths in it begin
        self.silent = False
        self.looked = threading.Event()  # set after the first look
        self._send = send
        self._watch = FolderWatch(
            folder, send, self._scan_below, mount_point, self._answered
        )
        self._refused: set[str] = set()  # sub-folders that could not be read
        self._asked: deque[str] = deque()  # folders to scan
        self._waiting: set[str] = set()  # the same
        self._to_see: deque[tuple[str, FileStamp | None]] = deque()
        self._scanning = False  # all of it
        self._unread = False  # a chunk that the service has not dealt with
        self._ended = False
        self._wake = threading.Event()
        self._asking_since = math.inf  # when it last turned to the disk
        self._next_look = 0.0
        self._next_poll = time.monotonic() + folder.poll_seconds
        self._thread = threading.Thread(
            target=self._run, name=f"scan {folder.path}", daemon=True
        )

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def end(self) -> None:
        """Stop watching; a thread that hangs is left behind."""
        self._ended = True
        self._wake.set()
        self._thread.join(0 if self.silent else _END_S)

    def scan(self, again: bool = True) -> None:
        """Ask for all files; `again`: once more after a scan that is under way."""
        whole = str(self.folder.path)
        if whole not in self._waiting and (again or not self._scanning):
            self._ask(whole)

    def see_again(self, path: str, expected: FileStamp | None) -> None:
        """Ask for a SeenAgain of one file."""
        self._to_see.append((path, expected))
        self._wake.set()

    def go_on(self) -> None:
        """Say that the last Found has been dealt with."""
        self._unread = False
        self._wake.set()

    def judge(self) -> bool:
        """Decide whether the disk answers; for the service's thread alone.

        Returns whether it just ceased to.
        """
        silent = time.monotonic() - self._asking_since > _SILENT_S
        ceased = silent and not self.silent
        if ceased:
            logger.warning("folder %s does not answer; it is offline", self.folder.path)
        if self.silent and not silent:
            logger.info("folder %s answers again", self.folder.path)
            self.scan()
        self.silent = silent
        return ceased

    @property
    def online(self) -> bool:
        """Whether the folder was there when last looked at, and answers."""
        return self._watch.online and not self.silent

    @property
    def mount_point(self) -> str:
        """The innermost mount point on which the folder has been seen."""
        return self._watch.mount_point

    @property
    def busy(self) -> bool:
        """Whether a scan is asked for or under way: files of it may still be sent."""
        return bool(self._asked) or self._scanning

    # In the thread

    def _run(self) -> None:
        try:
            while not self._ended:
                self._attend()
                if self._asked:
                    self._scan()
                else:
                    self._wait()
            self._watch.end()
        except Exception as error:  # a folder that nobody scans must not go unnoticed
            self._send(error)

    def _wait(self) -> None:
        """Sleep until something is asked or due."""
        due = min(self._next_look, self._next_poll if self._watch.polled else math.inf)
        self._asking_since = math.inf
        self._wake.wait(max(0.0, due - time.monotonic()))
        self._wake.clear()

    def _answered(self) -> None:
        """The disk does: what goes on is a long look, not a hung one."""
        self._asking_since = time.monotonic()

    def _attend(self) -> None:
        """What must not wait for the end of a scan."""
        now = self._asking_since = time.monotonic()
        if now >= self._next_look:
            if self._watch.look() and self.looked.is_set():
                self.scan()
            self.looked.set()
            self._next_look = time.monotonic() + _LOOK_S
        if self._watch.polled and now >= self._next_poll:
            self._next_poll = now + self.folder.poll_seconds
            self.scan(again=False)
        if self._to_see:
            self._see()

    def _see(self) -> None:
        seen = []
        while self._to_see:
            path, expected = self._to_see.popleft()
            self._answered()
            stamp = stamp_of(path) if self._watch.online else None
            seen.append((path, expected, stamp))
        self._send(SeenAgain(seen))

    def _scan(self) -> None:
        self._scanning = self._asked[0] == str(self.folder.path)
        below = self._asked.popleft()
        self._waiting.discard(below)
        files: deque[tuple[str, FileStamp]] = deque()
        for number, found in enumerate(self.folder.walk(below, self._refuse)):
            self._answered()
            if number % _CHUNK == 0:
                self._attend()
            if self._ended or not self._watch.online:
                break
            if found:
                files.append(found)
            if len(files) == _CHUNK:
                self._hand_over(files)
                files = deque()
        if files:
            self._hand_over(files)
        self._scanning = False
        self._send(Found(self, deque()))  # wakes a service that waits for the end

    def _refuse(self, folder: str, error: OSError) -> None:
        if self._watch.online and folder not in self._refused:
            self._refused.add(folder)
            logger.warning(
                "path=%r cannot be read, nor what is in it: %s",
                text_of(folder), error.strerror or error,
            )  # fmt: skip

    def _hand_over(self, files: deque[tuple[str, FileStamp]]) -> None:
        while self._unread and not self._ended:
            self._wait()
            self._attend()
        self._unread = True
        self._send(Found(self, files))

    def _scan_below(self, path: str) -> None:
        # A tree that was moved in is announced folder by folder.
        above, name = path, path
        while name and above not in self._waiting:
            above, name = os.path.split(above)
        if not name:
            self._ask(path)

    def _ask(self, path: str) -> None:
        self._waiting.add(path)
        self._asked.append(path)
        self._wake.set()


@contextmanager
def scanning(
    folders: Sequence[Folder],
    send: Callable[[Sight], None],
    mount_points: Mapping[str, str] | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Iterator[list[Scanner]]:
    """Scanners that have looked at their folders once, as far as these answer.

    `mount_points` says by folder where the file system that held it was mounted before.
    Once `stop_asked` nobody waits for the first looks.
    """
    before = mount_points or {}
    scanners = [
        Scanner(folder, send, before.get(text_of(str(folder.path)), ""))
        for folder in folders
    ]
    with hearing_overflows(send):
        for scanner in scanners:
            scanner.start()
        for scanner in scanners:
            while not (stop_asked() or scanner.silent or scanner.looked.wait(_BEAT_S)):
                scanner.judge()
                notify(STILL_STARTING)  # thousands of sub-folders take their time
        try:
            yield scanners
        finally:
            for scanner in scanners:
                scanner.end()
