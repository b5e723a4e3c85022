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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pic_daemon.folders import FileStamp
from pic_daemon.match_log import MatchLog, OldRow

logger = logging.getLogger("pic_daemon")

_BATCH = 100  # rows looked at between two looks into the service's inbox
_PASS_EVERY_S = 3600.0
_LOOK_S = 0.05  # between two questions whether a batch of files was looked at
_PATIENCE_S = 10.0  # for a single file; after it the thread hangs, and another begins

_Seen = tuple[OldRow, FileStamp | None]
"""A row, and how the file under its name looks now; None: there is none."""


@dataclass
class Retention:
    """Goes through old rows, a batch at a time; `keep_days` None keeps all.

    Files are looked at in a thread, which a mount that hangs may keep for ever. Times
    `now` are monotonic, in seconds.
    """

    keep_days: float | None
    next_due: float = 0.0
    _after: tuple[str, int] = ("", 0)
    _deleted: int = field(default=0, init=False)
    _rows: list[OldRow] = field(default_factory=list, init=False)
    _seen: list[_Seen] = field(default_factory=list, init=False)
    _looking: threading.Thread | None = field(default=None, init=False)
    _looked: list[OldRow] = field(default_factory=list, init=False)
    _counted: int = field(default=0, init=False)  # of these, when it last went on
    _went_on: float = field(default=0.0, init=False)

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
        """Have the next old rows' files looked at, or delete the rows of those found gone.

        `online` says whether the folder that a path belongs to answered when it was last
        looked at, `there` whether it is there at this moment; the thread asks both.

        Raises sqlite3.OperationalError where the database takes nothing; the next step
        does it again.
        """
        assert self.keep_days is not None
        if len(self._looked) != self._counted:
            self._counted, self._went_on = len(self._looked), now
        hangs = now - self._went_on > _PATIENCE_S
        if not self._looking or (hangs and self._looking.is_alive()):
            before = max(0.0, time.time() - self.keep_days * 86400)
            self._rows = log.no_matches_before(before, self._after, _BATCH)
            self._seen, self._looked, self._counted, self._went_on = [], [], 0, now
            look = [self._rows, online, there, self._seen, self._looked]
            self._looking = threading.Thread(target=_look, args=look, daemon=True)
            self._looking.start()
        self.next_due = now + _LOOK_S
        if self._looking.is_alive():
            return
        gone = [
            row for row, stamp in self._seen if stamp is None or log.knows(row.path, stamp)
        ]
        self._deleted += log.delete(gone)
        self._looking = None
        if len(self._rows) == _BATCH:
            self._after = self._rows[-1].classified_at, self._rows[-1].id
            return
        if self._deleted:
            logger.info("deleted %d old rows of no match, files gone", self._deleted)
        self._after, self._deleted = ("", 0), 0
        self.next_due = now + _PASS_EVERY_S


def _look(
    rows: Sequence[OldRow],
    online: Callable[[str], bool],
    there: Callable[[str], bool],
    seen: list[_Seen],
    looked: list[OldRow],
) -> None:
    for row in rows:
        looked.append(row)
        # May stand for bytes that are no UTF-8: cannot be looked up.
        if "\\x" in row.path or not online(row.path):
            continue
        stamp = None
        try:
            stamp = FileStamp.of(os.lstat(row.path))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # no leave to look, or the disk is in trouble
            continue
        if stamp == row.stamp:
            continue
        if there(row.path):  # asked afterwards, as the folder may just have gone
            seen.append((row, stamp))
