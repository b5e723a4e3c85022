"""How long the pages take with a million rows: python bench/matches_page.py [ROWS]

Fills a log as the service would have (a fifth matches of 20,000 products, a hundredth
failures, twelve cameras), serves it with pic-matches and asks for each page as a browser
does, first cold and then 20 times. Then times what the service asks and writes of each
image with these indexes and with others.
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
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import httpx

from pic_daemon.folders import FileStamp
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.schema import iso_time

BIN = Path(sys.executable).parent
TIMES = 20
LIMIT_MS = 200
BATCH = 32
FILLED = 10_000  # rows to a transaction before anything is timed
WRITTEN = 3_200
MODEL: Any = SimpleNamespace(sha256="m")
SERVICE = ("failed_by_path", "images_by_stamp")
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


def rows(first: int, count: int, end: float, total: int) -> Iterator[Outcome]:
    """Rows number `first` and on of `total`, the last of which is of the time `end`."""
    draw = random.Random(first)
    for number in range(first, first + count):
        at = end - (total - number) * APART_S
        kind = draw.random()
        status: Any = "match" if kind < 0.2 else "failed" if kind < 0.21 else "no-match"
        score = {"match": draw.uniform(0.6, 1), "no-match": draw.uniform(0, 0.6)}.get(
            status
        )
        item = f"shelf-{draw.randrange(40):02d}/product-{draw.randrange(20_000):05d}.jpg"
        named = status == "match"
        yield Outcome(
            f"/srv/drop/camera-{number % 12:02d}/{number // 30_000:03d}/{number:07d}.jpg",
            hashlib.sha256(str(number).encode()).hexdigest(),
            FileStamp(34_567, number, number), status, at - 0.2, at, 640, 480, "JPEG",
            score, 0.6, "the file is empty" if status == "failed" else None,
            item if named else None, 0.9 if named else None, catalog_index="c" * 64,
        )  # fmt: skip


def fill(database: Path, count: int) -> None:
    MatchLog.open(database).close()
    db = sqlite3.connect(database, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    db.execute("INSERT INTO models VALUES ('m', 'm.onnx', '{}', 'x', 'x')")
    db.execute("INSERT INTO watched VALUES ('/srv/drop', '')")
    now = time.time()
    db.execute("INSERT INTO heartbeat VALUES (1, ?, ?)",
               [iso_time(now), '{"backlog": 3, "oldest_waiting_s": 1.5}'])  # fmt: skip
    db.close()
    log = MatchLog.open(database)
    left = rows(0, count, now, count)
    while part := list(islice(left, FILLED)):
        log.record(part, MODEL)
    log.close()  # which moves all of it into the file


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
    """Images a second, 32 to a durable transaction, with these indexes and with others.

    Each set has its turn in each round; what is told is its best one.
    """
    db = sqlite3.connect(database, isolation_level=None)
    ours = dict(db.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL "
        "AND tbl_name = 'images' AND name <> 'images_by_revision'"
    ).fetchall())  # fmt: skip
    service = [ours[name] for name in SERVICE]
    sets = {
        "as they are": list(ours.values()),
        "without the two for the service": [s for s in ours.values() if s not in service],
        **{name: [*service, *indexes] for name, indexes in OTHERS.items()},
    }
    log = MatchLog.open(database)
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
            cpu, speed = write(log, count)
            count += WRITTEN
            best[name] = min(best[name][0], cpu), max(best[name][1], speed)
    log.close()
    db.close()
    say("\n| indexes | us of CPU an image | images/s |\n|---|---|---|")
    for name, (cpu, speed) in best.items():
        say(f"| {name} | {cpu:.1f} | {speed:,.0f} |")


def write(log: MatchLog, count: int) -> tuple[float, float]:
    """Ask whether images are known and record them, beside `count` rows; returns us of CPU
    an image and images a second."""
    given = list(rows(count, WRITTEN, time.time() + WRITTEN * APART_S, count + WRITTEN))
    began, worked = time.perf_counter(), time.process_time()
    for start in range(0, WRITTEN, BATCH):
        batch = given[start : start + BATCH]
        assert not any(log.row_of(image.path, image.stamp) for image in batch)
        log.record(batch, MODEL)
    cpu = (time.process_time() - worked) / WRITTEN * 1e6
    return cpu, WRITTEN / (time.perf_counter() - began)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
