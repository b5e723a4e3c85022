"""What hooks have still to be told: an outbox in the match log.

A delivery is queued in the transaction that records its match, so that neither is there
without the other, and deleted once the hook has taken it: at least once, in any order.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pic_daemon.folders import text_of
from pic_daemon.schema import iso_time

if TYPE_CHECKING:
    from pic_daemon.match_log import Outcome

Hook = Literal["webhook", "command"]

_LONGEST_WAIT_S = 600.0  # between two attempts at one delivery
_DOUBTFUL_S = 3600.0
_DOUBLINGS = 20  # more than any wait, and far from what overflows


@dataclass(frozen=True)
class Delivery:
    """One message to one hook; `message` is JSON, `queued_at` a POSIX time in seconds."""

    id: int
    message: str
    queued_at: float
    attempts: int


@dataclass(frozen=True)
class Attempt:
    """What became of a delivery that was tried; `error` is '' where the hook took it."""

    delivery: Delivery
    error: str = ""


def queue(
    db: sqlite3.Connection, hooks: Iterable[Hook], outcomes: Sequence["Outcome"], model: str
) -> None:
    """Queue the matches among `outcomes` that are news; they must not be written yet.

    An image scored again that was a match with the same product before is none.
    """
    for hook in hooks:
        db.executemany(
            """
            INSERT INTO deliveries (hook, message, queued_at, due_at)
            SELECT :hook, :message, :at, :at WHERE NOT EXISTS (
                SELECT 1 FROM images WHERE path = :path AND sha256 = :sha256
                AND status = 'match' AND catalog_item IS :item
            )
            """,
            [
                {
                    "hook": hook, "message": _message(o, model), "at": o.classified_at,
                    "path": text_of(o.path), "sha256": o.sha256, "item": o.catalog_item,
                }
                for o in outcomes if o.status == "match"
            ],
        )  # fmt: skip


def _message(outcome: "Outcome", model: str) -> str:
    return json.dumps(
        {
            "path": text_of(outcome.path),
            "sha256": outcome.sha256,
            "score": outcome.score,
            "threshold": outcome.threshold,
            "model": model,
            "seen_at": iso_time(outcome.seen_at),
            "classified_at": iso_time(outcome.classified_at),
            "bytes": outcome.stamp.bytes,
            "width": outcome.width,
            "height": outcome.height,
            "format": outcome.format,
            "catalog_item": outcome.catalog_item,
            "similarity": outcome.similarity,
            "runner_up": outcome.runner_up,
            "runner_up_similarity": outcome.runner_up_similarity,
            "joint_score": outcome.joint_score,
            "joint_threshold": outcome.joint_threshold,
        }
    )


def due(db: sqlite3.Connection, hook: Hook, now: float, limit: int) -> list[Delivery]:
    """At most `limit` deliveries whose time has come, the longest due first.

    Each message has its `delivery` number, by which a receiver knows a repetition. A time
    further off than any wait was set by a clock that was ahead.
    """
    past, ahead = (
        "SELECT id, json_set(message, '$.delivery', id), queued_at, attempts, due_at "
        f"FROM deliveries WHERE hook = ? AND due_at {when} ?"
        for when in ("<=", ">")
    )
    rows = db.execute(
        f"{past} UNION ALL {ahead} ORDER BY due_at LIMIT ?",
        [hook, now, hook, now + 2 * _LONGEST_WAIT_S, limit],
    )
    return [Delivery(*row[:4]) for row in rows]


def least_tried(db: sqlite3.Connection, hook: Hook, now: float) -> list[Delivery]:
    """Of those that are due the one with the fewest attempts, of several the newest.

    What is refused each time, and is soon due again, does not keep it from being tried.
    """
    rows = db.execute(
        "SELECT id, json_set(message, '$.delivery', id), queued_at, attempts "
        "FROM deliveries WHERE id = (SELECT id FROM deliveries "
        "WHERE hook = ? AND (due_at <= ? OR due_at > ?) "
        "ORDER BY attempts, id DESC LIMIT 1)",
        [hook, now, now + 2 * _LONGEST_WAIT_S],
    )
    return [Delivery(*row) for row in rows]


def note(
    db: sqlite3.Connection,
    attempts: Sequence[Attempt],
    now: float,
    give_up_after: float,
    tried_for: float,
) -> list[Attempt]:
    """Write what became of deliveries, in one transaction; returns those given up.

    One that failed is due again after 1, 2, 4 ... 600 seconds, until `give_up_after`
    seconds have gone by since it was queued. Every one is tried at least once. In the first
    hour of `tried_for`, the seconds that the hook has been tried by this process, the clock
    is not believed: it may have been behind when a delivery was queued.
    """
    failed = [attempt for attempt in attempts if attempt.error]
    believed = tried_for >= min(give_up_after, _DOUBTFUL_S)
    lost = [
        a for a in failed if believed and now - a.delivery.queued_at >= give_up_after
    ]  # fmt: skip
    rows = [
        [
            None if a in lost else now + doubled(a.delivery.attempts, _LONGEST_WAIT_S),
            a.error,
            a.delivery.id,
        ]
        for a in failed
    ]
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany(
            "DELETE FROM deliveries WHERE id = ?",
            [[a.delivery.id] for a in attempts if not a.error],
        )
        db.executemany(
            "UPDATE deliveries SET attempts = attempts + 1, due_at = ?, error = ? "
            "WHERE id = ?",
            rows,
        )
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise
    return lost


def doubled(times: int, longest: float) -> float:
    """A second doubled so many times, at most `longest` seconds."""
    return min(2.0 ** min(times, _DOUBLINGS), longest)


def counts(db: sqlite3.Connection, hook: Hook) -> tuple[int, int]:
    """How many deliveries of a hook are pending, and how many were given up."""
    return tuple(
        db.execute(
            f"SELECT count(*) FROM deliveries WHERE hook = ? AND due_at IS {state}", [hook]
        ).fetchone()[0]
        for state in ("NOT NULL", "NULL")
    )


def give_up_others(db: sqlite3.Connection, hooks: Sequence[Hook]) -> int:
    """Give up what waits for any hook but these; returns how many. Belongs into a
    transaction."""
    found = db.execute(
        "UPDATE deliveries SET due_at = NULL, error = 'the hook was taken out' "
        f"WHERE due_at IS NOT NULL AND hook NOT IN ({', '.join('?' * len(hooks))})",
        hooks,
    )
    return found.rowcount


def forget(db: sqlite3.Connection) -> int:
    """Delete what was given up; returns how many. Belongs into a transaction."""
    return db.execute("DELETE FROM deliveries WHERE due_at IS NULL").rowcount


def try_again(db: sqlite3.Connection) -> int:
    """Queue anew what was given up; returns how many. Belongs into a transaction."""
    now = time.time()
    found = db.execute(
        "UPDATE deliveries SET due_at = ?, queued_at = ?, attempts = 0 "
        "WHERE due_at IS NULL",
        [now, now],
    )
    return found.rowcount
