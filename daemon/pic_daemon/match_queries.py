"""What people and programs ask of the match log; reading never blocks the writer."""

import json
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pic_daemon.errors import InputError
from pic_daemon.schema import check, iso_time, open_read_only

MATCH_COLUMNS = (
    "path", "score", "threshold", "model", "classified_at", "sha256", "catalog_item",
    "similarity", "runner_up", "runner_up_similarity",
)  # fmt: skip


def read_matches(
    path: Path, since: datetime | None, min_score: float, limit: int
) -> list[dict[str, Any]]:
    """Rows of the view `matches`, newest first, at most `limit`; never blocks the writer.

    Raises InputError where `path` is not a match log.
    """
    if not os.path.exists(path):
        raise InputError(f"database {path} does not exist, or this user may not look.")
    check(path, for_writing=False)
    try:
        db = open_read_only(path)
        rows = list(
            db.query(
                "SELECT * FROM matches WHERE classified_at >= ? AND score >= ? "
                "ORDER BY classified_at DESC, path LIMIT ?",
                [iso_time(since.timestamp()) if since else "", min_score, limit],
            )
        )
        db.close()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} cannot be read as a match log: {error}.") from error
    return rows


def read_status(path: Path) -> dict[str, Any]:
    """The last heartbeat with its age in seconds as `age_s`, rows by status, deliveries.

    Raises InputError where `path` is not a match log or no service has used it yet.
    """
    if not os.path.exists(path):
        raise InputError(f"database {path} does not exist, or this user may not look.")
    check(path, for_writing=False)
    try:
        db = open_read_only(path)
        beat = db.execute("SELECT at, figures FROM heartbeat").fetchone()
        rows = db.execute("SELECT status, count(*) FROM images GROUP BY status").fetchall()
        told = {"pending": 0, "given up": 0}
        if db["deliveries"].exists():  # else the service of this version has not run yet
            told["pending"], told["given up"] = db.execute(
                "SELECT count(due_at), count(*) - count(due_at) FROM deliveries"
            ).fetchone()
        db.close()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} cannot be read as a match log: {error}.") from error
    if not beat:
        raise InputError(f"no service has used {path} yet.")
    age = datetime.now(UTC) - datetime.fromisoformat(beat[0])
    return {
        "heartbeat": beat[0],
        "age_s": round(age.total_seconds(), 1),
        **json.loads(beat[1]),
        "rows": dict(rows),
        "deliveries": told,
    }
