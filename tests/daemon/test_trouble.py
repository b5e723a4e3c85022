"""Trouble around the service, made for real: it waits, says so, and loses nothing."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import (
    INFO,
    SIZE,
    DaemonProcess,
    hung_mount,
    mounted,
    write_image,
    write_model,
)
from PIL import Image

from pic_daemon.folders import stamp_of
from pic_daemon.match_log import MatchLog
from pic_daemon.setting_aside import set_aside

Run = Callable[..., subprocess.CompletedProcess[str]]


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


def test_a_log_whose_tables_are_gone_is_not_waited_for(daemon: DaemonProcess) -> None:
    daemon.start()
    with closing(sqlite3.connect(daemon.database)) as other:
        other.execute("DROP INDEX failed_by_path")
    write_image(daemon.drop / "late.png", 200)
    assert daemon.wait_for_end() == 1
    assert "no such index: failed_by_path" in daemon.log.read_text()


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
    # Room for the write-ahead log, which grows to 4 MiB before it is used anew.
    with mounted(Path("none"), folder, "-t", "tmpfs", "-o", "size=8m"):
        yield folder


def filled(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", 0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_full_disk_is_waited_out(daemon: DaemonProcess, small_disk: Path) -> None:
    daemon.database = small_disk / "log.db"
    daemon.start()
    write_image(daemon.drop / "before.png", 200)
    daemon.wait_for_rows(1)
    ballast = filled(small_disk)
    for number in range(200):
        write_image(daemon.drop / f"{number}.png", 200)
    daemon.wait_until(lambda: "waiting until it can be written" in daemon.log.read_text())
    ballast.unlink()
    rows = daemon.wait_for_rows(201)
    assert len({row["path"] for row in rows}) == len(rows) == 201
    assert daemon.stop() == 0
    check = sqlite3.connect(daemon.database).execute("PRAGMA integrity_check").fetchone()
    assert check == ("ok",)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slow") / "slow.png"
    Image.new("L", (13_000, 13_000), 200).save(path, compress_level=1)
    return path


@pytest.fixture
def slow(large: Path, tmp_path: Path) -> Path:
    """A picture that takes seconds to decode."""
    return Path(shutil.copy(large, tmp_path))


def workers(daemon: DaemonProcess) -> list[int]:
    """Processes that decode: grandchildren of the service, through the forkserver."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        parents[int(process.name)] = int(parent)
    return [pid for pid, above in parents.items() if parents.get(above) == daemon.pid]


def signal_busy_worker(daemon: DaemonProcess, number: int) -> bool:
    """Send a signal to the worker that is decoding; returns whether one was."""
    for pid in workers(daemon):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        if pages * 4096 > 150 << 20:
            os.kill(pid, number)
            return True
    return False


def test_a_decoder_that_crashes_twice_costs_its_file_a_failed_row_and_no_more(
    daemon: DaemonProcess, slow: Path
) -> None:
    daemon.start("--workers", 1)
    write_image(daemon.drop / "first.png", 200)
    daemon.wait_for_rows(1)
    slow.rename(daemon.drop / "slow.png")
    daemon.wait_until(lambda: signal_busy_worker(daemon, signal.SIGKILL))
    daemon.wait_until(lambda: daemon.in_hand() == {"slow.png": 1})
    daemon.wait_until(lambda: signal_busy_worker(daemon, signal.SIGKILL))
    write_image(daemon.drop / "last.png", 200)
    rows = {Path(str(row["path"])).name: row for row in daemon.wait_for_rows(3)}
    assert rows["slow.png"]["status"] == "failed"
    assert rows["slow.png"]["error"] == "decoding crashed its worker process"
    assert rows["first.png"]["status"] == rows["last.png"]["status"] == "match"
    assert daemon.in_hand() == {}
    assert daemon.stop() == 0


@pytest.mark.parametrize("running", [True, False])
def test_the_strike_of_a_file_that_is_gone_is_put_away(
    daemon: DaemonProcess, slow: Path, running: bool
) -> None:
    daemon.start("--workers", 1)
    slow = slow.rename(daemon.drop / "slow.png")
    daemon.wait_until(lambda: signal_busy_worker(daemon, signal.SIGKILL))
    daemon.wait_until(lambda: daemon.in_hand() == {"slow.png": 1})
    if running:
        slow.unlink()
    else:
        daemon.stop()
        slow.unlink()
        daemon.start()
    daemon.wait_until(lambda: daemon.in_hand() == {})
    assert daemon.rows() == []


def test_a_decoder_that_hangs_is_ended_and_its_file_tried_again(
    daemon: DaemonProcess, slow: Path
) -> None:
    daemon.start("--workers", 1, "--decode-seconds", 10)
    slow.rename(daemon.drop / "slow.png")
    daemon.wait_until(lambda: signal_busy_worker(daemon, signal.SIGSTOP))
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "no-match"  # nearly uniform
    assert "decoding took longer than 10 s; trying again in 5 s" in daemon.log.read_text()


def test_a_worker_killed_while_idle_is_replaced(daemon: DaemonProcess) -> None:
    daemon.start("--workers", 1)
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    idle = workers(daemon)
    assert idle
    for pid in idle:
        os.kill(pid, signal.SIGKILL)
    for number in range(20):
        write_image(daemon.drop / f"{number}.png", 200)
    rows = daemon.wait_for_rows(21)
    assert {row["status"] for row in rows} == {"match"}
    assert daemon.stop() == 0


def test_a_new_model_takes_over_and_garbage_does_not(daemon: DaemonProcess) -> None:
    daemon.start()
    write_image(daemon.drop / "a.png", 200)
    (first,) = daemon.wait_for_rows(1)
    daemon.model.write_bytes(b"garbage")
    daemon.reload()
    daemon.wait_until(lambda: "goes on serving" in daemon.log.read_text())
    write_image(daemon.drop / "b.png", 200)
    assert daemon.wait_for_rows(2)[1]["model"] == first["model"]

    stricter = replace(INFO, threshold=0.9)
    write_model(daemon.model.with_name("new.onnx"), stricter.to_metadata()).replace(
        daemon.model
    )
    daemon.wait_until(lambda: "now serving model" in daemon.log.read_text())  # by itself
    write_image(daemon.drop / "c.png", 200)
    rows = daemon.wait_for_rows(3)
    assert rows[2]["model"] != first["model"]
    assert [row["status"] for row in rows] == ["match", "match", "no-match"]


def test_no_file_goes_without_its_row_while_models_of_other_sizes_are_swapped(
    daemon: DaemonProcess,
) -> None:
    daemon.start()
    for swap in range(4):
        for number in range(60):  # several batches, some read before the swap
            write_image(daemon.drop / f"{swap}-{number}.png", 200, side=300)
        other = replace(INFO, input_size=(32, SIZE)[swap % 2], training_run=str(swap))
        name = daemon.model.with_name("new.onnx")
        write_model(name, other.to_metadata(), other.input_size).replace(daemon.model)
        daemon.reload()
    rows = daemon.wait_for_rows(240)
    assert {row["status"] for row in rows} == {"match"}
    daemon.wait_until(lambda: "now serving model" in daemon.log.read_text())
    assert "ERROR" not in daemon.log.read_text()


def test_recorded_images_are_scored_again_under_the_present_model(
    daemon: DaemonProcess, run_tool: Run
) -> None:
    daemon.start()
    for number in range(5):
        write_image(daemon.drop / f"{number}.png", 200)
    before = daemon.wait_for_rows(5)
    write_model(daemon.model, replace(INFO, threshold=0.9).to_metadata())
    daemon.reload()
    daemon.wait_until(lambda: "now serving model" in daemon.log.read_text())
    result = run_tool("pic-daemon", "reclassify", "--database", daemon.database)
    assert re.fullmatch(
        r"5 images will be scored again, as far as they are there "
        r"\(present model: [0-9a-f]{12}, at .*Z\)\n",
        result.stdout,
    )
    daemon.reload()
    daemon.wait_until(lambda: {row["status"] for row in daemon.rows()} == {"no-match"})
    after = daemon.rows()
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert after[0]["model"] != before[0]["model"]


def test_failed_images_are_tried_again_when_asked(
    daemon: DaemonProcess, run_tool: Run
) -> None:
    write_image(daemon.drop / "large.png", 20, side=1_200)
    daemon.start("--max-pixels", 1_000_000)
    (row,) = daemon.wait_for_rows(1)
    assert row["status"] == "failed"
    daemon.stop()
    result = run_tool("pic-daemon", "retry", "--database", daemon.database)
    assert (
        result.stdout == "1 failed images will be tried again, as far as they are there\n"
    )
    daemon.start()
    daemon.wait_until(lambda: daemon.rows()[0]["status"] == "no-match")


def test_a_full_disk_at_the_start_is_no_fault_of_the_settings(
    daemon: DaemonProcess,
    small_disk: Path,
    run_tool: Run,
) -> None:
    daemon.database = small_disk / "log.db"
    daemon.start()
    assert daemon.stop() == 0
    filled(small_disk)
    result = run_tool(
        "pic-daemon", "run", "--watch", daemon.drop, "--model", daemon.model,
        "--database", daemon.database,
    )  # fmt: skip
    assert result.returncode == 1  # with 2, systemd would not try again
    assert "Traceback" not in result.stderr


def test_no_room_for_another_file_at_the_start_passes_too(
    daemon: DaemonProcess,
    tmp_path: Path,
    run_tool: Run,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(Path("none"), disk, "-t", "tmpfs", "-o", "nr_inodes=6"):
        daemon.database = disk / "log.db"
        daemon.start()
        assert daemon.stop() == 0
        with suppress(OSError):
            for number in range(6):
                (disk / str(number)).touch()
        result = run_tool(
            "pic-daemon", "run", "--watch", daemon.drop, "--model", daemon.model,
            "--database", daemon.database,
        )  # fmt: skip
    assert (result.returncode, "unable to open" in result.stderr) == (1, True)


def test_what_cannot_be_set_aside_leaves_no_half_behind(
    tmp_path: Path, small_disk: Path
) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(bytes(10 << 20))
    stamp = stamp_of(str(path))
    assert stamp
    with pytest.raises(OSError, match="No space left"):
        set_aside(str(path), stamp, small_disk)
    assert list(small_disk.iterdir()) == [] and path.exists()


def test_a_read_only_database_is_named_at_the_start(
    daemon: DaemonProcess,
    small_disk: Path,
    run_tool: Run,
) -> None:
    daemon.database = small_disk / "log.db"
    daemon.start()
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    daemon.stop()
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    service = "--watch", daemon.drop, "--model", daemon.model
    result = run_tool("pic-daemon", "run", *service, "--database", daemon.database)
    assert result.returncode == 2
    assert f"database {daemon.database}: {small_disk} is not writable" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("left", ["", "-wal", "-shm", ".lock"])
def test_what_another_account_left_is_named_before_the_start(
    left: str, daemon: DaemonProcess, tmp_path: Path, run_here: Run
) -> None:
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    for folder in (daemon.drop, *daemon.drop.parents):
        if not folder.stat().st_mode & 0o001:  # pytest's own are root's alone
            folder.chmod(0o755)
    daemon.database = tmp_path / "state" / "log.db"
    daemon.database.parent.mkdir()
    daemon.model.chmod(0o644)
    MatchLog.open(daemon.database).close()
    check = ["pic-daemon", "check", "--watch", daemon.drop, "--model", daemon.model]
    assert run_here(*check, "--database", daemon.database).returncode == 0  # root may
    foreign = Path(f"{daemon.database}{left}")
    foreign.touch()
    for path in (daemon.database.parent, *daemon.database.parent.iterdir()):
        os.chown(path, 65534, 65534)
    os.chown(foreign, 0, 0)
    if not (child := os.fork()):
        try:
            signal.alarm(60)
            os.setuid(65534)  # the child must not come back into pytest
            result = run_here(*check, "--database", daemon.database)
            said = f"database {daemon.database}: {foreign} is not writable" in result.stderr
            os._exit(result.returncode if said else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


@contextmanager
def ext4_disk(home: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A disk of its own, and what makes the kernel find a fault: then it is read-only."""
    image, folder = home / "disk.img", home / "ext4"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)]
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("an ext4 of its own needs root, mkfs.ext4 and a loop device")
    try:
        device = Path(
            f"/sys/dev/block/{os.major(dev := folder.stat().st_dev)}:{os.minor(dev)}"
        )
        fault = Path("/sys/fs/ext4") / device.resolve().name / "trigger_fs_error"
        if not fault.exists():
            pytest.skip("this kernel cannot be told to find a fault")
        yield folder, lambda: fault.write_text("a test")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_becomes_read_only_is_waited_for_and_nothing_is_lost(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with ext4_disk(tmp_path) as (disk, find_fault):
        daemon.database = disk / "log.db"
        daemon.start()
        write_image(daemon.drop / "before.png", 200)
        daemon.wait_for_rows(1)
        find_fault()
        write_image(daemon.drop / "late.png", 200)
        waits = "waiting until it can be written"
        daemon.wait_until(lambda: waits in daemon.log.read_text())
        assert daemon.stop() == 1
        assert "Traceback" not in daemon.log.read_text()
    remount = ["mount", "-o", "loop", str(tmp_path / "disk.img"), str(disk)]
    subprocess.run(["fsck.ext4", "-fy", str(tmp_path / "disk.img")], capture_output=True)
    subprocess.run(remount, check=True)
    try:
        daemon.start()
        assert len(daemon.wait_for_rows(2)) == 2
        assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_failed_files_are_moved_where_asked_and_may_come_back(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "bad.png").write_text("an earlier one")
    daemon.start("--failed-folder", failed)
    daemon.lay("bad.png")
    write_image(daemon.drop / "good.png", 200)
    daemon.wait_for_rows(2)
    daemon.wait_until(lambda: (failed / "bad-1.png").exists())
    assert [path.name for path in daemon.drop.iterdir()] == ["good.png"]
    moved = f"; moved to {failed}/bad-1.png"
    daemon.wait_until(lambda: str(daemon.rows()[0]["error"]).endswith(moved))
    (failed / "bad-1.png").rename(daemon.drop / "bad.png")  # a new file again
    daemon.wait_until(lambda: (failed / "bad-1.png").exists())
    assert daemon.log.read_text().count("failed path=") == 2
    daemon.wait_until(lambda: daemon.log.read_text().count("moved path=") == 2)
    assert len(daemon.rows()) == 2
    assert str(daemon.rows()[0]["error"]).count("; moved to ") == 1
    (daemon.drop / "half.png").write_text("an upload that pauses")
    daemon.wait_for_rows(3)
    assert daemon.stop() == 0
    assert (daemon.drop / "half.png").exists()


def test_what_failed_before_there_was_a_folder_for_it_is_moved_by_the_next_scan(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    failed, elsewhere, late = (tmp_path / name for name in ("failed", "elsewhere", "late"))
    for folder in (failed, elsewhere, late):
        folder.mkdir()
    left = daemon.lay("bad.png").rename(elsewhere / "left.png")
    daemon.lay("bad.png").rename(late / "late.png")
    daemon.lay("bad.png")
    excluded = daemon.lay("excluded.gif", "no picture of another kind")
    daemon.start("--watch", elsewhere, "--watch", late)
    daemon.wait_for_rows(4)
    fresh = daemon.drop / "fresh.png"
    fresh.write_text("no picture either")
    daemon.wait_for_rows(5)
    daemon.stop(signal.SIGKILL)
    late.rename(tmp_path / "unmounted")
    config = tmp_path / "daemon.toml"
    config.write_text(
        f'failed_folder = "{failed}"\n[[watch]]\npath = "{late}"\n'
        f'[[watch]]\npath = "{daemon.drop}"\nexclude = ["*.gif"]\n'
    )
    daemon.start("--config", config, watch=False)
    daemon.wait_until(lambda: (failed / "bad.png").exists())
    (tmp_path / "unmounted").rename(late)
    daemon.wait_until(lambda: (failed / "late.png").exists())
    assert daemon.stop() == 0
    assert left.exists()  # its folder is not watched any more
    assert excluded.exists()
    assert fresh.exists()  # somebody may still be writing to it
    moved = [row for row in daemon.rows() if "; moved to " in str(row["error"])]
    assert len(moved) == 2


def test_a_failed_file_whose_time_was_changed_is_moved_all_the_same(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    failed = tmp_path / "failed"
    failed.mkdir()
    daemon.start("--failed-folder", failed, "--rescan-seconds", 1)
    bad = daemon.drop / "bad.png"
    bad.write_text("no picture")
    daemon.wait_for_rows(1)
    os.utime(bad, (1e9, 1e9))
    daemon.wait_until(lambda: (failed / "bad.png").exists())
    assert len(daemon.rows()) == 1


def test_a_failed_folder_that_is_not_there_is_said_and_holds_nothing_up(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    failed = tmp_path / "failed"
    daemon.start("--failed-folder", failed)
    assert f"failed_folder {failed} does not exist" in daemon.log.read_text()
    daemon.lay("bad.png")
    daemon.wait_until(lambda: "cannot be moved" in daemon.log.read_text())
    failed.mkdir()
    daemon.lay("worse.png", "no picture either")
    daemon.wait_until(lambda: (failed / "worse.png").exists())
    assert daemon.stop() == 0


def test_workers_that_a_mount_holds_for_ever_are_left_behind(
    daemon: DaemonProcess, slow: Path, tmp_path: Path
) -> None:
    hung = tmp_path / "hung"
    hung.mkdir()
    config = tmp_path / "daemon.toml"
    tables = (f'[[watch]]\npath = "{folder}"\n' for folder in (daemon.drop, hung))
    config.write_text("".join(tables))
    daemon.start("--config", config, "--workers", 1, watch=False)
    write_image(daemon.drop / "first.png", 200)
    daemon.wait_for_rows(1)
    # What waits behind a slow picture is read when the mount hangs already.
    slow.rename(hung / "slow.png")
    write_image(tmp_path / "next.png", 200).rename(hung / "next.png")
    daemon.wait_until(lambda: "next.png" in daemon.in_hand())
    with hung_mount(hung, served=True):
        late = write_image(daemon.drop / "late.png", 200)
        daemon.wait_until(lambda: str(late) in {row["path"] for row in daemon.rows()})
        assert "worker processes do not come back" in daemon.log.read_text()
    rows = {Path(str(row["path"])).name: row for row in daemon.wait_for_rows(4)}
    assert rows["late.png"]["status"] == rows["next.png"]["status"] == "match"
    assert daemon.in_hand() == {}
    assert daemon.stop() == 0


def test_a_failed_folder_that_hangs_holds_nothing_up(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    failed = tmp_path / "failed"
    failed.mkdir()
    with hung_mount(failed):
        daemon.start("--failed-folder", failed)
        daemon.lay("bad.png")
        daemon.wait_for_rows(1)
        write_image(daemon.drop / "good.png", 200)
        daemon.wait_for_rows(2)
        assert daemon.stop() == 0
    assert "they stay where they are" in daemon.log.read_text()
    assert (daemon.drop / "bad.png").exists()


def test_a_file_that_only_waits_when_the_service_stops_is_not_blamed_at_the_next_start(
    daemon: DaemonProcess,
) -> None:
    daemon.start("--settle-seconds", 3600)
    (daemon.drop / "half.png").write_text("no picture, yet")
    daemon.wait_until(lambda: "half.png" in daemon.in_hand())  # read once, and waits
    write_image(daemon.drop / "good.png", 200)
    daemon.wait_for_rows(1)
    assert daemon.stop() == 0
    assert daemon.in_hand() == {}
    daemon.start()
    assert "was in hand" not in daemon.log.read_text()
