"""Trouble around the service, made for real: it waits, says so, and loses nothing."""

import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DaemonProcess, write_image


def test_a_locked_database_is_waited_for(daemon: DaemonProcess) -> None:
    daemon.start()
    write_image(daemon.drop / "before.png", 200)
    daemon.wait_for_rows(1)
    other = sqlite3.connect(daemon.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(50):
        write_image(daemon.drop / f"{number}.png", 200)
    daemon.wait_until(lambda: "waiting until it can be written" in daemon.log.read_text())
    assert len(daemon.rows()) == 1
    other.execute("ROLLBACK")
    other.close()
    daemon.wait_for_rows(51)
    daemon.wait_until(lambda: "goes on after" in daemon.log.read_text())
    assert daemon.stop() == 0


def test_a_stop_while_the_database_is_locked_ends_it_and_the_next_start_catches_up(
    daemon: DaemonProcess,
) -> None:
    daemon.start()
    write_image(daemon.drop / "before.png", 200)
    daemon.wait_for_rows(1)
    other = sqlite3.connect(daemon.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    write_image(daemon.drop / "late.png", 200)
    daemon.wait_until(lambda: "waiting until it can be written" in daemon.log.read_text())
    assert daemon.stop() == 1
    assert "Traceback" not in daemon.log.read_text()
    other.execute("ROLLBACK")
    other.close()
    daemon.start()
    daemon.wait_for_rows(2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_waited_out(daemon: DaemonProcess, small_disk: Path) -> None:
    daemon.database = small_disk / "log.db"
    daemon.start()
    write_image(daemon.drop / "before.png", 200)
    daemon.wait_for_rows(1)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", 0) as file:
        while True:
            file.write(bytes(4096))
    for number in range(200):
        write_image(daemon.drop / f"{number}.png", 200)
    daemon.wait_until(lambda: "waiting until it can be written" in daemon.log.read_text())
    ballast.unlink()
    rows = daemon.wait_for_rows(201)
    assert len({row["path"] for row in rows}) == len(rows) == 201
    assert daemon.stop() == 0
    check = sqlite3.connect(daemon.database).execute("PRAGMA integrity_check").fetchone()
    assert check == ("ok",)
