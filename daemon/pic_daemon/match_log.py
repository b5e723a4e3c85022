"""The SQLite match log: the only state of the service that survives it.

One writer, one transaction per batch, WAL with synchronous FULL: a row that was
reported is on the disk. Only the names of files in hand are not waited for.
"""

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlite_utils import Database

from pic_daemon import deliveries
from pic_daemon.deliveries import Hook
from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp, text_of
from pic_daemon.model import Model
from pic_daemon.schema import BUSY_TIMEOUT_S, Status, check, iso_time, migrations

_WRITE_TIMEOUT_S = 5.0  # per attempt; the service repeats it, and must be able to stop

_WAL_BYTES = 64 << 20

UNREAD = "cannot be read:"
"""How the error of a file begins that met an I/O error."""

# What failed under a name was an unfinished state of the file. The index is named, as
# SQLite would take any by status that was made later, and look through all that failed.
_NO_LONGER_FAILED = (
    "DELETE FROM images INDEXED BY failed_by_path "
    "WHERE path = ? AND sha256 <> ? AND status = 'failed'"
)
SILENT_S = 120.0
"""Four heartbeats: a service that says nothing for longer is down or stuck."""

_UNREAD_AGAIN_S = 600.0  # leave to read a file may be given without a trace in its stamp

_NOT_KEPT = "strikes = 0 OR instr(path, '\\x')"  # of in_hand: see `struck`

STALE = -1  # as mtime_ns: no file has it, so that the next scan reads the file again


@dataclass(frozen=True)
class Outcome:
    """What became of one image: a row of the table `images`.

    `seen_at` and `classified_at` are POSIX times in seconds. `score` and
    `threshold` are in [0, 1], None with status ``failed``. `error` says why an image
    failed, or why it was not judged by its score. `catalog_item` is the nearest product's
    path within the catalog, as `text_of` writes it, `similarity` its cosine, `runner_up`
    the nearest other product; all None where no index was asked, else `catalog_index` is
    its SHA-256 and `joint_score`, in [0, 1], decided by `joint_threshold`.
    """

    path: str
    sha256: str
    stamp: FileStamp
    status: Status
    seen_at: float
    classified_at: float
    width: int | None = None
    height: int | None = None
    format: str | None = None
    score: float | None = None
    threshold: float | None = None
    error: str | None = None
    catalog_item: str | None = None
    similarity: float | None = None
    runner_up: str | None = None
    runner_up_similarity: float | None = None
    catalog_index: str | None = None
    joint_score: float | None = None
    joint_threshold: float | None = None


@dataclass(frozen=True)
class OldRow:
    """What retention must know of a row."""

    id: int
    path: str
    stamp: FileStamp
    classified_at: str


def _bring_up_to_date(db: Database) -> None:
    while waiting := len(migrations.pending(db)):
        try:
            migrations.apply(db)
        except sqlite3.OperationalError:
            db.conn.rollback()
            if len(migrations.pending(db)) == waiting:  # else another program was first
                raise


class MatchLog:
    """An open match log. Not shared between threads."""

    def __init__(self, path: Path, db: Database) -> None:
        self.path = path
        self._db = db

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open for writing; create it or bring its schema up to date where needed.

        Raises InputError where `path` is no SQLite file, belongs to another
        program, has a newer schema or cannot be written, and sqlite3.OperationalError
        where it is locked or the disk is full, which passes.
        """
        check(path)
        try:
            connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
            db = Database(connection)
            db.execute("PRAGMA foreign_keys = ON")
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise InputError(
                    f"{path}: SQLite cannot use its write-ahead log here (it stays in "
                    f"mode {mode!r}). Put the database on a local disk."
                )
            _bring_up_to_date(db)
            db.execute(f"PRAGMA busy_timeout = {_WRITE_TIMEOUT_S * 1000:.0f}")
            # What a long transaction or a listing left open made of it is given back.
            db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        except sqlite3.OperationalError:
            raise
        except sqlite3.Error as error:
            raise InputError(f"database {path}: {error}.") from error
        return cls(path, db)

    def close(self) -> None:
        """Close the connection; what was recorded is on the disk already."""
        self._db.close()

    def use_model(self, model: Model) -> None:
        """Note that `model` scores from now on; rows refer to it by its hash."""
        now = iso_time(time.time())
        with self._transaction():
            self._db.execute(
                """
                INSERT INTO models VALUES (?, ?, ?, ?, ?)
                ON CONFLICT (sha256) DO UPDATE
                SET path = excluded.path, last_used_at = excluded.last_used_at
                """,
                [model.sha256, text_of(str(model.path)), model.metadata_json(), now, now],
            )

    def watch(self, folders: Mapping[Path, str], besides: bool = False) -> None:
        """Note the drop folders with the mount points of their file systems.

        Pictures in other folders are not shown to anyone. `besides` leaves what was noted.
        """
        with self._transaction():
            if not besides:
                self._db.execute("DELETE FROM watched")
            self._db.conn.executemany(
                "INSERT OR IGNORE INTO watched VALUES (?, ?)",
                [
                    [text_of(str(folder)), text_of(point)]
                    for folder, point in folders.items()
                ],
            )

    def mount_points(self) -> dict[str, str]:
        """What `watch` noted last, by the folder's name as `text_of` writes it."""
        return dict(self._db.execute("SELECT folder, mount_point FROM watched").fetchall())

    def take_in_hand(self, paths: Sequence[str]) -> None:
        """Note the names of files that a decoder gets to see now.

        Not forced to the disk: a decoder that takes everything down with it leaves the
        system's cache as it is, and after a loss of power there is nobody to blame.
        """
        now = iso_time(time.time())
        with self._transaction(synchronous="NORMAL"):
            self._db.conn.executemany(
                "INSERT INTO in_hand (path, since) VALUES (?, ?) "
                "ON CONFLICT (path) DO UPDATE SET since = excluded.since",
                [[text_of(path), now] for path in paths],
            )

    def strike(self, path: str) -> int:
        """Count an attempt at the file that failed on its own; returns how many now.

        Not forced to the disk: as `take_in_hand`.
        """
        with self._transaction(synchronous="NORMAL"):
            self._db.execute(
                "UPDATE in_hand SET strikes = strikes + 1 WHERE path = ?", [text_of(path)]
            )
        row = self._db.execute(
            "SELECT strikes FROM in_hand WHERE path = ?", [text_of(path)]
        ).fetchone()
        return int(row[0]) if row else 1

    def put_down(self, path: str) -> None:
        """Forget that this file was in hand; it needs no row."""
        with self._transaction(synchronous="NORMAL"):
            self._forget([path])

    def put_all_down(self) -> None:
        """Note that no file is being read; those with strikes stay noted, as such."""
        with self._transaction(synchronous="NORMAL"):
            self._db.execute(f"DELETE FROM in_hand WHERE {_NOT_KEPT}")
            self._db.execute("UPDATE in_hand SET since = ''")

    def left_in_hand(self) -> list[str]:
        """Names that an earlier service left in hand when it was killed; forgets them then.

        Those with strikes stay noted, where `struck` can name them.
        """
        rows = self._db.execute(
            "SELECT path FROM in_hand WHERE since <> '' ORDER BY path"
        ).fetchall()
        if rows:
            with self._transaction():
                self._db.execute(f"DELETE FROM in_hand WHERE {_NOT_KEPT}")
        return [path for (path,) in rows]

    def struck(self) -> list[str]:
        """Names with strikes, of files that have no row yet; not those that `text_of`
        changed, under which nothing can be found.
        """
        rows = self._db.execute("SELECT path FROM in_hand WHERE strikes > 0")
        return [path for (path,) in rows if "\\x" not in path]

    def _forget(self, paths: Sequence[str]) -> None:
        self._db.conn.executemany(
            "DELETE FROM in_hand WHERE path = ?", [[text_of(path)] for path in paths]
        )

    def row_of(self, path: str, stamp: FileStamp) -> tuple[Status, str] | None:
        """Status and SHA-256 in the row of the file at `path`, as it stands on the disk.

        A file that met an I/O error has one for a while: then a scan tries it again.
        """
        row = self._db.execute(
            "SELECT status, sha256, error, classified_at FROM images "
            "WHERE path = ? AND bytes = ? AND mtime_ns = ? AND inode = ?",
            [text_of(path), stamp.bytes, stamp.mtime_ns, stamp.inode],
        ).fetchone()
        if row is None:
            return None
        status, sha256, error, classified_at = row
        if not sha256 and error.startswith(UNREAD):
            now = time.time()
            # Both ends: the clock may have been ahead when it was written.
            lately = (iso_time(now + by) for by in (-_UNREAD_AGAIN_S, _UNREAD_AGAIN_S))
            if not next(lately) <= classified_at <= next(lately):
                return None
        return status, sha256

    def recognise(self, path: str, sha256: str, stamp: FileStamp) -> bool:
        """Whether `path` with this content has its row; if so, remember the new stamp.

        Not forced to the disk: lost, it costs reading the file once more.
        """
        row = self._db.execute(
            "SELECT id FROM images WHERE path = ? AND sha256 = ? AND mtime_ns <> ?",
            [text_of(path), sha256, STALE],
        ).fetchone()
        if row is None:
            return False
        with self._transaction(synchronous="NORMAL"):
            self._db.execute(
                "UPDATE images SET mtime_ns = ?, inode = ? WHERE id = ?",
                [stamp.mtime_ns, stamp.inode, *row],
            )
            self._db.conn.execute(_NO_LONGER_FAILED, [text_of(path), sha256])
            self._forget([path])
        return True

    def record(
        self, outcomes: Sequence[Outcome], model: Model, hooks: Sequence[Hook] = ()
    ) -> None:
        """Write one batch in one transaction; it is on the disk when this returns.

        A row that failed under the same name with other content is replaced; one that
        was marked to be done again is brought up to date. What `hooks` are to be told
        of it is queued with it.
        """
        rows = [
            [
                text_of(o.path), o.sha256, o.stamp.bytes, o.width, o.height, o.format,
                o.status, o.score, o.threshold, model.sha256, iso_time(o.seen_at),
                iso_time(o.classified_at),
                round(max(0.0, o.classified_at - o.seen_at) * 1000, 3),
                o.error, o.stamp.mtime_ns, o.stamp.inode, o.catalog_item,
                o.similarity, o.runner_up, o.runner_up_similarity, o.catalog_index,
                o.joint_score, o.joint_threshold,
            ]
            for o in outcomes
        ]  # fmt: skip
        replaced = [[text_of(o.path), o.sha256] for o in outcomes]
        with self._transaction():
            deliveries.queue(self._db.conn, hooks, outcomes, model.sha256)
            first = self._next_revision(len(rows))
            self._db.conn.executemany(_NO_LONGER_FAILED, replaced)
            self._db.conn.executemany(
                """
                INSERT INTO images (
                    path, sha256, bytes, width, height, format, status, score,
                    threshold, model, seen_at, classified_at, latency_ms, error,
                    mtime_ns, inode, catalog_item, similarity, runner_up,
                    runner_up_similarity, catalog_index, joint_score, joint_threshold,
                    revision
                ) VALUES (
                    ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
                )
                ON CONFLICT (path, sha256) DO UPDATE
                SET bytes = excluded.bytes, width = excluded.width,
                    height = excluded.height, format = excluded.format,
                    status = excluded.status, score = excluded.score,
                    threshold = excluded.threshold, model = excluded.model,
                    classified_at = excluded.classified_at, error = excluded.error,
                    mtime_ns = excluded.mtime_ns, inode = excluded.inode,
                    catalog_item = excluded.catalog_item,
                    similarity = excluded.similarity, runner_up = excluded.runner_up,
                    runner_up_similarity = excluded.runner_up_similarity,
                    catalog_index = excluded.catalog_index,
                    joint_score = excluded.joint_score,
                    joint_threshold = excluded.joint_threshold,
                    revision = excluded.revision
                """,
                [[*row, first + n] for n, row in enumerate(rows)],
            )
            self._forget([o.path for o in outcomes])
            self._db.execute(
                "UPDATE models SET last_used_at = ? WHERE sha256 = ?",
                [iso_time(time.time()), model.sha256],
            )

    def _next_revision(self, rows: int) -> int:
        """The first of as many numbers that no row has had yet."""
        (last,) = self._db.execute(
            "UPDATE last_revision SET number = number + ? RETURNING number", [rows]
        ).fetchone()
        return int(last) - rows + 1

    def beat(self, figures: Mapping[str, object]) -> None:
        """Say that the service lives, and how it is doing."""
        now = iso_time(time.time())
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO heartbeat VALUES (1, ?, ?)",
                [now, json.dumps(figures)],
            )

    def silent_for(self) -> float | None:
        """Seconds since a service last said how it is doing, by the clock; None: never."""
        found = self._db.execute(
            "SELECT (julianday('now') - julianday(at)) * 86400 FROM heartbeat"
        ).fetchone()
        return float(found[0]) if found else None

    def mark_moved(self, path: str, sha256: str, target: str) -> None:
        """Note that a failed file is at `target` now: should it come back to `path`, it is
        read again.

        Not forced to the disk: lost, it costs that it is moved once more, unread.
        """
        with self._transaction(synchronous="NORMAL"):
            self._db.execute(
                "UPDATE images SET mtime_ns = ?, error = error || '; moved to ' || ? "
                "WHERE path = ? AND sha256 = ? AND status = 'failed'",
                [STALE, text_of(target), text_of(path), sha256],
            )

    def mark_failed(self) -> int:
        """Have every failed image tried again by the next scan; returns how many."""
        return self._mark("status = 'failed'")

    def deliver_only_to(self, hooks: Sequence[Hook]) -> int:
        """Give up what waits for any other hook, as nobody tells it; returns how many."""
        with self._transaction():
            return deliveries.give_up_others(self._db.conn, hooks)

    def deliver_again(self) -> int:
        """Queue anew the deliveries that were given up; returns how many."""
        with self._transaction():
            return deliveries.try_again(self._db.conn)

    def forget_deliveries(self) -> int:
        """Delete the deliveries that were given up; returns how many."""
        with self._transaction():
            return deliveries.forget(self._db.conn)

    def mark_outdated(self) -> int:
        """Have images decided by another than the present model or index done again.

        Returns how many. Which these are, and from which score on the index is asked, the
        heartbeat says; without one, the model is that used last, by the clock.
        """
        return self._mark(self._outdated())

    def outdated(self, folder: Path) -> int:
        """How many images below `folder` `mark_outdated` would have done again, besides
        those that it was asked for already."""
        below = text_of(f"{folder}/")
        found = self._db.execute(
            f"SELECT count(*) FROM images WHERE {self._outdated()} "
            "AND mtime_ns <> ? AND substr(path, 1, ?) = ?",
            [STALE, len(below), below],
        )
        return int(found.fetchone()[0])

    def _outdated(self) -> str:
        model, index, gate = (
            f"(SELECT json_extract(figures, '$.{name}') FROM heartbeat)"
            for name in ("model", "catalog_index", "gate_threshold")
        )
        last = "SELECT sha256 FROM models ORDER BY last_used_at DESC LIMIT 1"
        # With an error it was not judged by its score, and no index was asked.
        asked = f"(catalog_index IS NOT NULL OR (score >= {gate} AND error IS NULL))"
        return (
            f"(model <> coalesce({model}, ({last})) "
            f"OR (catalog_index IS NOT {index} AND {asked})) AND status <> 'failed'"
        )

    def served(self) -> tuple[str, str] | None:
        """SHA-256 of the model that the service last said it serves, and when it did."""
        row = self._db.execute(
            "SELECT json_extract(figures, '$.model'), at FROM heartbeat"
        ).fetchone()
        return (row[0], row[1]) if row and row[0] else None

    def no_matches_before(
        self, moment: float, after: tuple[str, int], limit: int
    ) -> list[OldRow]:
        """Rows of no match from before a POSIX time, oldest first, behind the row `after`.

        `after` is the time and the id of a row, ('', 0) to begin with.
        """
        rows = self._db.execute(
            "SELECT id, path, bytes, mtime_ns, inode, classified_at FROM images "
            "WHERE status = 'no-match' AND classified_at < ? "
            "AND (classified_at, id) > (?, ?) ORDER BY classified_at, id LIMIT ?",
            [iso_time(moment), *after, limit],
        )
        return [OldRow(i, path, FileStamp(*stamp), at) for i, path, *stamp, at in rows]

    def delete(self, rows: Sequence[OldRow]) -> int:
        """Delete those that are as they were, in one transaction; returns how many."""
        if not rows:
            return 0
        with self._transaction():
            found = self._db.conn.executemany(
                "DELETE FROM images WHERE id = ? AND status = 'no-match' "
                "AND mtime_ns = ? AND inode = ? AND classified_at = ?",
                [[r.id, r.stamp.mtime_ns, r.stamp.inode, r.classified_at] for r in rows],
            )
        return found.rowcount

    def _mark(self, condition: str) -> int:
        with self._transaction():
            found = self._db.execute(
                f"UPDATE images SET mtime_ns = ? WHERE {condition}", [STALE]
            )
            self._db.execute("DELETE FROM in_hand WHERE strikes > 0")
        return int(found.rowcount)

    @contextmanager
    def _transaction(self, synchronous: str = "FULL") -> Iterator[None]:
        self._db.execute(f"PRAGMA synchronous = {synchronous}")
        # IMMEDIATE takes the write lock at once, so that waiting for it is covered
        # by the busy timeout and never fails half-way.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.conn.rollback()
            raise
        self._db.conn.commit()
