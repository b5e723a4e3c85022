"""What people and programs ask of the match log; reading never blocks the writer."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pic_daemon.errors import InputError
from pic_daemon.schema import check, open_read_only
from pic_daemon.web.queries import STATUSES, Filters, conditions, statement

COLUMNS = (
    "path", "score", "threshold", "model", "classified_at", "sha256", "catalog_item",
    "similarity", "runner_up", "runner_up_similarity", "joint_score", "joint_threshold",
    "status", "error",
)  # fmt: skip
"""What is told of an image; `revision` is its place in the order of recording."""

Row = dict[str, Any]

_PART = 1000  # rows in memory at a time


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    check(path, for_writing=False)
    try:
        with closing(open_read_only(path)) as log:
            db = log.conn
            assert db
            db.isolation_level = None
            db.row_factory = sqlite3.Row
            yield db
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"{path} cannot be read as a match log: {error}. If it is of an older version, "
            "start the service of this one once."
        ) from error


def read_images(path: Path, filters: Filters, limit: int) -> Iterator[list[Row]]:
    """Rows that pass `filters`, newest first, at most `limit`; never blocks the writer.

    They come in parts, as a log may be larger than the memory. Raises InputError where
    `path` is not a match log.
    """
    with _reading(path) as db:
        sql, values = statement(db, filters, None, limit)
        found = db.execute(sql, values)
        while rows := found.fetchmany(_PART):
            yield [dict(row) for row in rows]


def follow_images(
    path: Path, filters: Filters, limit: int, wait: Callable[[], bool]
) -> Iterator[list[Row]]:
    """The newest `limit` rows, then those that are recorded, in the order of recording.

    A row that is written again, as by `pic-daemon reclassify`, comes again. `wait` is
    called between two looks and says whether to go on; a look without news costs one
    PRAGMA. Raises InputError where `path` is not a match log.
    """
    statuses = STATUSES if filters.status == "all" else (filters.status,)
    terms, values = conditions(filters)
    narrowed = " AND ".join(
        ["revision > ?", f"status IN ({', '.join('?' * len(statuses))})", *terms]
    )
    # SQLite would take the index by status, and look through all that was ever recorded.
    news = (
        f"SELECT * FROM images INDEXED BY images_by_revision WHERE {narrowed} "
        "ORDER BY revision"
    )
    with _reading(path) as db:
        seen = _one(db, "PRAGMA data_version")
        db.execute("BEGIN")  # one state of the log: nothing falls between the two
        rows = _newest(db, filters, limit)
        last = _one(db, "SELECT number FROM last_revision")
        db.execute("COMMIT")
        yield sorted(rows, key=lambda row: int(row["revision"]))
        while wait():
            version = _one(db, "PRAGMA data_version")
            if version == seen:
                continue
            seen = version
            db.execute("BEGIN")
            rows = [dict(row) for row in db.execute(news, [last, *statuses, *values])]
            last = _one(db, "SELECT number FROM last_revision")
            db.execute("COMMIT")
            if rows:
                yield rows


def _newest(db: sqlite3.Connection, filters: Filters, limit: int) -> list[Row]:
    sql, values = statement(db, filters, None, limit)
    return [dict(row) for row in db.execute(sql, values)]


def _one(db: sqlite3.Connection, sql: str) -> int:
    return int(db.execute(sql).fetchone()[0])


def read_status(path: Path) -> dict[str, Any]:
    """The last heartbeat with its age in seconds as `age_s`, rows by status, deliveries.

    Raises InputError where `path` is not a match log or no service has used it yet.
    """
    told = {"pending": 0, "given up": 0}
    with _reading(path) as db:
        beat = db.execute("SELECT at, figures FROM heartbeat").fetchone()
        rows = db.execute("SELECT status, count(*) FROM images GROUP BY status").fetchall()
        # Without the table, the service of this version has not run yet.
        if _one(db, "SELECT count(*) FROM sqlite_master WHERE name = 'deliveries'"):
            # In one statement: the queue moves between two.
            found = "SELECT count(due_at), count(*) - count(due_at) FROM deliveries"
            told = dict(zip(told, db.execute(found).fetchone(), strict=True))
    if not beat:
        raise InputError(f"no service has used {path} yet.")
    age = datetime.now(UTC) - datetime.fromisoformat(beat["at"])
    return {
        "heartbeat": beat["at"],
        "age_s": round(age.total_seconds(), 1),
        **json.loads(beat["figures"]),
        "rows": dict(map(tuple, rows)),
        "deliveries": told,
    }
