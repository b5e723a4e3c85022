"""Files that are served from, while the service runs: noticed when they change, tried,
handed over."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pic_daemon.errors import InputError
from pic_daemon.folders import stamp_of

logger = logging.getLogger("pic_daemon")

T = TypeVar("T")


class ServedFiles(Generic[T]):
    """Loads one thing from its files, in a thread of its own.

    `send` gets from there what `load` made beside what serves, or None where it raised
    InputError. For every `load` that begins, the owner calls `loaded` once that has come.
    `name` is what the log calls it.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        load: Callable[[], T],
        send: Callable[[T | None], None],
    ) -> None:
        self._name = name
        self._paths = paths
        self._make = load
        self._send = send
        self._stamps = [stamp_of(str(path.resolve())) for path in paths]
        self._loading = False
        self._again = False

    def look(self) -> None:
        """Load the files where one changed since they were last looked at."""
        if self._loading:
            return
        stamps = [stamp_of(str(path.resolve())) for path in self._paths]
        if all(stamps) and stamps != self._stamps:
            self._stamps = stamps
            self.load()

    def load(self) -> None:
        """Load the files; where that is under way already, once more after it."""
        self._again = self._loading
        if not self._loading:
            self._loading = True
            threading.Thread(target=self._load, name=self._name, daemon=True).start()

    def loaded(self) -> None:
        """Note that a load has ended."""
        self._loading = False
        if self._again:
            self.load()

    def _load(self) -> None:
        made = None
        try:
            made = self._make()
        except InputError as error:
            message = "%s The %s in use goes on serving."
            logger.warning(message, error.message, self._name)
        finally:
            self._send(made)
