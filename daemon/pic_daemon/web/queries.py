"""What the pages ask of the match log: one page of rows, one row, the figures.

Rows are listed newest first and paged by (time, id), so that any page costs the same.
"""

import json
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from pic_daemon.schema import Status, iso_time

STATUSES: tuple[Status, ...] = get_args(Status)
NAMES = ("status", "from", "to", "min", "max", "folder", "product")
"""What the filters are called in the address of a page."""
PAGE = 30
"""Rows on a page: with two pictures each, what a browser loads in one go."""

DAYS = 14
_LATEST = 1000  # rows that the latency is taken from
_FEW = 5000  # rows of a folder that are sorted rather than met on the way through time
_PRODUCTS = 300  # offered while typing

Row = dict[str, Any]


class FilterError(ValueError):
    """A filter that means nothing; the message says which and what would."""


@dataclass(frozen=True)
class Filters:
    """What a list is narrowed to; '' and None do not narrow. Times are UTC.

    `folder` takes in all below it. `since` is the first moment that counts and
    `until` the first that no longer does. Scores are in [0, 1].
    """

    status: Status | Literal["all"] = "match"
    since: datetime | None = None
    until: datetime | None = None
    min_score: float | None = None
    max_score: float | None = None
    folder: str = ""
    product: str = ""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> "Filters":
        """Read from the query string of a page. Raises FilterError."""
        status = given.get("status") or "match"
        if status not in (*STATUSES, "all"):
            raise FilterError(f"status {status!r} is none of {', '.join(STATUSES)}, all")
        folder = given.get("folder", "")
        return cls(
            status,  # type: ignore[arg-type]
            _moment("from", given.get("from", "")),
            _moment("to", given.get("to", "")),
            _score("lowest score", given.get("min", "")),
            _score("highest score", given.get("max", "")),
            folder.rstrip("/") or folder[:1],
            given.get("product", ""),
        )

    def query(self) -> dict[str, str]:
        """The query string that gives these filters again, as `of` reads it."""
        values = {
            "status": "" if self.status == "match" else self.status,
            "from": _written(self.since),
            "to": _written(self.until),
            "min": "" if self.min_score is None else str(self.min_score),
            "max": "" if self.max_score is None else str(self.max_score),
            "folder": self.folder,
            "product": self.product,
        }
        return {name: value for name, value in values.items() if value}


def _written(moment: datetime | None) -> str:
    """A time in UTC without a zone, to the minute where no more is needed."""
    if moment is None:
        return ""
    bare = moment.replace(tzinfo=None)
    return bare.isoformat(timespec="auto" if bare.second or bare.microsecond else "minutes")


@dataclass(frozen=True)
class Cursor:
    """The row that a page begins after, going to older rows or to newer ones."""

    at: str
    id: int
    newer: bool = False

    @classmethod
    def of(cls, text: str, newer: bool) -> "Cursor":
        """Read as `str` writes it. Raises FilterError."""
        at, _, number = text.rpartition("_")
        if not number.isascii() or not number.isdigit() or len(number) > 18 or len(at) > 40:
            raise FilterError(f"{text!r} names no place in the list")
        return cls(at, int(number), newer)

    def __str__(self) -> str:
        return f"{self.at}_{self.id}"


@dataclass(frozen=True)
class Page:
    """Rows newest first, and where the pages beside this one begin."""

    rows: list[Row]
    newer: Cursor | None
    older: Cursor | None


def page_of(
    db: sqlite3.Connection, filters: Filters, cursor: Cursor | None = None, size: int = PAGE
) -> Page:
    """At most `size` rows of the list, from its top or from `cursor` on."""
    sql, values = statement(db, filters, cursor, size + 1)
    rows = _rows(db, sql, values)
    more, rows = len(rows) > size, rows[:size]
    backwards = cursor is not None and cursor.newer
    if backwards:
        rows.reverse()
    if not rows:
        return Page([], None, None)
    first = Cursor(rows[0]["classified_at"], rows[0]["id"], newer=True)
    last = Cursor(rows[-1]["classified_at"], rows[-1]["id"])
    return Page(
        rows,
        newer=first if (more if backwards else cursor) else None,
        older=last if (more or backwards) else None,
    )


def statement(
    db: sqlite3.Connection, filters: Filters, cursor: Cursor | None, limit: int
) -> tuple[str, list[Any]]:
    """The query of a page and its values: each status is read in order from its index.

    That index holds the score too, so that only rows whose score passes are looked up.
    A folder with few rows is found by path and sorted instead.
    """
    by_path = bool(filters.folder) and not filters.product and _is_small(db, filters.folder)
    terms, values = conditions(filters)
    forwards = cursor is not None and cursor.newer
    if cursor:
        terms.append(f"(classified_at, id) {'>' if forwards else '<'} (?, ?)")
        values += [cursor.at, cursor.id]
    statuses = STATUSES if filters.status == "all" else (filters.status,)
    # A literal, as the partial index asks for; "+" keeps the index by status out.
    parts = [
        "SELECT * FROM images WHERE "
        + " AND ".join([f"{'+' if by_path else ''}status = '{status}'", *terms])
        for status in statuses
    ]
    way = "ASC" if forwards else "DESC"
    order = f" ORDER BY classified_at {way}, id {way} LIMIT ?"
    return " UNION ALL ".join(parts) + order, [*values * len(parts), limit]


def conditions(filters: Filters) -> tuple[list[str], list[Any]]:
    """SQL that narrows to all of `filters` but the status, and the values in it."""
    found: list[tuple[str, Any]] = []
    if filters.since:
        found.append(("classified_at >= ?", iso_time(filters.since.timestamp())))
    if filters.until:
        found.append(("classified_at < ?", iso_time(filters.until.timestamp())))
    if filters.min_score is not None:
        found.append(("score >= ?", filters.min_score))
    if filters.max_score is not None:
        found.append(("score <= ?", filters.max_score))
    if filters.product:
        found.append(("catalog_item = ?", filters.product))
    if filters.folder:
        first, behind = _range(filters.folder)
        found += [("path >= ?", first), ("path < ?", behind)]
    return [condition for condition, _ in found], [value for _, value in found]


def _is_small(db: sqlite3.Connection, folder: str) -> bool:
    rows = db.execute(
        "SELECT count(*) FROM (SELECT 1 FROM images WHERE path >= ? AND path < ? LIMIT ?)",
        [*_range(folder), _FEW],
    ).fetchone()
    return int(rows[0]) < _FEW


def _below(folder: str) -> str:
    return folder.rstrip("/") + "/"


def _range(folder: str) -> tuple[str, str]:
    """The first path below a folder, and the first that sorts behind all of them."""
    return _below(folder), _below(folder)[:-1] + chr(ord("/") + 1)


def record(db: sqlite3.Connection, number: int) -> Row | None:
    """The row with this id."""
    return next(iter(_rows(db, "SELECT * FROM images WHERE id = ?", [number])), None)


def said_of(db: sqlite3.Connection, rows: list[Row]) -> dict[int, Row]:
    """Row id -> the latest correction of its picture, of the rows that have one."""
    wanted = json.dumps([[row["id"], row["sha256"]] for row in rows])
    found = _rows(
        db,
        """
        SELECT j.value ->> 0 AS row, c.label, c.who, c.at, max(c.id)
        FROM json_each(?) AS j JOIN corrections AS c
        ON c.sha256 = j.value ->> 1 GROUP BY 1
        """,
        [wanted],
    )
    return {item["row"]: item for item in found}


def watched(db: sqlite3.Connection) -> list[str]:
    """The folders of the service that started last, and of archives since."""
    return [folder for (folder,) in db.execute("SELECT folder FROM watched ORDER BY 1")]


def products(db: sqlite3.Connection) -> list[str]:
    """Products that were matched, at most 300: one step through the index for each."""
    rows = db.execute(
        """
        WITH RECURSIVE item (name) AS (
            SELECT min(catalog_item) FROM images INDEXED BY images_by_product
            WHERE status = 'match' AND catalog_item > ''
            UNION ALL
            SELECT (SELECT min(catalog_item) FROM images INDEXED BY images_by_product
                    WHERE status = 'match' AND catalog_item > item.name)
            FROM item WHERE item.name IS NOT NULL
        )
        SELECT name FROM item WHERE name IS NOT NULL LIMIT ?
        """,
        [_PRODUCTS],
    )
    return [name for (name,) in rows]


def counts_by_day(db: sqlite3.Connection, today: datetime, days: int = DAYS) -> list[Row]:
    """Matches and failures of each of the last days, the newest first; days are UTC."""
    midnight = today.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    found = []
    for back in range(days):
        start = midnight - timedelta(days=back)
        ends = [iso_time((start + timedelta(days=n)).timestamp()) for n in (0, 1)]
        names = [(start + timedelta(days=n)).strftime("%Y-%m-%d") for n in (0, 1)]
        row: Row = dict(zip(("day", "next"), names, strict=True))
        for name, status in (("matches", "match"), ("failures", "failed")):
            (row[name],) = db.execute(
                "SELECT count(*) FROM images WHERE status = ? "
                "AND classified_at >= ? AND classified_at < ?",
                [status, *ends],
            ).fetchone()
        found.append(row)
    return found


def latency(db: sqlite3.Connection) -> Row | None:
    """Median and 95th percentile in ms of the latest 1,000 rows, None without any."""
    values = sorted(
        value
        for (value,) in db.execute(
            "SELECT latency_ms FROM images ORDER BY id DESC LIMIT ?", [_LATEST]
        )
    )
    if not values:
        return None
    ranks = {name: math.ceil(share * len(values)) - 1
             for name, share in (("median", 0.5), ("p95", 0.95))}  # fmt: skip
    return {"of": len(values), **{name: values[rank] for name, rank in ranks.items()}}


def heartbeat(db: sqlite3.Connection, now: datetime) -> Row | None:
    """What the service last said of itself, with its age in s; None before the first.

    The age is negative where the clock was set back since.
    """
    row = db.execute("SELECT at, figures FROM heartbeat").fetchone()
    if row is None:
        return None
    age = (now - datetime.fromisoformat(row[0])).total_seconds()
    return {"at": row[0], "age_s": age, **json.loads(row[1])}


def _rows(db: sqlite3.Connection, sql: str, values: list[Any]) -> list[Row]:
    cursor = db.execute(sql, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def moment_of(text: str) -> datetime:
    """An ISO 8601 time, of UTC where it names no zone. Raises ValueError, OverflowError."""
    moment = datetime.fromisoformat(text)
    moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    iso_time(moment.timestamp())  # which rounds: the last moment of all has no next
    return moment


def _moment(name: str, text: str) -> datetime | None:
    if not text:
        return None
    try:
        return moment_of(text)
    except (ValueError, OverflowError) as error:
        raise FilterError(
            f"{name}: {text!r} is no time such as 2026-11-24T08:30"
        ) from error


def _score(name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise FilterError(f"{name}: {text!r} is no number from 0 to 1")
    return value
