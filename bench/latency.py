"""From a file's close to its committed row, beside decoding and scoring it bare.

    python bench/latency.py --images DIR --model MODEL.onnx --work DIR

Drops copies of the pictures in --images, all of them JPEG, at 1, 10 and 100 a second, and
looks into the match log every millisecond. Prints a table in Markdown and latency.json.
"""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from pic_daemon.images import decode
from pic_daemon.model import Model, load_model

BIN = Path(sys.executable).parent
ARRIVALS = {1: 60, 10: 300, 100: 2000}  # a second: how many


@click.command()
@click.option("--images", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
def main(images: Path, model: Path, work: Path, rounds: int) -> None:
    if work.exists() and any(work.iterdir()):
        raise click.UsageError(f"--work {work} is not empty")
    pictures = [path.read_bytes() for path in sorted(images.glob("*.jp*g"))[:200]]
    loaded = load_model(model, "cpu")
    results = []
    for _ in range(rounds):
        for per_second, count in ARRIVALS.items():
            bare = alone(pictures[: 30 * per_second], loaded, per_second)
            took = drop(pictures, per_second, count, model, work)
            row = {"arrivals a second": per_second, "bare ms": bare}
            for share in (50, 99, 100):
                row[f"p{share} ms"] = float(np.percentile(took, share))
            row["p50 / bare"] = row["p50 ms"] / bare
            print(json.dumps({k: round(v, 2) for k, v in row.items()}), flush=True)
            results.append(row)
    (work / "latency.json").write_text(json.dumps(results, indent=1))
    report(results)


def alone(pictures: list[bytes], model: Model, per_second: int) -> float:
    """Median of decoding and scoring one picture, in ms, at the arrivals' own pace: with
    caches as cold as the service finds them."""
    times = []
    for data in pictures:
        time.sleep(1 / per_second)
        begun = time.perf_counter()
        model.judge([decode(data, model.info.input_size)])
        times.append(1000 * (time.perf_counter() - begun))
    return float(np.median(times))


def drop(
    pictures: list[bytes], per_second: int, count: int, model: Path, work: Path
) -> list[float]:
    """Latencies in ms of `count` files that arrive at an even rate."""
    shutil.rmtree(work / "drop", ignore_errors=True)
    for old in work.glob("latency.db*"):
        old.unlink()
    (work / "drop").mkdir(parents=True)
    command = [BIN / "pic-daemon", "run", "--watch", work / "drop", "--model", model]
    command += ["--database", work / "latency.db"]
    log = work / "latency.log"
    with log.open("w") as stream:
        service = subprocess.Popen([*map(str, command)], stderr=stream)
    try:
        while "ready" not in log.read_text():
            assert service.poll() is None, log.read_text()
            time.sleep(0.05)
        time.sleep(1)
        return arrive(pictures, per_second, count, work, service)
    finally:
        service.terminate()
        service.wait()


def arrive(
    pictures: list[bytes],
    per_second: int,
    count: int,
    work: Path,
    service: "subprocess.Popen[bytes]",
) -> list[float]:
    connection = sqlite3.connect(f"file:{work}/latency.db?mode=ro", uri=True, timeout=60)
    closed: dict[str, float] = {}
    done: dict[str, float] = {}
    last, begun = 0, time.monotonic()
    while len(done) < count:
        assert service.poll() is None, "the service ended"
        number = len(closed)
        if number < count and time.monotonic() >= begun + number / per_second:
            path = work / "drop" / f"{number:06d}.jpg"
            # A tail that no decoder reads makes each file's content its own.
            path.write_bytes(pictures[number % len(pictures)] + number.to_bytes(8))
            closed[str(path.resolve())] = time.monotonic()
        else:
            time.sleep(0.001)
        rows = connection.execute("SELECT id, path FROM images WHERE id > ?", [last])
        for number, name in rows.fetchall():
            last = max(last, number)
            done[name] = time.monotonic()
    connection.close()
    return [1000 * (done[path] - closed[path]) for path in closed]


def report(results: list[dict[str, float]]) -> None:
    print("| " + " | ".join(results[0]) + " |")
    print("|---" * len(results[0]) + "|")
    for row in sorted(results, key=lambda r: r["arrivals a second"]):
        print("| " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
