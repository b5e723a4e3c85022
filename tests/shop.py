"""A match log with its pictures, drawn by code, and its pages as a real process."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import httpx
from conftest import BIN, write_model
from demo import altered
from pictures import product, write_products

from pic_daemon.folders import stamp_of
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.model import Model, load_model

DAY_S = 86400.0
THRESHOLD = 0.62


@dataclass
class Shop:
    """A catalog, a drop folder and the log of what was dropped, all below `home`."""

    home: Path
    now: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.drop = self.home / "drop"
        self.catalog = self.home / "catalog"
        self.database = self.home / "matches.db"
        self.drop.mkdir(parents=True)
        write_products(self.catalog, range(12))
        self.model: Model = load_model(write_model(self.home / "model.onnx"), "cpu")
        self.log = MatchLog.open(self.database)
        self.log.use_model(self.model)
        self.log.watch({self.drop: ""})

    def copy_of(
        self, seed: int, name: str, *, at: float = 0, score: float = 0.97, **more: object
    ) -> Path:
        """Drop an altered copy of a product, recorded as its match `at` s ago."""
        return self._drop(
            seed, name, "match", at, score=score,
            catalog_item=f"product-{seed:05d}.jpg", similarity=0.5 + score / 2.1,
            runner_up=f"product-{(seed + 1) % 12:05d}.jpg", runner_up_similarity=0.51,
            catalog_index="c" * 64, **more,
        )  # fmt: skip

    def stranger(self, seed: int, name: str, *, at: float = 0, score: float = 0.2) -> Path:
        """Drop a picture that is of no product, recorded as no match."""
        return self._drop(seed, name, "no-match", at, score=score)

    def broken(self, name: str, reason: str, *, at: float = 0) -> Path:
        """Drop a file that is no picture, recorded as failed."""
        path = self.drop / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xd8\xff nothing more")
        self._record(path, "failed", at, error=reason)
        return path

    def _drop(self, seed: int, name: str, status: str, at: float, **more: object) -> Path:
        draw = random.Random(name)
        path = self.drop / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = altered(product(seed), draw)
        image.save(path, quality=draw.randint(40, 90))
        size = {"width": image.width, "height": image.height, "format": "JPEG"}
        self._record(path, status, at, **{"threshold": THRESHOLD, **size, **more})
        return path

    def _record(self, path: Path, status: str, at: float, **more: object) -> None:
        stamp = stamp_of(str(path))
        assert stamp
        moment = self.now - at
        took = random.Random(str(path)).uniform(0.04, 0.3)
        outcome = Outcome(
            str(path), sha256(path.read_bytes()).hexdigest(), stamp,
            status, moment - took, moment, **more,  # type: ignore[arg-type]
        )  # fmt: skip
        self.log.record([outcome], self.model)


@dataclass
class Site:
    """A served log: `row` gives the id of a dropped file."""

    shop: Shop
    url: str

    def row(self, name: str) -> int:
        rows = self.shop.log._db.execute(
            "SELECT id FROM images WHERE path = ?", [str(self.shop.drop / name)]
        )
        return int(next(rows)[0])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path)


@contextmanager
def serving(shop: Shop, *options: object, port: int = 0) -> Iterator[str]:
    """The pages as a real process; gives their address without the last slash."""
    command = [
        BIN / "pic-matches", "serve", "--database", shop.database,
        "--catalog", shop.catalog, "--port", port, *options,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("serving http://"), line
        yield line.split()[1].rstrip("/")
    finally:
        process.terminate()
        process.wait(20)
