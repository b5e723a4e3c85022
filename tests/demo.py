"""The whole line on pictures drawn by code: train, export, serve, drop, read the log.

`make demo` runs it; it exits non-zero where fewer than 95% of the verdicts are right.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pictures import product, write_products
from PIL import Image
from sqlite_utils import Database

HERE = Path("demo-run").absolute()
CATALOG = range(0, 12)
DECOYS = range(1000, 1600)
UNSEEN = range(5000, 5060)
NEEDED = 0.95
WAIT_S = 60


def main() -> int:
    started = time.monotonic()
    shutil.rmtree(HERE, ignore_errors=True)
    drop = HERE / "drop"
    drop.mkdir(parents=True)
    say(f"Drawing {len(CATALOG)} products and {len(DECOYS)} look-alikes")
    write_products(HERE / "catalog", CATALOG)
    write_products(HERE / "others", DECOYS)
    say("Training a network on this machine")
    folders = "--catalog", HERE / "catalog", "--others", HERE / "others"
    size = "--epochs", 5, "--train-images", 6000, "--val-images", 1000
    rest = "--device", "cpu", "--target-fpr", 0.02, "--out", HERE / "run"
    call("pic-train", *folders, *size, *rest)
    say("Exporting")
    call("pic-export", HERE / "run", "--output", HERE / "model.onnx")
    say("Starting the daemon and dropping altered copies and unseen look-alikes")
    truth = serve_and_drop(drop)
    right = show(truth)
    say(f"{right} of {len(truth)} right ({right / len(truth):.1%}) "
        f"in {time.monotonic() - started:.0f} s; everything lies in {HERE}")  # fmt: skip
    print(f"  pic-matches --database {HERE / 'log.db'}")
    print(f'  sqlite-utils {HERE / "log.db"} "select * from matches"')
    return 0 if right >= NEEDED * len(truth) else 1


def serve_and_drop(drop: Path) -> dict[str, bool]:
    """Run the real daemon while files arrive; returns path -> is it of the catalog."""
    command = (
        tool("pic-daemon"),
        "run",
        "--watch",
        drop,
        "--model",
        HERE / "model.onnx",
    )
    daemon = subprocess.Popen([*map(str, command), "--database", str(HERE / "log.db")])
    try:
        truth = {}
        draw = random.Random(7)
        for number, seed in enumerate([*CATALOG] * 5 + [*UNSEEN]):
            path = drop / f"{number:03d}.jpg"
            altered(product(seed), draw).save(path, quality=draw.randint(15, 90))
            truth[str(path)] = seed in CATALOG
        wait_for_rows(len(truth), daemon)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    return truth


def altered(image: Image.Image, draw: random.Random) -> Image.Image:
    """Crop to at least half of the area, then resize; the caller compresses."""
    share = draw.uniform(0.5, 1) ** 0.5
    width, height = round(image.width * share), round(image.height * share)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    side = draw.randint(72, 256)
    return image.resize((side, side * height // width))


def wait_for_rows(count: int, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and daemon.poll() is None:
        if (HERE / "log.db").exists():
            database = Database(HERE / "log.db")
            done = database["images"].count if database["images"].exists() else 0
            database.close()
            if done >= count:
                return
        time.sleep(0.2)
    sys.exit("the daemon did not record every image in time")


def show(truth: dict[str, bool]) -> int:
    """Print every verdict with the truth beside it; returns how many are right."""
    rows = Database(HERE / "log.db").query(
        "SELECT path, status, score FROM images ORDER BY path"
    )
    right = 0
    print("file     truth    verdict     score")
    for row in rows:
        expected = "match" if truth[row["path"]] else "no-match"
        right += row["status"] == expected
        mark = "" if row["status"] == expected else "   <- wrong"
        score = "" if row["score"] is None else f"{row['score']:.4f}"
        print(
            f"{Path(row['path']).name}  {expected:<8} {row['status']:<8} {score:>8}{mark}"
        )
    return right


def call(*command: object) -> None:
    name, *rest = map(str, command)
    subprocess.run([tool(name), *rest], check=True)


def tool(name: str) -> str:
    return os.path.join(os.path.dirname(sys.executable), name)


def say(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
