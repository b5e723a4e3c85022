"""The service as a real process on real folders."""

import os
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import DaemonProcess, write_image, write_model
from PIL import Image


def statuses(rows: list[dict[str, object]]) -> dict[str, object]:
    return {Path(str(row["path"])).name: row["status"] for row in rows}


def test_a_new_image_gets_its_row(daemon: DaemonProcess) -> None:
    daemon.start()
    write_image(daemon.drop / "white.png", 230)
    write_image(daemon.drop / "black.png", 25)
    rows = daemon.wait_for_rows(2)
    assert statuses(rows) == {"white.png": "match", "black.png": "no-match"}
    assert [round(float(str(row["score"])), 2) for row in rows] == [0.1, 0.9]
    assert all(float(str(row["latency_ms"])) > 0 for row in rows)


def test_what_arrived_while_it_was_down_is_found_and_nothing_is_done_twice(
    daemon: DaemonProcess,
) -> None:
    for number in range(100):
        write_image(daemon.drop / "deep" / f"{number}.png", number)
    daemon.start()
    before = daemon.wait_for_rows(100)
    assert daemon.stop() == 0
    write_image(daemon.drop / "late.png", 250)
    daemon.start()
    after = daemon.wait_for_rows(101)
    assert daemon.stop() == 0
    assert [row for row in after if "late" not in str(row["path"])] == before


def test_touching_a_file_does_not_classify_it_again(daemon: DaemonProcess) -> None:
    path = write_image(daemon.drop / "a.png", 9)
    daemon.start()
    (before,) = daemon.wait_for_rows(1)
    path.write_bytes(path.read_bytes())  # same content, new time, closed after writing
    write_image(daemon.drop / "b.png", 200)
    after = daemon.wait_for_rows(2)[0]
    daemon.wait_until(lambda: daemon.rows()[0]["mtime_ns"] == path.stat().st_mtime_ns)
    assert after["classified_at"] == before["classified_at"]
    assert len(daemon.rows()) == 2


def test_a_file_from_the_far_future_gets_its_row_and_is_known(
    daemon: DaemonProcess,
) -> None:
    path = write_image(daemon.drop / "a.png", 9)
    year_2300 = 10_413_792_000 * 10**9
    os.utime(path, ns=(year_2300, year_2300))
    if path.stat().st_mtime_ns != year_2300:
        pytest.skip("this file system cannot hold such a time")
    daemon.start()
    before = daemon.wait_for_rows(1)
    assert daemon.stop() == 0
    daemon.start()
    write_image(daemon.drop / "b.png", 200)
    assert daemon.wait_for_rows(2)[0] == before[0]


def test_other_content_under_the_same_name_is_another_row(daemon: DaemonProcess) -> None:
    daemon.start()
    path = write_image(daemon.drop / "a.png", 25)
    daemon.wait_for_rows(1)
    write_image(path, 230)
    rows = daemon.wait_for_rows(2)
    assert [row["status"] for row in rows] == ["no-match", "match"]


def test_other_content_under_the_same_stamp_is_another_row(daemon: DaemonProcess) -> None:
    # As where a file is written and closed again before the file system's clock ticks.
    daemon.start()
    path = write_image(daemon.drop / "a.bmp", 10)
    daemon.wait_for_rows(1)
    other = write_image(daemon.database.parent / "other.bmp", 200).read_bytes()
    before = path.stat()
    with path.open("r+b") as file:
        file.write(other)
        file.flush()
        os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    rows = daemon.wait_for_rows(2)
    assert [row["status"] for row in rows] == ["no-match", "match"]


def test_a_slowly_written_file_is_read_when_it_is_complete(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    data = write_image(tmp_path / "x.png", 230, side=400).read_bytes()
    daemon.start("--settle-seconds", 2)
    with (daemon.drop / "slow.png").open("wb") as file:
        for start in range(0, len(data), len(data) // 5):
            file.write(data[start : start + len(data) // 5])
            file.flush()
            time.sleep(0.15)
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "match"


def test_a_file_closed_half_written_is_not_failed_for_it(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    data = write_image(tmp_path / "x.png", 230, side=400).read_bytes()
    daemon.start("--settle-seconds", 2)
    path = daemon.drop / "twice.png"
    path.write_bytes(data[: len(data) // 2])
    time.sleep(0.5)
    path.write_bytes(data)
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "match"


def test_files_renamed_and_folders_moved_in_are_found(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    daemon.start()
    write_image(tmp_path / "outside" / "moved.png", 230)
    (tmp_path / "outside" / "moved.png").rename(daemon.drop / "moved.png")
    write_image(tmp_path / "tree" / "a" / "b" / "nested.png", 230)
    (tmp_path / "tree").rename(daemon.drop / "tree")
    temporary = daemon.drop / "renamed.png.part"
    write_image(tmp_path / "z.png", 230).rename(temporary)
    temporary.rename(daemon.drop / "renamed.png")
    write_image(daemon.drop / ".incoming" / "shown.png", 230)
    (daemon.drop / ".incoming").rename(daemon.drop / "incoming")
    # A hard link into the folder from elsewhere is announced, but never closed.
    (daemon.drop / "link.png").hardlink_to(write_image(tmp_path / "b.png", 230))
    expected = ["link.png", "moved.png", "nested.png", "renamed.png", "shown.png"]
    assert statuses(daemon.wait_for_rows(5)) == dict.fromkeys(expected, "match")


def test_a_file_moved_in_from_another_file_system_is_found(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system at hand")
    daemon.start()
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        shutil.move(write_image(Path(folder) / "a.png", 230), daemon.drop / "a.png")
    assert statuses(daemon.wait_for_rows(1)) == {"a.png": "match"}


def test_a_hard_link_is_found_without_a_rescan(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    daemon.start()
    (daemon.drop / "link.png").hardlink_to(write_image(tmp_path / "a.png", 230))
    assert statuses(daemon.wait_for_rows(1)) == {"link.png": "match"}
    assert len(daemon.rows()) == 1


def test_an_archive_unpacked_with_its_old_times_is_complete(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for number in range(60):
            path = write_image(tmp_path / "x.png", number + 1, side=200)
            os.utime(path, (1e9, 1e9))  # old enough to count as settled at once
            archive.add(path, f"{number % 7}/deep/{number}.png")
    daemon.start()
    subprocess.run(["tar", "-xf", tmp_path / "all.tar", "-C", daemon.drop], check=True)
    rows = daemon.wait_for_rows(60)
    assert {row["status"] for row in rows} == {"no-match"}
    assert len({row["path"] for row in rows}) == len(rows) == 60


def test_a_file_that_failed_half_written_is_one_row_again_when_it_is_completed(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    data = write_image(tmp_path / "x.png", 230, side=400).read_bytes()
    daemon.start()
    path = daemon.drop / "late.png"
    path.write_bytes(data[: len(data) // 2])
    assert daemon.wait_for_rows(1)[0]["status"] == "failed"
    with path.open("ab") as file:
        file.write(data[len(data) // 2 :])
    daemon.wait_until(lambda: daemon.rows()[0]["status"] == "match")
    assert len(daemon.rows()) == 1


def test_a_tree_copied_while_watches_are_still_being_made_is_complete(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    for number in range(150):
        write_image(tmp_path / "s" / str(number % 10) / "x" / f"{number}.png", number)
    daemon.start()
    shutil.copytree(tmp_path / "s", daemon.drop / "s")
    assert len(daemon.wait_for_rows(150)) == 150


def test_a_bad_file_costs_only_its_own_row(daemon: DaemonProcess) -> None:
    Image.effect_noise((300, 300), 90).save(daemon.drop / "cut.jpg")
    (daemon.drop / "cut.jpg").write_bytes((daemon.drop / "cut.jpg").read_bytes()[:5000])
    (daemon.drop / "empty.png").touch()
    (daemon.drop / "words.gif").write_text("not a picture")
    write_image(daemon.drop / "good.png", 230)
    daemon.start()
    rows = daemon.wait_for_rows(4)
    reasons = {Path(str(row["path"])).name: row["error"] for row in rows}
    assert "truncated" in str(reasons["cut.jpg"])
    assert reasons["empty.png"] == "the file is empty"
    assert "not an image" in str(reasons["words.gif"])
    assert statuses(rows)["good.png"] == "match"


def test_a_blank_picture_never_matches_and_the_row_says_why(daemon: DaemonProcess) -> None:
    write_image(daemon.drop / "blank.png", 255)  # by its score alone a sure match
    daemon.start()
    (row,) = daemon.wait_for_rows(1)
    assert (row["status"], row["score"]) == ("no-match", 0.0)
    assert row["error"] == "nearly uniform picture: nothing to recognise"


def test_sigint_and_sigterm_finish_cleanly(daemon: DaemonProcess) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        daemon.start()
        assert daemon.stop(number) == 0


def test_files_that_no_event_announces_are_found_by_the_rescan(
    daemon: DaemonProcess,
) -> None:
    write_image(daemon.drop / "a.png", 230)
    daemon.start("--rescan-seconds", 1)
    daemon.wait_for_rows(1)
    with closing(sqlite3.connect(daemon.database)) as log, log:
        log.execute("DELETE FROM images")  # the file is there, and nobody knows it
    assert statuses(daemon.wait_for_rows(1)) == {"a.png": "match"}


def test_a_model_is_named_in_every_row(daemon: DaemonProcess, tmp_path: Path) -> None:
    write_image(daemon.drop / "a.png", 230)
    daemon.start()
    daemon.wait_for_rows(1)
    daemon.stop()
    metadata = write_model(tmp_path / "other.onnx").read_bytes()
    daemon.model = tmp_path / "second.onnx"
    daemon.model.write_bytes(metadata + b"\x12\x00")  # the same graph, another hash
    write_image(daemon.drop / "b.png", 230)
    daemon.start()
    first, second = daemon.wait_for_rows(2)
    assert first["model"] != second["model"]
