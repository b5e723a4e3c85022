"""What is served from files, while the service runs: noticed when they change, loaded
beside what serves, handed over."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp

logger = logging.getLogger("pic_daemon")

T = TypeVar("T")


_RETRY_S = 300.0  # between two loads of files that did not change and do not load

State = tuple[FileStamp, int]
"""How a file looked at one moment: its stamp, and when its mode or name last changed."""


def state_of(path: Path) -> State | None:
    """The state of what a path leads to; None where nothing can be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileStamp.of(status), status.st_ctime_ns


@dataclass(frozen=True)
class Loaded:
    """A load has ended: the owner's thread is to call `hand_over`."""

    files: "ServedFiles[Any]"
    made: Any

    def hand_over(self) -> None:
        """Use what was made, unless it failed."""
        self.files.finish(self.made)


class ServedFiles(Generic[T]):
    """Loads one thing from its files: `load` runs in a thread of its own and may raise
    InputError. `send` gets a Loaded from there; `use` runs when that is handed over.
    `name` is what the log calls it; `before` how files looked before they were loaded
    for the first time, so that one replaced meanwhile is loaded again.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        load: Callable[[], T],
        use: Callable[[T], None],
        send: Callable[[Loaded], None],
        before: Mapping[Path, State | None],
    ) -> None:
        self._name = name
        self._paths = paths
        self._make = load
        self._use = use
        self._send = send
        self._states = [before.get(path) or state_of(path) for path in paths]
        self._loading = False
        self._again = False
        self._problem = ""  # of the last load
        self._due = 0.0  # when it is tried again, by time.monotonic()

    def look(self) -> None:
        """Load the files where one changed since they were last looked at.

        Its mode counts: what could not be read is tried again once it may be. So is what
        did not load, now and then: memory, or descriptors of files, may have been short.
        """
        if self._loading:
            return
        states = [state_of(path) for path in self._paths]
        if all(states) and states != self._states:
            self._states = states
            self.load()
        elif self._problem and time.monotonic() >= self._due:
            self._begin()

    def load(self) -> None:
        """Load the files; where that is under way already, once more after it."""
        self._again = self._loading
        if not self._loading:
            self._problem = ""
            self._begin()

    def _begin(self) -> None:
        self._loading, self._due = True, time.monotonic() + _RETRY_S
        threading.Thread(target=self._load, name=self._name, daemon=True).start()

    def finish(self, made: T | None) -> None:
        """End a load; None: it failed."""
        self._loading = False
        if self._again:
            self.load()
        if made is not None:
            self._use(made)

    def _failed(self, problem: str) -> None:
        if problem != self._problem:
            logger.warning("%s The %s in use goes on serving.", problem, self._name)
        self._problem = problem

    def _load(self) -> None:
        made = None
        try:
            made = self._make()
            self._problem = ""
        except InputError as error:
            self._failed(error.message)
        except Exception as error:  # such as too little memory
            self._failed(f"{self._name}: {type(error).__name__}: {error}.")
        finally:
            self._send(Loaded(self, made))
