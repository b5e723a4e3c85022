"""What the daemon says of altered catalog images and of others it never saw.

    python bench/first_run.py --model model.onnx --catalog DIR --others-val DIR --work DIR

Drops one altered copy of 500 catalog images and of 500 others into a fresh folder,
runs the real daemon on it until every file has its row, and prints the confusion
as a Markdown table: decoys that look like products apart from general pictures,
told apart by the prefix of their file names.
"""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import click
from PIL import Image
from sqlite_utils import Database

GENERAL = ("caltech", "flowers", "urban", "plasma", "drone")
_PATH = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--catalog", required=True, type=_PATH)
@click.option("--others-val", required=True, type=_PATH)
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--count", default=500, show_default=True)
def main(model: Path, catalog: Path, others_val: Path, work: Path, count: int) -> None:
    draw = random.Random(11)
    drop = work / "drop"
    drop.mkdir(parents=True)
    ours = draw.sample(sorted(catalog.iterdir()), count)
    others = sorted(others_val.iterdir())
    general = [path for path in others if path.name.startswith(GENERAL)]
    alike = [path for path in others if not path.name.startswith(GENERAL)]
    theirs = draw.sample(alike, count // 2) + draw.sample(general, count - count // 2)
    for kind, paths in (("ours", ours), ("theirs", theirs)):
        for path in paths:
            alter(path, drop / f"{kind}-{path.name}", draw)
    time.sleep(3)  # past the settle time: what counts is the work, not the waiting
    seconds, from_ready = serve(model, work, 2 * count)
    print_table(work / "log.db")
    print(
        f"\n{2 * count} files: {seconds:.1f} s from the start of the process to the "
        f"last row, {from_ready:.2f} s from readiness, "
        f"{2 * count / from_ready:.0f} images/s"
    )


def alter(path: Path, to: Path, draw: random.Random) -> None:
    """Crop to 50-100% of the area, longer side to 48-200 px, JPEG quality 10-95."""
    image = Image.open(path).convert("RGB")
    share = draw.uniform(0.5, 1) ** 0.5
    width, height = round(image.width * share), round(image.height * share)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    side = draw.randint(48, 200)
    image.thumbnail((side, side))
    image.save(to, "JPEG", quality=draw.randint(10, 95))


def serve(model: Path, work: Path, count: int) -> tuple[float, float]:
    """Seconds from process start and from readiness to the last committed row."""
    database = work / "log.db"
    daemon_program = str(Path(sys.executable).parent / "pic-daemon")
    command = [daemon_program, "run", "--watch", str(work / "drop")]
    command += ["--model", str(model), "--database", str(database)]
    started, ready = time.time(), 0.0
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert daemon.stderr
    recorded = 0
    for line in daemon.stderr:
        ready = ready or ("ready" in line and time.time()) or 0.0
        if ready:
            break
    while recorded < count and daemon.poll() is None:
        time.sleep(0.1)
        recorded = Database(database)["images"].count
    daemon.send_signal(signal.SIGTERM)
    daemon.communicate()
    (row,) = Database(database).query("SELECT max(classified_at) AS last FROM images")
    last = datetime.fromisoformat(row["last"]).timestamp()
    return last - started, last - ready


def print_table(database: Path) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for row in Database(database).query("SELECT path, status FROM images"):
        kind, name = Path(row["path"]).name.split("-", 1)
        if kind == "theirs":
            kind = "general" if name.startswith(GENERAL) else "look-alike"
        counts[kind, row["status"]] += 1
    print("| truth | match | no-match | failed | right |\n|---|---|---|---|---|")
    for kind, name, good in (
        ("ours", "catalog image, altered", "match"),
        ("look-alike", "other, look-alike", "no-match"),
        ("general", "other, general picture", "no-match"),
    ):
        numbers = [counts[kind, status] for status in ("match", "no-match", "failed")]
        right = counts[kind, good] / max(1, sum(numbers))
        print(f"| {name} | {' | '.join(map(str, numbers))} | {right:.1%} |")


if __name__ == "__main__":
    main()
