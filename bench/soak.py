"""Arrivals at a full rate for a long time: memory, descriptors and latency must be flat.

    python bench/soak.py --work DIR [--images DIR] [--minutes 60] [--rate 100]

Files are copied under changing names (of pictures in --images, or drawn) and deleted
once they are recorded. Prints a line a minute and writes soak.csv and soak.png to --work.
"""

import csv
import sqlite3
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import click
import matplotlib

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import write_image, write_model

matplotlib.use("Agg")
from matplotlib import pyplot

BIN = Path(sys.executable).parent
COLUMNS = ("minute", "rows", "rss_mib", "workers_mib", "descriptors", "p50_ms", "p99_ms")


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--rate", default=100, show_default=True, help="Files a second.")
def main(work: Path, images: Path | None, minutes: float, rate: int) -> None:
    if work.exists() and any(work.iterdir()):
        raise click.UsageError(f"--work {work} is not empty")
    drop = work / "drop"
    drop.mkdir(parents=True)
    sources = sorted(images.glob("*.jpg")) if images else draw(work / "drawn")
    service = start(drop, write_model(work / "model.onnx"), work)
    rows: list[dict[str, float]] = []
    try:
        arrive(drop, sources, minutes, rate, lambda m: rows.append(look(service, work, m)))
    finally:
        service.terminate()
        assert service.wait(60) == 0
    save(rows, work)


def draw(folder: Path) -> list[Path]:
    return [write_image(folder / f"{n}.png", 20 + n, side=300) for n in range(200)]


def start(drop: Path, model: Path, work: Path) -> "subprocess.Popen[bytes]":
    command = [BIN / "pic-daemon", "run", "--watch", drop, "--model", model]
    command += ["--database", work / "log.db"]
    with (work / "daemon.log").open("wb") as log:
        return subprocess.Popen([str(part) for part in command], stderr=log)


def arrive(drop: Path, sources: list[Path], minutes: float, rate: int, each_minute) -> None:  # type: ignore[no-untyped-def]
    started = time.monotonic()
    recent: deque[Path] = deque()
    minute = 1
    number = 0
    while (passed := time.monotonic() - started) < 60 * minutes:
        while number < passed * rate:
            source = sources[number % len(sources)]
            path = drop / f"{number:09d}{source.suffix}"
            with path.open("wb") as file:
                # A tail that no decoder reads makes each file's content its own.
                file.write(source.read_bytes() + number.to_bytes(8))
            recent.append(path)
            number += 1
            if len(recent) > 60 * rate:  # a minute is enough to be recorded
                recent.popleft().unlink()
        if passed >= 60 * minute:
            each_minute(minute)
            minute += 1
        time.sleep(0.005)


def look(service: "subprocess.Popen[bytes]", work: Path, minute: int) -> dict[str, float]:
    connection = sqlite3.connect(work / "log.db")
    (count,) = connection.execute("SELECT count(*) FROM images").fetchone()
    latencies = sorted(
        value
        for (value,) in connection.execute(
            "SELECT latency_ms FROM images ORDER BY id DESC LIMIT 5000"
        )
    )
    connection.close()
    found = {
        "minute": minute,
        "rows": count,
        "rss_mib": round(resident(service.pid), 1),
        "workers_mib": round(sum(map(resident, children(service.pid))), 1),
        "descriptors": len(list(Path(f"/proc/{service.pid}/fd").iterdir())),
        "p50_ms": round(latencies[len(latencies) // 2], 2),
        "p99_ms": round(latencies[len(latencies) * 99 // 100], 2),
    }
    print(found, flush=True)
    return found


def resident(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 2**20


def children(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == process:
            found += [int(path.name), *children(int(path.name))]
    return found


def save(rows: list[dict[str, float]], work: Path) -> None:
    with (work / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = pyplot.subplots(3, 1, figsize=(8, 8), sharex=True)
    minutes = [row["minute"] for row in rows]
    groups = (("rss_mib", "workers_mib"), ("descriptors",), ("p50_ms", "p99_ms"))
    for axis, names in zip(axes, groups, strict=True):
        for name in names:
            axis.plot(minutes, [row[name] for row in rows], label=name)
        axis.set_ylim(bottom=0)
        axis.legend()
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minute")
    figure.tight_layout()
    figure.savefig(work / "soak.png", dpi=110)


if __name__ == "__main__":
    main()
