"""Writing to the match log while the service runs: what the database does not take now is
waited for, and what is on the disk is told.
"""

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pic_daemon.config import Config
from pic_daemon.folders import text_of
from pic_daemon.health import Health
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.model import Model
from pic_daemon.setting_aside import SetAside

logger = logging.getLogger("pic_daemon")

_HEED_STOP_S = 0.1
_DATABASE_RETRY_S = 2.0  # between two attempts while the database takes nothing

T = TypeVar("T")


@dataclass
class Recorder:
    """Belongs to the service's loop; `stop_asked` may be set from any thread.

    It is no Event: a signal handler that sets one waits for ever for a lock which the
    thread that it interrupts may hold.
    """

    log: MatchLog
    config: Config
    health: Health
    stop_asked: bool = False

    def record(self, outcomes: list[Outcome], model: Model) -> None:
        """Write rows in one transaction; then count and log them."""
        with self.health.timed("commit"):
            self.write(lambda: self.log.record(outcomes, model, self.config.hooks))
        self.health.recorded(outcomes)
        for outcome in outcomes:
            _report(outcome)

    def write(self, write: Callable[[], T]) -> T:
        """What `write` returns, once the database takes it.

        A locked database or a full disk passes: nothing is read meanwhile, so that
        nothing is lost, and what waits in the folders is found later. Raises
        sqlite3.OperationalError where the service is asked to stop meanwhile, and where
        waiting would not help.
        """
        waiting_since = None
        while True:
            try:
                result = write()
            except sqlite3.OperationalError as error:
                # A statement that cannot be run, as of a table that is gone, never will be.
                if self.stop_asked or _never_passes(error):
                    raise
                if waiting_since is None:
                    waiting_since = time.monotonic()
                    logger.warning(
                        "database %s: %s; waiting until it can be written",
                        self.log.path, error,
                    )  # fmt: skip
                self.health.database_waits(time.monotonic() - waiting_since)
                self.health.feed_watchdog(busy=False)  # a restart would not help
                again = time.monotonic() + _DATABASE_RETRY_S
                while time.monotonic() < again and not self.stop_asked:
                    time.sleep(_HEED_STOP_S)
                continue
            if waiting_since is not None:
                self.health.database_waits(0)
                waited = time.monotonic() - waiting_since
                logger.info("database %s: goes on after %.0f s", self.log.path, waited)
            return result

    def set_aside(self, moved: SetAside) -> None:
        """Note that a failed file was moved, or tell why not."""
        path, target = text_of(moved.outcome.path), moved.target
        if moved.problem:
            folder = self.config.failed_folder
            problem = "path=%r cannot be moved to %s: %s"
            logger.warning(problem, path, folder, moved.problem)
        elif target:
            name, sha256, to = moved.outcome.path, moved.outcome.sha256, str(target)
            logger.info("moved path=%r to %r", path, text_of(to))
            self.write(lambda: self.log.mark_moved(name, sha256, to))


def _never_passes(error: sqlite3.OperationalError) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # some have none
    return bool(code == sqlite3.SQLITE_ERROR)


def _report(outcome: Outcome) -> None:
    path = text_of(outcome.path)
    if outcome.status == "failed":
        logger.warning("failed path=%r reason=%r", path, outcome.error)
    else:
        level = logging.INFO if outcome.status == "match" else logging.DEBUG
        item = outcome.catalog_item
        named = f" item={item!r} joint={outcome.joint_score:.3f}" if item else ""
        message = "%s path=%r score=%.6f%s"
        logger.log(level, message, outcome.status, path, outcome.score, named)
