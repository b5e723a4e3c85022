"""What people say of a verdict: "ours" or "not ours", kept beside the rows.

One picture may lie under several names: what was said last of its bytes counts.
"""

import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pic_daemon.errors import InputError
from pic_daemon.schema import check, iso_time, open_read_only

Label = Literal["ours", "not-ours"]
LABELS: tuple[Label, ...] = get_args(Label)

_WRITE_TIMEOUT_S = 5.0  # the service's transactions are short; a person waits no longer


@dataclass(frozen=True)
class Correction:
    """`who` said at `at` (ISO 8601, UTC) that the picture with these bytes is so."""

    path: str
    sha256: str
    label: Label
    who: str
    at: str


class NotCorrectable(Exception):
    """No such row, one of another picture or without a verdict; the message says which."""


def correct(
    database: Path, image: int, label: Label, who: str, seen: str | None = None
) -> None:
    """Note what `who` says of the row `image`, in a short transaction of its own.

    `seen` is the SHA-256 of the picture that they looked at: the row must still be of it,
    as ids are used again. Saying again what one said last changes nothing. Raises
    NotCorrectable, and sqlite3.OperationalError where the database stays locked or cannot
    be written.
    """
    at = iso_time(time.time())
    uri = f"{database.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(
        uri, uri=True, timeout=_WRITE_TIMEOUT_S, isolation_level=None
    )
    with closing(connection) as db:
        db.execute("BEGIN IMMEDIATE")
        row = db.execute(
            "SELECT path, sha256, status FROM images WHERE id = ?", [image]
        ).fetchone()
        if row is None:
            raise NotCorrectable(f"there is no record {image}.")
        path, sha256, status = row
        if seen not in (None, sha256):
            raise NotCorrectable(f"record {image} is of another picture now: look again.")
        if status == "failed":
            raise NotCorrectable("this file could not be judged: there is no verdict.")
        last = db.execute(
            "SELECT label, who, path FROM corrections WHERE sha256 = ? "
            "ORDER BY id DESC LIMIT 1",
            [sha256],
        ).fetchone()
        if last != (label, who, path):
            db.execute(
                "INSERT INTO corrections (image, path, sha256, label, who, at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [image, path, sha256, label, who, at],
            )
        db.execute("COMMIT")


def history(db: sqlite3.Connection, sha256: str) -> list[Correction]:
    """All that was said of one picture, under whatever name, the latest first."""
    rows = db.execute(
        "SELECT path, sha256, label, who, at FROM corrections "
        "WHERE sha256 = ? ORDER BY id DESC",
        [sha256],
    )
    return [Correction(*row) for row in rows]


def read_corrections(database: Path) -> list[Correction]:
    """The latest correction of every picture, in the order they were given.

    Raises InputError where `database` is no match log or is older than corrections.
    """
    check(database, for_writing=False)
    try:
        with closing(open_read_only(database)) as db:
            rows = db.execute(
                "SELECT path, sha256, label, who, at FROM corrections WHERE id IN "
                "(SELECT max(id) FROM corrections GROUP BY sha256) ORDER BY id"
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{database} holds no corrections: {error}.") from error
    return [Correction(*row) for row in rows]
