"""Kill the service at random while files arrive, then compare folder and match log.

    python bench/crash.py --work DIR [--kills 200] [--files 5000]

Files come in every way at once: written in place, renamed into place, in new nested
folders, while the service runs and while it is down. After the last kill the service
runs until the log stands still. Exits non-zero where a file has no row or two, or where
the database is damaged.
"""

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import click
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import write_model

BIN = Path(sys.executable).parent
STILL_S = 15


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--kills", default=200, show_default=True)
@click.option("--files", default=5000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(work: Path, kills: int, files: int, seed: int) -> None:
    if work.exists() and any(work.iterdir()):
        raise click.UsageError(f"--work {work} is not empty")
    drop = work / "drop"
    drop.mkdir(parents=True)
    model = write_model(work / "model.onnx")
    draw = random.Random(seed)
    stop = threading.Event()
    # Files last about as long as the kills do: some two seconds each.
    pause = 2.0 * kills / files
    writer = threading.Thread(target=write_files, args=(drop, files, pause, draw, stop))
    writer.start()
    started = time.monotonic()
    try:
        for _ in range(kills):
            service = start(drop, model, work)
            time.sleep(draw.uniform(0.2, 3.0))
            service.send_signal(signal.SIGKILL)
            service.wait()
    finally:
        stop.set()
        writer.join()
    service = start(drop, model, work)
    wait_until_still(work / "log.db")
    service.send_signal(signal.SIGTERM)
    assert service.wait(60) == 0
    minutes = (time.monotonic() - started) / 60
    sys.exit(report(drop, work / "log.db", kills, minutes))


def start(drop: Path, model: Path, work: Path) -> "subprocess.Popen[bytes]":
    command = [BIN / "pic-daemon", "run", "--watch", drop, "--model", model]
    command += ["--database", work / "log.db", "--settle-seconds", "0.5"]
    with (work / "daemon.log").open("ab") as log:
        return subprocess.Popen([str(part) for part in command], stderr=log)


def write_files(
    drop: Path, files: int, pause: float, draw: random.Random, stop: threading.Event
) -> None:
    for number in range(files):
        if stop.is_set():  # the kills are over: what is left comes all at once
            pause = 0
        write_one(drop, number, draw)
        time.sleep(pause)


def write_one(drop: Path, number: int, draw: random.Random) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    name = f"{number:06d}.png"
    match number % 4:
        case 0:
            image.save(drop / name)
        case 1:
            image.save(drop / f".{name}")
            (drop / f".{name}").rename(drop / name)
        case 2:
            folder = drop / f"{number // 200}" / f"{draw.randint(0, 9)}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)
        case _:  # written in two pieces
            image.save(drop / f".{name}")
            data = (drop / f".{name}").read_bytes()
            (drop / f".{name}").unlink()
            with (drop / name).open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(0.02)
                file.write(data[len(data) // 2 :])


def count(database: Path) -> int:
    connection = sqlite3.connect(database)
    try:
        (rows,) = connection.execute("SELECT count(*) FROM images").fetchone()
    except sqlite3.OperationalError:  # no life was long enough to make it yet
        rows = 0
    connection.close()
    return int(rows)


def wait_until_still(database: Path) -> None:
    last, since = -1, time.monotonic()
    while time.monotonic() - since < STILL_S:
        time.sleep(1)
        if (now := count(database)) != last:
            last, since = now, time.monotonic()


def report(drop: Path, database: Path, kills: int, minutes: float) -> int:
    connection = sqlite3.connect(database)
    rows = Counter(path for (path,) in connection.execute("SELECT path FROM images"))
    statuses = dict(
        connection.execute("SELECT status, count(*) FROM images GROUP BY status")
    )
    (integrity,) = connection.execute("PRAGMA integrity_check").fetchone()
    left = connection.execute("SELECT count(*) FROM in_hand").fetchone()[0]
    connection.close()
    there = {str(path.resolve()) for path in drop.rglob("*.png")}
    missing, twice = there - set(rows), [p for p, n in rows.items() if n > 1]
    print(
        f"{kills} kills in {minutes:.1f} minutes; {len(there)} files, {sum(rows.values())} "
        f"rows {statuses}; {len(missing)} missing, {len(twice)} twice, {left} left in "
        f"hand; integrity_check {integrity}"
    )
    bad = missing or twice or set(rows) - there or integrity != "ok" or left
    return 1 if bad or statuses.get("failed") else 0


if __name__ == "__main__":
    main()
