"""Files that no service wants to meet: each costs its own row, and no more."""

import os
import re
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import DaemonProcess, write_image
from PIL import Image

from pic_daemon.folders import Folder


def png_claiming(width: int, height: int) -> bytes:
    """A PNG file that says it is this large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def write_readable(folder: Path) -> set[bytes]:
    """Odd files that are images all the same."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    image = Image.fromarray(noise)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    more = [image.rotate(90), image.rotate(180)]
    image.save(folder / "moving.webp", save_all=True, append_images=more)
    image.save(folder / "moving.gif", save_all=True, append_images=more)
    image.save(folder / "exif.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    image.save(folder / "is-a-png.jpg", "PNG")
    image.save(os.fsencode(folder) + b"/not-utf8-\xff\xfe.png", "PNG")
    image.save(folder / "new\nline.png")
    return {b"cmyk.jpg", b"deep.png", b"moving.webp", b"moving.gif", b"exif.jpg",
            b"is-a-png.jpg", b"not-utf8-\\xff\\xfe.png", b"new\nline.png"}  # fmt: skip


def write_unreadable(folder: Path) -> set[bytes]:
    data = write_image(folder / "whole.png", 200, side=300).read_bytes()
    (folder / "whole.png").unlink()
    contents = {
        "truncated.png": data[: len(data) // 2],
        "empty.jpg": b"",
        "text.jpg": b"no picture at all",
        "large.png": png_claiming(30_000, 30_000),
        "bomb.png": png_claiming(2**31 - 1, 2**31 - 1),
        "hollow.png": png_claiming(5_000, 5_000),
        "zeros.jpg": bytes(100_000),
        "script.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(64),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name.encode() for name in contents}


def test_each_odd_file_has_its_row_and_the_service_lives(daemon: DaemonProcess) -> None:
    outside = write_image(daemon.drop.parent / "outside.png", 200)
    (daemon.drop / "link.png").symlink_to(outside)
    (daemon.drop / "folder.jpg").mkdir()
    write_image(daemon.drop / "folder.jpg" / "inside.png", 200)
    os.mkfifo(daemon.drop / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(daemon.drop)  # socket paths are short
        server.bind("socket.jpg")
        os.chdir(here)
    if os.geteuid() == 0:
        os.mknod(daemon.drop / "device.jpg", 0o20600, os.makedev(1, 3))
    readable = write_readable(daemon.drop) | {b"inside.png"}
    unreadable = write_unreadable(daemon.drop)
    daemon.start()
    rows = daemon.wait_for_rows(len(readable) + len(unreadable))
    write_image(daemon.drop / "last.png", 200)
    rows = daemon.wait_for_rows(len(rows) + 1)

    by_name = {str(row["path"]).rsplit("/", 1)[1].encode(): row for row in rows}
    assert len(by_name) == len(rows)
    assert set(by_name) == readable | unreadable | {b"last.png"}
    failed = {name for name, row in by_name.items() if row["status"] == "failed"}
    assert failed == unreadable
    assert "exceed the limit" in str(by_name[b"large.png"]["error"])
    assert "Traceback" not in daemon.log.read_text()
    assert "crashed" not in daemon.log.read_text()


def test_a_file_that_may_not_be_read_is_tried_again_and_then_says_so(
    daemon: DaemonProcess,
) -> None:
    write_image(daemon.drop / "secret.png", 200).chmod(0)
    late = write_image(daemon.drop / "late.png", 200)
    late.chmod(0)
    # Root may read everything, but for these two rights.
    bounds = "--bounding-set=-dac_override,-dac_read_search"
    daemon.start(under=["setpriv", bounds, "--inh-caps=-all"] if os.geteuid() == 0 else [])
    daemon.wait_until(lambda: daemon.log.read_text().count("trying again in 5 s") == 2)
    late.chmod(0o600)
    rows = {Path(str(row["path"])).name: row for row in daemon.wait_for_rows(2)}
    assert rows["late.png"]["status"] == "match"
    assert rows["secret.png"]["status"] == "failed"
    assert rows["secret.png"]["error"] == "cannot be read: Permission denied"
    waits = re.findall(r"secret.*trying again in (\d+) s", daemon.log.read_text())
    assert waits == ["5", "10"]


def test_a_picture_beyond_a_workers_memory_fails_for_want_of_it(
    daemon: DaemonProcess,
) -> None:
    (daemon.drop / "huge.png").write_bytes(png_claiming(40_000, 40_000))
    daemon.start("--max-pixels", 2_000_000_000)
    (row,) = daemon.wait_for_rows(1)
    assert row["error"] == "decoding needs more memory than there is"
    write_image(daemon.drop / "next.png", 200)
    daemon.wait_for_rows(2)


@pytest.mark.skipif(
    "PIC_HOSTILE_IMAGES" not in os.environ,
    reason="PIC_HOSTILE_IMAGES names no folder of a decoder's test images",
)
def test_a_decoders_own_test_images_have_one_row_each(daemon: DaemonProcess) -> None:
    for number, path in enumerate(
        sorted(Path(os.environ["PIC_HOSTILE_IMAGES"]).rglob("*"))
    ):
        if path.is_file():
            (daemon.drop / f"{number}-{path.name}").write_bytes(path.read_bytes())
    expected = [path for path, _ in Folder(daemon.drop).scan()]
    assert expected
    daemon.start()
    daemon.wait_until(lambda: len(daemon.rows()) >= len(expected), 600)
    assert len({row["path"] for row in daemon.rows()}) == len(daemon.rows())
    assert daemon.stop() == 0
