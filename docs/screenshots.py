"""Make the pictures of the pages in docs/pictures: python docs/screenshots.py

Everything shown is drawn by code. Needs the extra `dev` and Debian's chromium.
"""

import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browser import chromium  # noqa: E402
from shop import DAY_S, Shop, serving  # noqa: E402

from pic_daemon.corrections import correct  # noqa: E402

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
    """Fill a log, show it, and write what the browser sees."""
    with tempfile.TemporaryDirectory() as home, chromium() as browser:
        shop = Shop(Path(home) / "srv")
        corrected = fill(shop)
        with serving(shop) as url:
            for name, (path, (width, height), scheme) in PICTURES.items():
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page.goto(url + path.format(corrected=corrected), wait_until="networkidle")
                # The folder of this run is nobody's business.
                page.evaluate(
                    """home => {
                        const walk = document.createTreeWalker(document.body, 4);
                        while (walk.nextNode())
                            walk.currentNode.data = walk.currentNode.data.replace(home, "");
                    }""",
                    home,
                )
                page.screenshot(path=HERE / "pictures" / f"{name}.png")
                page.close()
                print(f"docs/pictures/{name}.png")


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
