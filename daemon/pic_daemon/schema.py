"""Tables of the match log, and whether a file is one that this version may use."""

import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sqlite_utils import Database, Migrations

from pic_daemon.errors import InputError

Status = Literal["match", "no-match", "failed"]

_PASSING = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
)  # fmt: skip
BUSY_TIMEOUT_S = 60.0
"""How long opening the log or reading it waits for another writer."""

migrations = Migrations("product-image-classifier")


@migrations()
def create_log(db: Database) -> None:
    """Tables of the first version."""
    db.execute(
        """
        CREATE TABLE models (
            sha256 TEXT PRIMARY KEY,
            path TEXT NOT NULL,
            metadata TEXT NOT NULL CHECK (json_valid(metadata)),
            first_used_at TEXT NOT NULL,
            last_used_at TEXT NOT NULL
        ) STRICT
        """
    )
    db.execute(
        """
        CREATE TABLE images (
            id INTEGER PRIMARY KEY,
            path TEXT NOT NULL,
            sha256 TEXT NOT NULL,         -- '' where the file could not be read
            bytes INTEGER NOT NULL,
            width INTEGER,
            height INTEGER,
            format TEXT,
            status TEXT NOT NULL CHECK (status IN ('match', 'no-match', 'failed')),
            score REAL,
            threshold REAL,
            model TEXT REFERENCES models (sha256),
            seen_at TEXT NOT NULL,
            classified_at TEXT NOT NULL,
            latency_ms REAL NOT NULL,
            error TEXT,
            mtime_ns INTEGER NOT NULL,    -- with bytes and inode: is the file on disk
            inode INTEGER NOT NULL,       -- still the one that was recorded?
            UNIQUE (path, sha256),
            CHECK ((status = 'failed') = (score IS NULL)),
            CHECK (status <> 'failed' OR error IS NOT NULL)
        ) STRICT
        """
    )
    db.execute(
        "CREATE INDEX matches_by_time ON images (classified_at) WHERE status = 'match'"
    )
    db.execute(
        """
        CREATE VIEW matches AS
        SELECT path, score, threshold, model, classified_at, sha256
        FROM images WHERE status = 'match'
        """
    )


@migrations()
def add_in_hand(db: Database) -> None:
    """Files that are being read, by name, before their bytes reach a decoder."""
    db.execute(
        """
        CREATE TABLE in_hand (
            path TEXT PRIMARY KEY,
            since TEXT NOT NULL,
            strikes INTEGER NOT NULL DEFAULT 0   -- attempts that failed on their own
        ) STRICT
        """
    )


@migrations()
def add_heartbeat(db: Database) -> None:
    """One row that says how the service is doing, for `pic-daemon status`."""
    db.execute(
        """
        CREATE TABLE heartbeat (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            at TEXT NOT NULL,
            figures TEXT NOT NULL CHECK (json_valid(figures))
        ) STRICT
        """
    )


@migrations()
def add_catalog_item(db: Database) -> None:
    """Which product an image was matched to; NULL without descriptor and index.

    Similarities are cosines in [-1, 1]; `runner_up` is the nearest other product;
    `catalog_index` is the SHA-256 of the index file that was asked.
    """
    for column in (
        "catalog_item TEXT", "similarity REAL", "runner_up TEXT",
        "runner_up_similarity REAL", "catalog_index TEXT",
    ):  # fmt: skip
        db.execute(f"ALTER TABLE images ADD COLUMN {column}")
    db.execute("DROP VIEW matches")
    db.execute(
        """
        CREATE VIEW matches AS
        SELECT path, score, threshold, model, classified_at, sha256, catalog_item,
               similarity, runner_up, runner_up_similarity
        FROM images WHERE status = 'match'
        """
    )


@migrations()
def add_watched(db: Database) -> None:
    """The folders of the service that started last: the page shows pictures from them."""
    db.execute("CREATE TABLE watched (folder TEXT PRIMARY KEY) STRICT")


@migrations()
def add_corrections(db: Database) -> None:
    """What people said of a verdict; a row is never changed, the latest one counts.

    `path` and `sha256` are those of the row `image` at that time: ids are used again
    after rows were deleted, and a correction outlives its row.
    """
    db.execute(
        """
        CREATE TABLE corrections (
            id INTEGER PRIMARY KEY,
            image INTEGER NOT NULL,
            path TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            label TEXT NOT NULL CHECK (label IN ('ours', 'not-ours')),
            who TEXT NOT NULL,
            at TEXT NOT NULL
        ) STRICT
        """
    )
    db.execute("CREATE INDEX corrections_by_file ON corrections (path, sha256)")


@migrations()
def add_indexes_for_the_page(db: Database) -> None:
    """Any status by time, and the matches of one product, each in order of time.

    Together they cost some 10 us a row to write, where reading and scoring the image takes
    500 (bench/results/matches-page.md).
    """
    db.execute("CREATE INDEX images_by_status ON images (status, classified_at)")
    db.execute("DROP INDEX matches_by_time")  # the one above serves its questions
    db.execute(
        "CREATE INDEX matches_by_product ON images (catalog_item, classified_at) "
        "WHERE status = 'match' AND catalog_item IS NOT NULL"
    )


@migrations()
def add_joint_score(db: Database) -> None:
    """What decided between match and no-match where an index was asked, in [0, 1]."""
    db.execute("ALTER TABLE images ADD COLUMN joint_score REAL")
    db.execute("ALTER TABLE images ADD COLUMN joint_threshold REAL")
    db.execute("DROP VIEW matches")
    db.execute(
        """
        CREATE VIEW matches AS
        SELECT path, score, threshold, model, classified_at, sha256, catalog_item,
               similarity, runner_up, runner_up_similarity, joint_score, joint_threshold
        FROM images WHERE status = 'match'
        """
    )


@migrations()
def add_revision(db: Database) -> None:
    """The order in which rows were written, whatever the clock said.

    A row that is written again comes last again; no number is used twice, though rows
    are deleted, as the last one is kept in a table of its own.
    """
    db.execute("ALTER TABLE images ADD COLUMN revision INTEGER NOT NULL DEFAULT 0")
    db.execute("UPDATE images SET revision = id")
    db.execute("CREATE INDEX images_by_revision ON images (revision)")
    db.execute(
        "CREATE TABLE last_revision (id INTEGER PRIMARY KEY CHECK (id = 1), "
        "number INTEGER NOT NULL) STRICT"
    )
    db.execute("INSERT INTO last_revision SELECT 1, coalesce(max(id), 0) FROM images")


@migrations()
def add_deliveries(db: Database) -> None:
    """Matches that a hook has still to be told of, in the words it will hear.

    A row is written with the match itself and deleted once the hook has taken it.
    """
    db.execute(
        """
        CREATE TABLE deliveries (
            id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used twice
            hook TEXT NOT NULL CHECK (hook IN ('webhook', 'command')),
            message TEXT NOT NULL CHECK (json_valid(message)),
            queued_at REAL NOT NULL,                -- POSIX time, as due_at
            attempts INTEGER NOT NULL DEFAULT 0,
            due_at REAL,                            -- NULL: given up
            error TEXT                              -- of the last attempt
        ) STRICT
        """
    )
    db.execute("CREATE INDEX deliveries_by_time ON deliveries (hook, due_at)")


@migrations()
def widen_indexes_for_the_page(db: Database) -> None:
    """A score that hardly any row reaches, and a product in any status, from an index.

    The first compares the score without a look at the row. An index by score would be
    quicker still, but its pages are written all over (bench/results/matches-page.md).
    With the id both are in the very order of a page.
    """
    db.execute("DROP INDEX images_by_status")
    db.execute("DROP INDEX matches_by_product")
    db.execute("CREATE INDEX images_by_status ON images (status, classified_at, id, score)")
    db.execute(
        "CREATE INDEX images_by_product ON images "
        "(status, catalog_item, classified_at, id) WHERE catalog_item IS NOT NULL"
    )


@migrations()
def find_corrections_by_content(db: Database) -> None:
    """What was said of a picture is asked for by its bytes, whatever it is called."""
    db.execute("DROP INDEX corrections_by_file")
    db.execute("CREATE INDEX corrections_by_content ON corrections (sha256)")


@migrations()
def add_mount_points(db: Database) -> None:
    """Where the file system of a watched folder is mounted: without it the folder is empty,
    and its files are not gone."""
    db.execute("ALTER TABLE watched ADD COLUMN mount_point TEXT NOT NULL DEFAULT ''")


@migrations()
def add_indexes_for_the_service(db: Database) -> None:
    """What failed under a name, and the row of a file by what the disk says of it.

    By the status alone each recorded image looked through all that ever failed, by the
    path alone each look at a name through all that it ever held
    (bench/results/matches-page.md).
    """
    db.execute("CREATE INDEX failed_by_path ON images (path) WHERE status = 'failed'")
    db.execute("CREATE INDEX images_by_stamp ON images (mtime_ns, inode)")


def check(path: Path, for_writing: bool = True) -> None:
    """Raise InputError where `path` cannot be, or become, our match log.

    Writes nothing; `for_writing` a file that does not exist yet is fine if its folder does,
    and sqlite3.OperationalError is raised where it is only locked or its disk is full,
    which passes.
    """
    if not _is_there(path, for_writing):
        return
    try:
        with closing(open_read_only(path)) as db:
            tables = set(db.table_names())
            applied = {m.name for m in migrations.applied(db)}
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # of an extended one
        # One that may be read and cannot be opened: no room for what SQLite keeps beside.
        files = _files(path)
        readable = bool(files) and all(os.access(file, os.R_OK) for file in files)
        full = code == sqlite3.SQLITE_CANTOPEN and readable
        if for_writing and (code in _PASSING or full):
            raise
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and not os.access(
            path.parent, os.W_OK
        ):
            raise InputError(
                f"{path} is in use by nobody, and SQLite shows it then only to an account "
                "that may write in its folder: start the service, or ask as its account."
            ) from error
        hint = " Name a SQLite file or one that does not exist yet." if for_writing else ""
        raise InputError(
            f"{path} cannot be used as the match log: {error}.{hint}"
        ) from error
    unknown = applied - {m.name for m in migrations._migrations}
    if unknown:
        raise InputError(
            f"{path} was written by a newer version (schema steps unknown here: "
            f"{', '.join(sorted(unknown))}). Upgrade product-image-classifier."
        )
    tables.discard("_sqlite_migrations")  # alone: ended before the first step was done
    if not applied and tables:
        raise InputError(
            f"{path} is the database of another program (it holds "
            f"{', '.join(sorted(tables)[:3])}). Name another file."
        )


def must_be_there(path: Path) -> None:
    """Raise InputError where there is no log to read."""
    if not os.path.exists(path):  # unlike Path, never raises
        raise InputError(f"database {path} does not exist, or this user may not look.")


def _is_there(path: Path, for_writing: bool) -> bool:
    if not for_writing:
        must_be_there(path)
    if not os.path.isdir(path.parent):  # unlike Path, never raises
        raise InputError(f"database {path}: its folder does not exist; create it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"database {path} is a folder or a device; name a file.")
    if for_writing:
        for file in (str(path.parent), *_files(path)):
            # What SQLite keeps beside the log goes with its last reader.
            if not os.access(file, os.W_OK) and os.path.exists(file):
                raise InputError(f"database {path}: {file} is not writable.")
    return os.path.exists(path)


def _files(path: Path) -> list[str]:
    """The log, and what SQLite keeps beside it, as far as they are there."""
    files = (f"{path}{suffix}" for suffix in ("", "-wal", "-shm"))
    return [file for file in files if os.path.exists(file)]


def iso_time(seconds: float) -> str:
    """A POSIX time as UTC ISO 8601 with milliseconds, which sorts as text."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_read_only(path: Path, any_thread: bool = False) -> Database:
    """The log at `path`, which nothing done with the result can change.

    It is for the thread that opened it, or for `any_thread`, one at a time.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_S, check_same_thread=not any_thread
    )
    return Database(connection)
