"""Carry out the deliveries beside the service, which never waits for any of it.

Each hook has a thread and a database connection of its own. The service queues what is
to be told in the transaction that records it; see `deliveries`.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pic_daemon.config import Config
from pic_daemon.deliveries import (
    Attempt,
    Delivery,
    Hook,
    counts,
    doubled,
    due,
    least_tried,
    note,
)
from pic_daemon.health import Health
from pic_daemon.hooks import NotDelivered, post, run_command

logger = logging.getLogger("pic_daemon")

_LOOK_S = 1.0  # between two looks for new deliveries
_GROUP = 32  # deliveries noted in one transaction at most,
_GROUP_S = 1.0  # or as many as were made in this time
_DOWN_AFTER = 5  # failures in a row: the hook is down, not one delivery at fault
_LONGEST_PAUSE_S = 60.0  # between two attempts at a hook that is down
_DATABASE_RETRY_S = 2.0


@dataclass
class Dispatcher:
    """Tells one hook what is queued for it; `run` returns once `stop` is set.

    `deliver` takes a message or raises NotDelivered. What fails for longer than
    `give_up_after` seconds is kept, and not tried again unless asked.
    """

    database: Path
    hook: Hook
    deliver: Callable[[str], None]
    give_up_after: float
    health: Health
    stop: threading.Event
    _failures: int = field(default=0, init=False)  # in a row
    _since: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> None:
        """Deliver until stopped; trouble with the database is waited out."""
        while not self.stop.is_set():
            try:
                with closing(self._connect()) as db:
                    self._serve(db)
            except sqlite3.Error as error:
                logger.warning("%s: database: %s; trying again", self.hook, error)
            except Exception:  # a thread that ended would leave the queue to itself
                logger.exception("%s: trying again", self.hook)
            self.stop.wait(_DATABASE_RETRY_S)

    def _tried_for(self) -> float:
        return time.monotonic() - self._since

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.database, timeout=5.0, isolation_level=None)
        # What this connection writes may be lost with the power: then it is delivered
        # again. So the service never waits for it to reach the disk.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        return db

    def _serve(self, db: sqlite3.Connection) -> None:
        while not self.stop.is_set():
            pending, given_up = counts(db, self.hook)
            self.health.delivering(self.hook, pending, given_up)
            if self._failures < _DOWN_AFTER:
                group = due(db, self.hook, time.time(), _GROUP)
            else:
                group = least_tried(db, self.hook, time.time())
            made = self._make(group)
            self._note(db, made)
            if self._failures >= _DOWN_AFTER:
                self.stop.wait(doubled(self._failures - _DOWN_AFTER, _LONGEST_PAUSE_S))
            elif not made:
                self.stop.wait(_LOOK_S)

    def _make(self, group: Sequence[Delivery]) -> list[Attempt]:
        """Try deliveries until it is time to note what became of them."""
        made: list[Attempt] = []
        until = time.monotonic() + _GROUP_S
        for delivery in group:
            if self.stop.is_set() or (made and time.monotonic() >= until):
                break
            attempt = self._attempt(delivery)
            made.append(attempt)
            self.health.delivered(self.hook, not attempt.error)
            was_down = self._failures >= _DOWN_AFTER
            self._failures = self._failures + 1 if attempt.error else 0
            if was_down and not attempt.error:
                logger.info("%s: works again", self.hook)
            if self._failures >= _DOWN_AFTER:
                if not was_down:
                    logger.warning("%s: down; nothing is lost, tried on", self.hook)
                break
        return made

    def _attempt(self, delivery: Delivery) -> Attempt:
        try:
            self.deliver(delivery.message)
        except NotDelivered as error:
            problem = str(error)
        except Exception as error:  # unforeseen: this delivery's trouble alone
            logger.exception("%s: delivery %d", self.hook, delivery.id)
            problem = f"{type(error).__name__}: {error}"
        else:
            return Attempt(delivery)
        if self._failures < _DOWN_AFTER:  # then it was said
            logger.warning(
                "%s: delivery %d failed: %s; it is tried again",
                self.hook, delivery.id, problem,
            )  # fmt: skip
        return Attempt(delivery, problem or "failed without a word")

    def _note(self, db: sqlite3.Connection, made: Sequence[Attempt]) -> None:
        """Write what became of deliveries, however long the database takes nothing.

        Were they read again instead, each would be made again every few seconds.
        """
        said = False
        while made:
            try:
                lost = note(db, made, time.time(), self.give_up_after, self._tried_for())
            except sqlite3.OperationalError as error:
                if self.stop.is_set():
                    return  # they are made again at the next start
                if not said:
                    logger.warning(
                        "%s: database: %s; waiting until it can be written",
                        self.hook,
                        error,
                    )
                said = True
                self.stop.wait(_DATABASE_RETRY_S)
                continue
            for attempt in lost:
                logger.error(
                    "%s: delivery %d given up after %d attempts: %s",
                    self.hook, attempt.delivery.id, attempt.delivery.attempts + 1,
                    attempt.error,
                )  # fmt: skip
            return


@contextmanager
def dispatching(config: Config, health: Health) -> Iterator[None]:
    """Have threads tell the hooks in `config`; leaving waits for what is under way."""
    stop = threading.Event()
    deliver: dict[Hook, Callable[[str], None]] = {}
    if config.webhook:
        deliver["webhook"] = partial(
            post, config.webhook, config.webhook_header_file, config.hook_seconds
        )
    if config.command:
        deliver["command"] = partial(run_command, config.command, config.hook_seconds)
    with ExitStack() as leaving:
        for hook, tell in deliver.items():
            dispatcher = Dispatcher(
                config.database, hook, tell, config.hook_hours * 3600, health, stop
            )
            # As a daemon thread it cannot keep a stopped service from ending.
            thread = threading.Thread(target=dispatcher.run, name=hook, daemon=True)
            thread.start()
            leaving.callback(thread.join, config.hook_seconds + 1)
        leaving.callback(stop.set)
        yield
