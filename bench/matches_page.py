"""How long the pages take with a million rows: python bench/matches_page.py [ROWS]

Fills a log as the service would have (a fifth matches of 20,000 products, a hundredth
failures, twelve cameras), serves it with pic-matches and asks for each page as a browser
does, first cold and then 20 times. Then times the writer with these indexes and with
others.
"""

import hashlib
import math
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

import httpx

from pic_daemon.match_log import MatchLog
from pic_daemon.schema import iso_time

BIN = Path(sys.executable).parent
TIMES = 20
LIMIT_MS = 200
BATCH = 32
WRITTEN = 16_000
COLUMNS = (
    "path", "sha256", "bytes", "width", "height", "format", "status", "score", "threshold",
    "model", "seen_at", "classified_at", "latency_ms", "error", "mtime_ns", "inode",
    "catalog_item", "similarity", "runner_up", "runner_up_similarity", "catalog_index",
)  # fmt: skip
INSERT = (
    f"INSERT INTO images ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
)
APART_S = 3.0
ROUNDS = 3
NARROW = [
    "CREATE INDEX images_by_status ON images (status, classified_at)",
    "CREATE INDEX images_by_product ON images (catalog_item, classified_at) "
    "WHERE status = 'match' AND catalog_item IS NOT NULL",
]
OTHERS = {
    "narrower, without score and id": NARROW,
    "narrower, and one by score": [
        *NARROW, "CREATE INDEX images_by_score ON images (status, score)"
    ],
    "none but matches by time": [
        "CREATE INDEX matches_by_time ON images (classified_at) WHERE status = 'match'"
    ],
}  # fmt: skip


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as home:
        database = Path(home) / "log.db"
        fill(database, count)
        say(f"{count:,} rows, {database.stat().st_size / 2**20:,.0f} MiB; "
            f"{platform.machine()}, {os.cpu_count()} cores, no GPU, Python "
            f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
            f"{datetime.now(UTC):%Y-%m-%d}")  # fmt: skip
        slow = show_pages(database, count)
        show_writer(database, count)
    if slow:
        sys.exit(f"slower than {LIMIT_MS} ms: {', '.join(slow)}")


def rows(first: int, count: int, end: float, total: int) -> Iterator[tuple[object, ...]]:
    """Rows number `first` and on of `total`, the last of which is of the time `end`."""
    draw = random.Random(first)
    for number in range(first, first + count):
        at = end - (total - number) * APART_S
        kind = draw.random()
        status = "match" if kind < 0.2 else "failed" if kind < 0.21 else "no-match"
        score = {"match": draw.uniform(0.6, 1), "no-match": draw.uniform(0, 0.6)}.get(
            status
        )
        item = f"shelf-{draw.randrange(40):02d}/product-{draw.randrange(20_000):05d}.jpg"
        named = status == "match"
        yield (
            f"/srv/drop/camera-{number % 12:02d}/{number // 30_000:03d}/{number:07d}.jpg",
            hashlib.sha256(str(number).encode()).hexdigest(), 34_567, 640, 480, "JPEG",
            status, score, 0.6, "m", iso_time(at - 0.2), iso_time(at), 200.0,
            "the file is empty" if status == "failed" else None, number, number,
            item if named else None, 0.9 if named else None, None, None, "c" * 64,
        )  # fmt: skip


def fill(database: Path, count: int) -> None:
    MatchLog.open(database).close()
    db = sqlite3.connect(database, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    db.execute("INSERT INTO models VALUES ('m', 'm.onnx', '{}', 'x', 'x')")
    db.execute("INSERT INTO watched VALUES ('/srv/drop')")
    now = time.time()
    db.execute("INSERT INTO heartbeat VALUES (1, ?, ?)",
               [iso_time(now), '{"backlog": 3, "oldest_waiting_s": 1.5}'])  # fmt: skip
    db.execute("BEGIN")
    db.executemany(INSERT, rows(0, count, now, count))
    db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def pages(count: int) -> dict[str, str]:
    """What is asked -> its path; the first is the one that must be fast."""
    hours = count * APART_S / 3600
    middle = datetime.now(UTC) - timedelta(hours=hours / 2)
    half = {"from": f"{middle:%Y-%m-%dT%H:%M}", "to": f"{middle:%Y-%m-%dT23:59}"}
    deep = f"{iso_time(time.time() - hours * 3600 * 0.9)}_{count // 10}"
    wanted: dict[str, dict[str, str]] = {
        "matches, first page": {},
        "matches, nine tenths down": {"after": deep},
        "matches of one day in the middle": half,
        "matches of one product": {"product": "shelf-07/product-00007.jpg"},
        "matches in one camera's folder": {"folder": "/srv/drop/camera-03"},
        "matches in a folder of 2,500": {"folder": "/srv/drop/camera-03/007"},
        "matches with a score over 0.99": {"min": "0.99"},
        "matches with a score over 0.99999": {"min": "0.99999"},
        "matches of a camera, score over 0.99999": {
            "folder": "/srv/drop/camera-03",
            "min": "0.99999",
        },
        "no matches, first page": {"status": "no-match"},
        "no matches just below the threshold": {"status": "no-match", "min": "0.599"},
        "no matches with a score over 0.599999": {"status": "no-match", "min": "0.599999"},
        "all, first page": {"status": "all"},
        "all with a score over 0.99999": {"status": "all", "min": "0.99999"},
        "all of one product": {"status": "all", "product": "shelf-07/product-00007.jpg"},
        "all in a folder of 2,500": {"status": "all", "folder": "/srv/drop/camera-03/007"},
    }
    found = {name: "/matches?" + urlencode(query) for name, query in wanted.items()}
    return found | {
        "failures, first page": "/failures",
        "dashboard": "/dashboard",
        "one record": f"/record/{count // 2}",
    }


def show_pages(database: Path, count: int) -> list[str]:
    command = [
        str(BIN / "pic-matches"),
        "serve",
        "--database",
        str(database),
        "--port",
        "0",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    slow = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().split()[1].rstrip("/")
            say(
                "\n| page | first, ms | median, ms | slowest of 20, ms |\n|---|---|---|---|"
            )
            for number, (name, path) in enumerate(pages(count).items()):
                with httpx.Client(base_url=url, timeout=60) as client:
                    times = [ask(client, path) for _ in range(TIMES + 1)]
                first, rest = times[0], times[1:]
                say(f"| {name} | {first:.0f} | {statistics.median(rest):.0f} "
                    f"| {max(rest):.0f} |")  # fmt: skip
                if number == 0 and max(times) >= LIMIT_MS:
                    slow.append(name)
        finally:
            server.terminate()
    return slow


def ask(client: httpx.Client, path: str) -> float:
    began = time.perf_counter()
    reply = client.get(path)
    if reply.status_code != 200:
        say(f"{path}: {reply.status_code}")
    return (time.perf_counter() - began) * 1000


def show_writer(database: Path, count: int) -> None:
    """Rows a second, 32 to a durable transaction, with these indexes and with others.

    Each set has its turn in each round; what is told is its best one.
    """
    db = sqlite3.connect(database, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    ours = [sql for (sql,) in db.execute(
        "SELECT sql FROM sqlite_schema "
        "WHERE name IN ('images_by_status', 'images_by_product')"
    )]  # fmt: skip
    sets = {"as they are": ours, **OTHERS}
    best = {name: (math.inf, 0.0) for name in sets}
    for _ in range(ROUNDS):
        for name, indexes in sets.items():
            for (index,) in db.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL "
                "AND tbl_name = 'images' AND name <> 'images_by_revision'"
            ).fetchall():
                db.execute(f"DROP INDEX {index}")
            for sql in indexes:
                db.execute(sql)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            cpu, speed = write(db, count)
            count += WRITTEN
            best[name] = min(best[name][0], cpu), max(best[name][1], speed)
    db.close()
    say("\n| indexes | us of CPU a row | rows/s |\n|---|---|---|")
    for name, (cpu, speed) in best.items():
        say(f"| {name} | {cpu:.1f} | {speed:,.0f} |")


def write(db: sqlite3.Connection, count: int) -> tuple[float, float]:
    """Add rows to `count` of them; returns us of CPU a row and rows a second."""
    given = list(rows(count, WRITTEN, time.time() + WRITTEN * APART_S, count + WRITTEN))
    began, worked = time.perf_counter(), time.process_time()
    for start in range(0, WRITTEN, BATCH):
        db.execute("BEGIN IMMEDIATE")
        db.executemany(INSERT, given[start : start + BATCH])
        db.execute("COMMIT")
    cpu = (time.process_time() - worked) / WRITTEN * 1e6
    return cpu, WRITTEN / (time.perf_counter() - began)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
