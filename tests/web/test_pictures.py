"""Which files a picture may be made of."""

import gc
import os
import sqlite3
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pictures import product
from PIL import Image, ImageColor
from shop import Shop

from pic_daemon.folders import text_of
from pic_daemon.match_log import STALE
from pic_daemon.web import pictures, queries
from pic_daemon.web.pictures import NotShown, place, read, read_beneath, smaller


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "shop")


def row_of(shop: Shop, path: Path) -> dict[str, Any]:
    shop.log._db.conn.row_factory = sqlite3.Row
    (row,) = shop.log._db.query("SELECT * FROM images WHERE path = ?", [str(path)])
    return row


def shown(shop: Shop, row: dict[str, Any]) -> bytes:
    folders = queries.watched(shop.log._db.conn)
    return smaller(read(row, "dropped", *place(row, "dropped", folders, None)), 256)


def of_catalog(row: dict[str, Any], catalog: Path | None) -> bytes:
    return smaller(read(row, "catalog", *place(row, "catalog", [], catalog)), 256)


def test_a_recorded_picture_in_a_watched_folder_is_shown(shop: Shop) -> None:
    row = row_of(shop, shop.copy_of(1, "deep/er/a.jpg"))
    assert shown(shop, row).startswith(b"\xff\xd8")
    marked = {**row, "mtime_ns": STALE}  # to be read again: still what was recorded
    assert shown(shop, marked).startswith(b"\xff\xd8")


def test_the_same_bytes_are_shown_whenever_they_were_written(shop: Shop) -> None:
    path = shop.copy_of(1, "a.jpg")
    row = row_of(shop, path)
    os.utime(path)  # as a copy or a restored backup is
    assert shown(shop, row).startswith(b"\xff\xd8")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(NotShown, match="changed since"):
        shown(shop, row)


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
        of_catalog({**row, "catalog_item": step}, shop.catalog)


def test_a_path_of_its_own_is_never_taken_for_one_in_the_catalog(shop: Shop) -> None:
    row = row_of(shop, shop.copy_of(1, "a.jpg"))
    assert of_catalog(row, shop.catalog).startswith(b"\xff\xd8")
    absolute = str(shop.drop / "a.jpg")
    for item, catalog in (
        (absolute, shop.catalog),
        ("product-00001.jpg", None),
        (None, None),
    ):
        with pytest.raises(NotShown):
            of_catalog({**row, "catalog_item": item}, catalog)


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
        of_catalog({**row, "catalog_item": "link.jpg"}, shop.catalog)


def test_another_file_under_the_recorded_name_is_not_shown(shop: Shop) -> None:
    path = shop.copy_of(1, "a.jpg")
    row = row_of(shop, path)
    product(2).save(path)
    with pytest.raises(NotShown, match="changed since"):
        shown(shop, row)
    path.unlink()
    with pytest.raises(NotShown, match="no longer there"):
        shown(shop, row)


def test_other_bytes_of_the_same_size_and_time_are_not_decoded(shop: Shop) -> None:
    path = shop.copy_of(1, "a.jpg")
    row = row_of(shop, path)
    path.write_bytes(bytes(row["bytes"]))
    os.utime(path, ns=(row["mtime_ns"], row["mtime_ns"]))
    with pytest.raises(NotShown, match="changed since"):
        shown(shop, row)


def test_a_name_that_is_not_utf_8_is_said_to_be_one(shop: Shop) -> None:
    path = shop.copy_of(1, "a.jpg")
    row = row_of(shop, path)
    renamed = path.rename(shop.drop / os.fsdecode(b"\xe4.jpg"))
    with pytest.raises(NotShown, match="its name is not UTF-8"):
        shown(shop, {**row, "path": text_of(str(renamed))})


@pytest.mark.parametrize("reason", ["no answer", "too large or not an image"])
def test_a_reason_in_place_of_a_picture_can_be_read(reason: str) -> None:
    drawn = ElementTree.fromstring(pictures.instead(reason))
    (ground,), (text,), lines = (
        drawn.findall(f".//{{*}}{name}") for name in ("rect", "text", "tspan")
    )
    assert " ".join(line.text or "" for line in lines) == reason
    assert contrast(ground.attrib["fill"], text.attrib["fill"]) >= 4.5  # WCAG 2, level AA
    width = int(drawn.attrib["viewBox"].split()[2])
    size = int(text.attrib["font-size"])
    assert size * 120 / width >= 12  # pixels, in a list
    assert all(len(line.text or "") * 0.55 * size <= width for line in lines)


def contrast(one: str, other: str) -> float:
    def light(color: str) -> float:
        values = (value / 255 for value in ImageColor.getrgb(color))  # without an alpha
        r, g, b = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values
        )
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    darker, lighter = sorted([light(one), light(other)])
    return (lighter + 0.05) / (darker + 0.05)


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
        of_catalog(row, shop.catalog)


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
