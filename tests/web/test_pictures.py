"""Which files a picture may be made of."""

import gc
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pictures import product
from PIL import Image
from shop import Shop

from pic_daemon.match_log import STALE
from pic_daemon.web import pictures, queries
from pic_daemon.web.pictures import NotShown, dropped, of_catalog, read_beneath


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "shop")


def row_of(shop: Shop, path: Path) -> dict[str, Any]:
    shop.log._db.conn.row_factory = sqlite3.Row
    (row,) = shop.log._db.query("SELECT * FROM images WHERE path = ?", [str(path)])
    return row


def shown(shop: Shop, row: dict[str, Any]) -> bytes:
    return dropped(row, queries.watched(shop.log._db.conn), 256)


def test_a_recorded_picture_in_a_watched_folder_is_shown(shop: Shop) -> None:
    row = row_of(shop, shop.copy_of(1, "deep/er/a.jpg"))
    assert shown(shop, row).startswith(b"\xff\xd8")
    marked = {**row, "mtime_ns": STALE}  # to be read again: still what was recorded
    assert shown(shop, marked).startswith(b"\xff\xd8")


def test_a_folder_that_is_no_longer_watched_is_not_shown(
    shop: Shop, tmp_path: Path
) -> None:
    row = row_of(shop, shop.copy_of(1, "a.jpg"))
    for others in ([tmp_path / "else"], [shop.drop / "deep"], [shop.home / "dro"], []):
        shop.log.watch(dict.fromkeys(others, ""))
        with pytest.raises(NotShown, match="not in a watched folder"):
            shown(shop, row)


@pytest.mark.parametrize(
    "step", ["../secret.jpg", "deep/../../secret.jpg", "./secret.jpg", "deep//secret.jpg",
             "",              "deep/", "..", "a\0b.jpg"],
)  # fmt: skip
def test_no_way_leads_out_of_a_folder(shop: Shop, step: str) -> None:
    product(1).save(shop.home / "secret.jpg")
    product(1).save(shop.drop / "secret.jpg")
    (shop.drop / "deep").mkdir()
    product(1).save(shop.drop / "deep" / "secret.jpg")
    row = row_of(shop, shop.copy_of(1, "a.jpg"))
    with pytest.raises(NotShown, match="not in the folder"):
        shown(shop, {**row, "path": f"{shop.drop}/{step}"})
    with pytest.raises(NotShown):
        of_catalog({**row, "catalog_item": step}, shop.catalog, 256)


def test_a_path_of_its_own_is_never_taken_for_one_in_the_catalog(shop: Shop) -> None:
    row = row_of(shop, shop.copy_of(1, "a.jpg"))
    assert of_catalog(row, shop.catalog, 256).startswith(b"\xff\xd8")
    absolute = str(shop.drop / "a.jpg")
    for item, catalog in (
        (absolute, shop.catalog),
        ("product-00001.jpg", None),
        (None, None),
    ):
        with pytest.raises(NotShown):
            of_catalog({**row, "catalog_item": item}, catalog, 256)


def test_links_are_not_followed_wherever_they_stand(shop: Shop, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    product(1).save(outside / "secret.jpg")
    row = row_of(shop, shop.copy_of(1, "deep/a.jpg"))
    inside = Path(row["path"])
    inside.unlink()
    inside.symlink_to(outside / "secret.jpg")
    with pytest.raises(NotShown, match="no longer there"):
        shown(shop, row)
    (shop.drop / "linked").symlink_to(outside)
    for path in ("linked/secret.jpg", "linked"):
        with pytest.raises(NotShown, match="no longer there"):
            shown(shop, {**row, "path": f"{shop.drop}/{path}"})
    (shop.catalog / "link.jpg").symlink_to(outside / "secret.jpg")
    with pytest.raises(NotShown, match="no longer there"):
        of_catalog({**row, "catalog_item": "link.jpg"}, shop.catalog, 256)


def test_another_file_under_the_recorded_name_is_not_shown(shop: Shop) -> None:
    path = shop.copy_of(1, "a.jpg")
    row = row_of(shop, path)
    product(2).save(path)
    with pytest.raises(NotShown, match="changed since"):
        shown(shop, row)
    path.unlink()
    with pytest.raises(NotShown, match="no longer there"):
        shown(shop, row)


def test_what_failed_is_not_decoded_again(shop: Shop) -> None:
    with pytest.raises(NotShown, match="could not be decoded"):
        shown(shop, row_of(shop, shop.broken("b.jpg", "the file is empty")))


def test_a_fifo_a_folder_and_a_large_file_are_not_read(shop: Shop) -> None:
    os.mkfifo(shop.drop / "pipe.jpg")
    (shop.drop / "folder.jpg").mkdir()
    with (shop.drop / "large.jpg").open("wb") as file:
        file.truncate(pictures.MAX_BYTES + 1)
    for name in ("pipe.jpg", "folder.jpg", "large.jpg"):
        with pytest.raises(NotShown):
            read_beneath(shop.drop, name)


def test_a_picture_of_too_many_pixels_is_not_decoded(shop: Shop) -> None:
    path = shop.catalog / "bomb.png"
    Image.new("1", (8000, 7000)).save(path)
    assert path.stat().st_size < 100_000
    row = {"catalog_item": "bomb.png"}
    with pytest.raises(NotShown, match="too large or not an image"):
        of_catalog(row, shop.catalog, 256)


def test_no_file_stays_open(shop: Shop) -> None:
    row = row_of(shop, shop.copy_of(1, "deep/a.jpg"))
    (shop.drop / "folder.jpg").mkdir()
    gc.collect()  # what earlier tests left
    before = len(os.listdir("/proc/self/fd"))
    for name in ("deep/a.jpg", "deep/none.jpg", "x/y", "folder.jpg"):
        try:
            shown(shop, {**row, "path": str(shop.drop / name)})
        except NotShown:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
