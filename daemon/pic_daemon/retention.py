"""How long rows are kept: those of no match go once they are old and their file is gone.

A row whose file is still there stays however old it is, as it is what keeps the next
scan from classifying the file again. A file counts as gone where nothing lies under its
name, or what lies there has a row of its own, and its folder is there still. Rows outside
the present watch folders stay: whether their files are gone cannot be told.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pic_daemon.folders import FileStamp
from pic_daemon.match_log import MatchLog, OldRow

logger = logging.getLogger("pic_daemon")

_BATCH = 100  # rows looked at between two looks into the service's inbox
_PASS_EVERY_S = 3600.0
_DOUBTFUL_S = 86_400.0  # since the service last lived: or the clock has jumped
_LOOK_S = 0.05  # between two questions whether a batch of files was looked at
_PATIENCE_S = 10.0  # for a single file; after it the thread hangs, and another begins


@dataclass
class _Look:
    """The files of some rows, looked at in a thread, which a mount that hangs may keep for
    ever. `come_to` counts the rows begun; `seen` gets those whose file is not as it was,
    with how it looks now, None: there is none."""

    rows: list[OldRow]
    online: Callable[[str], bool]
    there: Callable[[str], bool]
    come_to: int = 0
    seen: list[tuple[OldRow, FileStamp | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether all were looked at."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        for row in self.rows:
            self.come_to += 1
            # May stand for bytes that are no UTF-8: cannot be looked up.
            if "\\x" in row.path or not self.online(row.path):
                continue
            stamp = None
            try:
                stamp = FileStamp.of(os.lstat(row.path))
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError:  # no leave to look, or the disk is in trouble
                continue
            # `there` afterwards, as the folder may just have gone.
            if stamp != row.stamp and self.there(row.path):
                self.seen.append((row, stamp))


@dataclass
class Retention:
    """Goes through old rows, a batch at a time; `keep_days` None keeps all.

    Times `now` are monotonic, in seconds.
    """

    keep_days: float | None
    next_due: float = 0.0
    _after: tuple[str, int] = ("", 0)
    _deleted: int = field(default=0, init=False)
    _look: _Look | None = field(default=None, init=False)
    _come_to: int = field(default=0, init=False)  # by that look, when it last went on
    _went_on: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.keep_days is None:
            self.next_due = float("inf")

    def begin(self, silent: float | None, now: float) -> None:
        """Take note for how long nobody served the log, by the clock, in seconds.

        Where it was long the clock may be ahead, as before it is set from the network; it
        is given an hour, as what is deleted is gone.
        """
        if silent is not None and abs(silent) > _DOUBTFUL_S:
            self.next_due = max(self.next_due, now + _PASS_EVERY_S)

    def step(
        self,
        log: MatchLog,
        online: Callable[[str], bool],
        there: Callable[[str], bool],
        now: float,
    ) -> None:
        """Have the next old rows' files looked at, or delete the rows of those found gone.

        `online` says whether the folder that a path belongs to answered when it was last
        looked at, `there` whether it is there at this moment; the thread asks both.

        Raises sqlite3.OperationalError where the database takes nothing; the next step
        does it again.
        """
        assert self.keep_days is not None
        if not self._look or self._hangs(self._look, now):
            before = max(0.0, time.time() - self.keep_days * 86400)
            rows = log.no_matches_before(before, self._after, _BATCH)
            self._look = _Look(rows, online, there)
            self._come_to, self._went_on = 0, now
        self.next_due = now + _LOOK_S
        if not self._look.over:
            return
        seen, rows = self._look.seen, self._look.rows
        gone = [row for row, stamp in seen if not stamp or log.row_of(row.path, stamp)]
        self._deleted += log.delete(gone)
        self._look = None
        if len(rows) == _BATCH:
            self._after = rows[-1].classified_at, rows[-1].id
            return
        if self._deleted:
            logger.info("deleted %d old rows of no match, files gone", self._deleted)
        self._after, self._deleted = ("", 0), 0
        self.next_due = now + _PASS_EVERY_S

    def _hangs(self, look: _Look, now: float) -> bool:
        """Whether a look has been at one file for too long."""
        if look.come_to != self._come_to:
            self._come_to, self._went_on = look.come_to, now
        return not look.over and now - self._went_on > _PATIENCE_S
