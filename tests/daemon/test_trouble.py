"""Trouble around the service, made for real: it waits, says so, and loses nothing."""

import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DaemonProcess, write_image
from PIL import Image


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


def write_slow_image(path: Path) -> Path:
    """A picture that takes seconds to decode."""
    Image.new("L", (13_000, 13_000), 200).save(path, compress_level=1)
    return path


def signal_decoder(number: int) -> bool:
    """Send a signal to the worker process that is decoding; returns whether one was."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            pages = int((process / "statm").read_text().split()[1])
        except OSError:
            continue
        if b"forkserver" in command and pages * 4096 > 150 << 20:
            os.kill(int(process.name), number)
            return True
    return False


def test_a_decoder_that_crashes_twice_costs_its_file_a_failed_row_and_no_more(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    slow = write_slow_image(tmp_path / "slow.png")
    daemon.start("--workers", 1)
    write_image(daemon.drop / "first.png", 200)
    daemon.wait_for_rows(1)
    slow.rename(daemon.drop / "slow.png")
    daemon.wait_until(lambda: signal_decoder(signal.SIGKILL))
    daemon.wait_until(lambda: daemon.in_hand() == {"slow.png": 1})
    daemon.wait_until(lambda: signal_decoder(signal.SIGKILL))
    write_image(daemon.drop / "last.png", 200)
    rows = {Path(str(row["path"])).name: row for row in daemon.wait_for_rows(3)}
    assert rows["slow.png"]["status"] == "failed"
    assert rows["slow.png"]["error"] == "decoding crashed its worker process"
    assert rows["first.png"]["status"] == rows["last.png"]["status"] == "match"
    assert daemon.in_hand() == {}
    assert daemon.stop() == 0


def test_a_decoder_that_hangs_is_ended_and_its_file_tried_again(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    slow = write_slow_image(tmp_path / "slow.png")
    daemon.start("--workers", 1, "--decode-seconds", 20)
    slow.rename(daemon.drop / "slow.png")
    daemon.wait_until(lambda: signal_decoder(signal.SIGSTOP))
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "no-match"  # nearly uniform
    assert "decoding took longer than 20 s; trying once more" in daemon.log.read_text()


def test_a_worker_killed_while_idle_is_replaced(daemon: DaemonProcess) -> None:
    daemon.start("--workers", 1)
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            above = (Path("/proc") / parent / "cmdline").read_bytes()
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"forkserver" in command and b"forkserver" in above:
            os.kill(int(process.name), signal.SIGKILL)
    for number in range(20):
        write_image(daemon.drop / f"{number}.png", 200)
    rows = daemon.wait_for_rows(21)
    assert {row["status"] for row in rows} == {"match"}
    assert daemon.stop() == 0
