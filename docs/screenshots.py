"""Make the pictures in docs/pictures: python docs/screenshots.py

First a real run, as the README goes through it but small, then the pages of a log.
Every product shown is drawn by code. Needs `make install` and Debian's chromium.
"""

import html
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browser import chromium  # noqa: E402
from demo import altered  # noqa: E402
from pictures import product, write_products  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page  # noqa: E402
from shop import DAY_S, Shop, serving  # noqa: E402

from pic_daemon.corrections import correct  # noqa: E402
from pic_daemon.match_queries import read_images  # noqa: E402
from pic_daemon.web.queries import Filters  # noqa: E402

BIN = Path(sys.executable).parent
TERMINAL = (
    "margin:0; padding:14px 18px; background:#161b22; color:#d6dde6; "
    "font:13px/1.5 'DejaVu Sans Mono', monospace; white-space:pre-wrap"
)
# name -> path, (width, height) in CSS pixels, color scheme
PICTURES = {
    "matches": ("/matches", (1100, 860), "light"),
    "matches-dark": ("/matches", (1100, 860), "dark"),
    "matches-phone": ("/matches", (375, 812), "light"),
    "record": ("/record/{corrected}", (1100, 980), "light"),
    "failures": ("/failures", (1100, 560), "light"),
    "dashboard": ("/dashboard", (1100, 900), "light"),
}


def main() -> None:
    """Train, measure, serve and ask; fill a log and show it; write what is seen."""
    with tempfile.TemporaryDirectory() as home, chromium() as browser:
        run_through(Path(home) / "run", browser)
        show_pages(Path(home) / "srv", browser)


def run_through(home: Path, browser: Browser) -> None:
    """Every step of the README on 12 products, with a picture of each."""
    write_products(home / "products", range(12))
    write_products(home / "photos", range(1000, 1600))
    write_products(home / "strangers", range(5000, 5060))
    (home / "srv" / "drop").mkdir(parents=True)
    run(home, "pic-train --catalog products/ --others photos/ --out runs/first "
        "--train-images 4000 --val-images 1000 --target-fpr 0.02 --device cpu")  # fmt: skip
    keep(home / "runs" / "first" / "TrainingLossAccuracyPlot.png", "train")
    run(home, "pic-export runs/first --output model.onnx")
    run(home, "pic-evaluate model.onnx --catalog products/ --others strangers/ "
        "--output report/ --target-fpr 0.02 --per-edit 24 --per-decoy 5 "
        "--published 600")  # fmt: skip
    page = browser.new_page(viewport={"width": 1000, "height": 618})
    page.goto((home / "report" / "evaluation.html").as_uri())
    shoot(page, "evaluate", home)
    print_out(browser, "serve", home, serve(home))
    asked = [
        f"pic-matches --database matches.db{more}" for more in ("", " --status failed")
    ]
    print_out(browser, "query", home, [f"$ {ask}\n{run(home, ask)}" for ask in asked])


def run(home: Path, command: str) -> str:
    """What one of our commands prints, run in `home`."""
    print(f"$ {command}", flush=True)
    program, *rest = shlex.split(command)
    done = subprocess.run(
        [BIN / program, *rest], cwd=home, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def serve(home: Path) -> list[str]:
    """The service while files are dropped: its command and its log."""
    command = "pic-daemon run --watch /srv/drop --model model.onnx --database matches.db"
    program, *rest = shlex.split(command.replace(" /srv", f" {home}/srv") + " --verbose")
    draw = random.Random(5)
    with (home / "log").open("w") as log:
        service = subprocess.Popen([BIN / program, *rest], cwd=home, stderr=log)
    try:
        wait_for(lambda: "ready" in (home / "log").read_text())
        for number, seed in enumerate((3, 5010, 7, 10, 5020, 1, 5030, 4)):
            picture = altered(product(seed), draw)
            picture.save(home / f"srv/drop/IMG_{4410 + number}.jpg", quality=60)
        (home / "srv/drop/upload.png").write_bytes(b"half a picture")
        wait_for(
            lambda: sum(map(len, read_images(home / "matches.db", Filters("all"), 99))) == 9
        )
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(60)
    return [f"$ {command} --verbose\n", (home / "log").read_text()]


def wait_for(condition: Callable[[], bool]) -> None:
    """Look ten times a second, for a minute at most."""
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            sys.exit("the service did not do it within 60 s")
        time.sleep(0.1)


def print_out(browser: Browser, name: str, home: Path, parts: Iterable[str]) -> None:
    """A picture of a terminal that shows this."""
    page = browser.new_page(viewport={"width": 1000, "height": 100})
    text = html.escape("\n".join(part.rstrip("\n") for part in parts))
    page.set_content(f'<body style="{TERMINAL}">{text}</body>')
    shoot(page, name, home, whole=True)


def show_pages(home: Path, browser: Browser) -> None:
    """What a browser sees of a log with everything in it."""
    shop = Shop(home)
    corrected = fill(shop)
    with serving(shop) as url:
        for name, (path, (width, height), scheme) in PICTURES.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(url + path.format(corrected=corrected), wait_until="networkidle")
            shoot(page, name, home.parent)


def shoot(page: Page, name: str, home: Path, whole: bool = False) -> None:
    """Keep what the page shows, without the folder of this run, and close it."""
    page.evaluate(
        """home => {
            const walk = document.createTreeWalker(document.body, 4);
            while (walk.nextNode())
                walk.currentNode.data = walk.currentNode.data.replaceAll(home, "");
        }""",
        str(home),
    )
    page.screenshot(path=HERE / "pictures" / f"{name}.png", full_page=whole)
    page.close()
    keep(HERE / "pictures" / f"{name}.png", name)


def keep(picture: Path, name: str) -> None:
    """Write a picture in 256 colours, a third of its size."""
    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(HERE / "pictures" / f"{name}.png", optimize=True)
    print(f"docs/pictures/{name}.png", flush=True)


def fill(shop: Shop) -> int:
    """A fortnight of drops; returns the row that somebody corrected."""
    draw = random.Random(3)
    for number in range(260):
        ago = DAY_S * 13.6 * (1 - number / 260) ** 1.3 + 1700
        name = f"{draw.choice(['market', 'market', 'web'])}/IMG_{4100 + number}.jpg"
        if number % 23 == 7:
            shop.broken(name, draw.choice(REASONS), at=ago)
        elif number % 3:
            shop.copy_of(number % 12, name, at=ago, score=draw.uniform(0.7, 0.999))
        else:
            shop.stranger(5000 + number, name, at=ago)
    shop.broken("web/upload-17.png", "not an image in a format this service reads", at=900)
    for seed, name, ago, score in LATEST:
        shop.copy_of(seed, name, at=ago, score=score)
    rows = {Path(row["path"]).name: row["id"] for row in shop.log._db["images"].rows}
    correct(shop.database, rows["IMG_4415.jpg"], "ours", "Ada")
    correct(shop.database, rows["IMG_4414.jpg"], "ours", "Grace")
    correct(shop.database, rows["IMG_4414.jpg"], "not-ours", "Ada")
    shop.log.beat({"backlog": 3, "oldest_waiting_s": 1.4})
    return int(rows["IMG_4414.jpg"])


REASONS = [
    "the file is empty",
    "not an image in a format this service reads",
    "image file is truncated (12 bytes not processed)",
    "20000 x 20000 pixels exceed the limit of 200,000,000 pixels",
]
LATEST = [
    (2, "market/IMG_4412.jpg", 700, 0.871),
    (9, "web/upload-21.jpg", 430, 0.989),
    (5, "market/IMG_4414.jpg", 190, 0.664),
    (7, "market/IMG_4415.jpg", 45, 0.997),
]

if __name__ == "__main__":
    main()
