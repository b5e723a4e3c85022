"""Deliveries carried out one by one, on a real log; `Pauses` stands for the clock."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from pic_daemon import deliveries
from pic_daemon.dispatch import Dispatcher
from pic_daemon.folders import FileStamp
from pic_daemon.health import Health
from pic_daemon.hooks import NotDelivered
from pic_daemon.match_log import MatchLog, Outcome


class Pauses(threading.Event):
    """Waits for nothing, and tells `on_pause` which pause this is; it stops at the last."""

    def __init__(self, last: int, on_pause: Callable[[int], None]) -> None:
        super().__init__()
        self.last = last
        self.on_pause = on_pause
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        self.on_pause(len(self.seconds))
        if len(self.seconds) >= self.last:
            self.set()
        return self.is_set()


class Impatient(Dispatcher):
    """Finds a locked database locked at once."""

    def _connect(self) -> sqlite3.Connection:
        db = super()._connect()
        db.execute("PRAGMA busy_timeout = 0")
        return db


@pytest.fixture
def queued(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A log in which so many matches wait for the webhook."""
    log = MatchLog.open(tmp_path / "log.db")

    def queue(count: int) -> Path:
        stamp = FileStamp(1000, 5, 7)
        outcomes = [
            Outcome(f"/drop/{number}.png", "a" * 64, stamp, "match", 99.0, 100.0)
            for number in range(count)
        ]
        deliveries.queue(log._db.conn, ["webhook"], outcomes, "m" * 64)
        log._db.conn.commit()
        return log.path

    yield queue
    log.close()


def waiting(database: Path) -> int:
    with closing(sqlite3.connect(database)) as db:
        return sum(deliveries.counts(db, "webhook"))


def test_a_hook_that_is_down_is_tried_once_after_each_pause_until_it_takes_one(
    queued: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pic_daemon")
    asked: list[str] = []
    asked_before_pause: list[int] = []

    def tell(message: str) -> None:
        asked.append(message)
        if len(asked) <= 12:
            raise NotDelivered("it answered 503")

    stop = Pauses(9, lambda _: asked_before_pause.append(len(asked)))
    database = queued(30)
    Dispatcher(database, "webhook", tell, 1e9, Health(60), stop).run()
    assert stop.seconds[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert asked_before_pause[:8] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert asked_before_pause[8] >= 30
    assert waiting(database) <= 12
    told = [text for text in caplog.messages if "delivery" not in text]
    assert told == ["webhook: down; nothing is lost, tried on", "webhook: works again"]


def test_what_was_told_is_not_told_again_however_long_the_log_is_locked(
    queued: Callable[[int], Path],
) -> None:
    told: list[str] = []
    database = queued(1)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:

        def tell(message: str) -> None:
            told.append(message)
            other.execute("BEGIN IMMEDIATE")

        def release(pause: int) -> None:
            if pause == 3 and other.in_transaction:
                other.execute("ROLLBACK")

        stop = Pauses(5, release)
        Impatient(database, "webhook", tell, 1e9, Health(60), stop).run()
    assert len(told) == 1
    assert waiting(database) == 0


def test_what_is_refused_each_time_does_not_keep_the_new_from_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty deliveries that the receiver never takes, due again every ten minutes."""
    now = 1e9
    clock = SimpleNamespace(time=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr("pic_daemon.dispatch.time", clock)
    MatchLog.open(tmp_path / "log.db").close()
    late: list[float] = []

    def queue(kind: str) -> None:
        with closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as db:
            db.execute(
                "INSERT INTO deliveries (hook, message, queued_at, due_at) "
                "VALUES ('webhook', ?, ?, ?)",
                [json.dumps({"kind": kind, "at": now}), now, now],
            )

    def tell(message: str) -> None:
        if json.loads(message)["kind"] == "refused":
            raise NotDelivered("it answered 404")
        late.append(now - json.loads(message)["at"])

    def pass_time(seconds: float) -> None:
        nonlocal now
        if now // 600 != (now + seconds) // 600:
            queue("new")
        now += seconds

    for _ in range(30):
        queue("refused")
    stop = Pauses(400, lambda _: pass_time(stop.seconds[-1] or 0))
    Dispatcher(tmp_path / "log.db", "webhook", tell, 1e9, Health(60), stop).run()
    assert len(late) > 10
    assert max(late) <= 2 * 60
