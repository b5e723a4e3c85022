"""How long rows are kept: those of no match go once they are old and their file is gone.

A row whose file is still there stays however old it is, as it is what keeps the next
scan from classifying the file again. A file counts as gone where nothing lies under its
name, or what lies there has a row of its own, and its folder is there still. Rows outside
the present watch folders stay: whether their files are gone cannot be told.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pic_daemon.folders import FileStamp
from pic_daemon.match_log import MatchLog, OldRow

logger = logging.getLogger("pic_daemon")

_BATCH = 100  # rows looked at between two looks into the service's inbox
_PASS_EVERY_S = 3600.0


@dataclass
class Retention:
    """Goes through old rows, a batch at each `step`; `keep_days` None keeps all.

    Times `now` are monotonic, in seconds.
    """

    keep_days: float | None
    next_due: float = 0.0
    _after: tuple[str, int] = ("", 0)
    _deleted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.keep_days is None:
            self.next_due = float("inf")

    def step(
        self,
        log: MatchLog,
        online: Callable[[str], bool],
        there: Callable[[str], bool],
        now: float,
    ) -> None:
        """Look at the next batch of old rows and delete those whose files are gone.

        `online` says whether the folder that a path belongs to answered when it was last
        looked at, `there` whether it is there at this moment.

        Raises sqlite3.OperationalError where the database takes nothing; the next step
        does it again.
        """
        assert self.keep_days is not None
        before = max(0.0, time.time() - self.keep_days * 86400)
        rows = log.no_matches_before(before, self._after, _BATCH)
        gone = [
            row.id
            for row in rows
            if online(row.path) and _is_gone(row, log.knows) and there(row.path)
        ]
        if gone:
            log.delete(gone)
        self._deleted += len(gone)
        if len(rows) == _BATCH:
            self._after = rows[-1].classified_at, rows[-1].id
            return
        if self._deleted:
            logger.info("deleted %d old rows of no match, files gone", self._deleted)
        self._after, self._deleted = ("", 0), 0
        self.next_due = now + _PASS_EVERY_S


def _is_gone(row: OldRow, knows: Callable[[str, FileStamp], bool]) -> bool:
    """As it looks: `there` is asked afterwards, as the folder may just have gone."""
    if "\\x" in row.path:  # may stand for bytes that are no UTF-8: cannot be looked up
        return False
    try:
        stamp = FileStamp.of(os.lstat(row.path))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # no leave to look, or the disk is in trouble
        return False
    return stamp != row.stamp and knows(row.path, stamp)
