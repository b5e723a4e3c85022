"""Watched folders that go away, hang, change or say nothing: they are scanned again."""

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from conftest import DaemonProcess, hung_mount, mounted, write_image


def test_a_folder_that_announces_nothing_is_polled(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    config = tmp_path / "daemon.toml"
    config.write_text(
        f'[[watch]]\npath = "{daemon.drop}"\nmode = "poll"\npoll_seconds = 0.3\n'
    )
    daemon.start("--config", config, watch=False)
    write_image(daemon.drop / "deep" / "a.png", 200)
    daemon.wait_for_rows(1)
    assert inotify_watches(daemon) == 0


def inotify_watches(daemon: DaemonProcess) -> int:
    count = 0
    for info in Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed since
            count += info.read_text().count("inotify wd:")
    return count


def test_a_folder_deleted_and_made_again_is_watched_again(daemon: DaemonProcess) -> None:
    daemon.start()
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    shutil.rmtree(daemon.drop)
    daemon.wait_until(lambda: "is offline" in daemon.log.read_text())
    daemon.drop.mkdir()
    write_image(daemon.drop / "b.png", 200)
    daemon.wait_for_rows(2)
    daemon.wait_until(lambda: "is back" in daemon.log.read_text())
    assert inotify_watches(daemon) == 1
    write_image(daemon.drop / "c.png", 200)
    daemon.wait_for_rows(3)


def test_another_file_system_over_the_folder_means_offline(daemon: DaemonProcess) -> None:
    daemon.start()
    write_image(daemon.drop / "ours.png", 200)
    daemon.wait_for_rows(1)
    with mounted(Path("none"), daemon.drop, "-t", "tmpfs", "-o", "size=1m"):
        daemon.wait_until(lambda: "is offline" in daemon.log.read_text())
        write_image(daemon.drop / "foreign.png", 200)
        daemon.reload()  # scans what is online
        time.sleep(3)  # longer than the file would need to settle and be recorded
    write_image(daemon.drop / "late.png", 200)
    daemon.wait_until(lambda: "is back" in daemon.log.read_text())
    names = [Path(str(row["path"])).name for row in daemon.wait_for_rows(2)]
    assert sorted(names) == ["late.png", "ours.png"]


@contextmanager
def lowered(limit: Path, value: int) -> Iterator[None]:
    """A sysctl at this value; a shell puts it back, even if these tests are killed."""
    before = limit.read_text().strip()
    put_back = ["sh", "-c", 'read _; echo "$0" > "$1"', before, str(limit)]
    guard = subprocess.Popen(put_back, stdin=subprocess.PIPE, start_new_session=True)
    try:
        limit.write_text(str(value))
        if limit.read_text().strip() != str(value):
            pytest.skip(f"{limit} cannot be lowered here")
        yield
    except PermissionError:
        pytest.skip(f"lowering {limit} needs root")
    finally:
        guard.communicate()


def test_an_unmounted_folder_is_offline_and_nothing_is_done_again_when_it_returns(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    for number in range(5):
        write_image(disk / f"{number}.png", 200)
    with mounted(disk, daemon.drop):
        daemon.start()
        before = daemon.wait_for_rows(5)
    write_image(daemon.drop / "under-the-mount.png", 200)
    daemon.wait_until(lambda: "is offline" in daemon.log.read_text())
    write_image(disk / "meanwhile.png", 200)
    with mounted(disk, daemon.drop):
        daemon.wait_until(lambda: "is back" in daemon.log.read_text())
        after = daemon.wait_for_rows(6)
        assert after[:5] == before
        assert str(after[5]["path"]).endswith("meanwhile.png")
        assert daemon.stop() == 0


def classified_long_ago(daemon: DaemonProcess, disk: Path) -> None:
    """One picture on a disk that is not mounted any more."""
    write_image(disk / "first.png", 10)
    with mounted(disk, daemon.drop):
        daemon.start()
        (row,) = daemon.wait_for_rows(1)
        assert row["status"] == "no-match"
        assert daemon.stop() == 0
    with closing(sqlite3.connect(daemon.database)) as db, db:
        db.execute("UPDATE images SET classified_at = '2020-01-01T00:00:00.000Z'")


def test_a_start_while_the_disk_is_not_mounted_waits_for_it(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    classified_long_ago(daemon, disk)
    daemon.start("--keep-no-match-days", 30)
    assert "is offline" in daemon.log.read_text()
    write_image(disk / "second.png", 10)
    with mounted(disk, daemon.drop):
        rows = daemon.wait_for_rows(2)
        assert [Path(str(row["path"])).name for row in rows] == ["first.png", "second.png"]
        assert rows[0]["classified_at"] == "2020-01-01T00:00:00.000Z"
        assert daemon.stop() == 0


def test_rows_outlive_a_missing_disk_though_something_lies_in_its_mount_point(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    classified_long_ago(daemon, disk)
    write_image(daemon.drop / "stray.png", 10)
    daemon.start("--keep-no-match-days", 30)
    daemon.wait_for_rows(2)
    assert "which is missing; the rows of its files are kept" in daemon.log.read_text()
    write_image(disk / "second.png", 10)
    with mounted(disk, daemon.drop):
        rows = daemon.wait_for_rows(3)
        names = [Path(str(row["path"])).name for row in rows]
        assert sorted(names) == ["first.png", "second.png", "stray.png"]
        assert rows[0]["classified_at"] == "2020-01-01T00:00:00.000Z"  # the very row
        assert daemon.stop() == 0


def test_a_restart_while_a_folder_is_gone_goes_on_without_it(
    daemon: DaemonProcess,
    tmp_path: Path,
    run_tool: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    daemon.start("--watch", other)
    assert daemon.stop() == 0
    other.rmdir()
    daemon.start("--watch", other)
    assert "other is offline" in daemon.log.read_text()
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    write_image(other / "b.png", 200)
    daemon.wait_for_rows(2)
    assert daemon.stop() == 0
    refused = run_tool(
        "pic-daemon", "run", "--watch", daemon.drop, "--watch", tmp_path / "otter",
        "--model", daemon.model, "--database", daemon.database,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "otter does not exist or is no folder" in refused.stderr


@pytest.mark.alone
def test_where_watches_run_out_the_folder_is_polled_and_the_remedy_is_said(
    daemon: DaemonProcess,
) -> None:
    for number in range(40):
        (daemon.drop / str(number)).mkdir()
    with lowered(Path("/proc/sys/fs/inotify/max_user_watches"), 20):
        daemon.start()
    assert "raise fs.inotify.max_user_watches with sysctl" in daemon.log.read_text()
    write_image(daemon.drop / "7" / "a.png", 200)
    daemon.wait_for_rows(1)


def flood(daemon: DaemonProcess, files: int, then: str = "") -> None:
    """Make so many files, and a picture, while the service stands still."""
    os.kill(daemon.pid, signal.SIGSTOP)
    state = Path(f"/proc/{daemon.pid}/stat")
    daemon.wait_until(lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "T")
    first = daemon.drop / "flood-0.txt"
    first.touch()
    for number in range(1, files):
        os.link(first, daemon.drop / f"flood-{number}.txt")
    if then:
        write_image(daemon.drop / then, 200)
    os.kill(daemon.pid, signal.SIGCONT)


def test_events_that_the_kernel_dropped_are_made_good_by_a_scan(
    daemon: DaemonProcess,
) -> None:
    room = Path("/proc/sys/fs/inotify/max_queued_events")
    if not room.exists():
        pytest.skip("no inotify here")
    daemon.start()
    # Twice as many as fit: its threads may have taken some before they stood still.
    flood(daemon, 2 * int(room.read_text()), then="unheard.png")
    daemon.wait_for_rows(1)
    assert "the kernel dropped file events" in daemon.log.read_text()


def test_a_mount_that_hangs_holds_up_no_other_folder_and_loses_nothing(
    daemon: DaemonProcess,
    tmp_path: Path,
    run_tool: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    polled, announced = tmp_path / "polled", tmp_path / "announced"
    config = tmp_path / "daemon.toml"
    config.write_text(
        f'[[watch]]\npath = "{daemon.drop}"\n[[watch]]\npath = "{announced}"\n'
        f'[[watch]]\npath = "{polled}"\nmode = "poll"\npoll_seconds = 0.1\n'
    )
    for folder in (polled, announced):
        write_image(folder / "before.png", 200)
    daemon.start("--config", config, "--settle-seconds", 2, watch=False)
    daemon.wait_for_rows(2)
    for folder in (polled, announced):
        # Not settled yet, so that they are to be looked at again while it hangs.
        (folder / "link.png").hardlink_to(write_image(tmp_path / "a.png", 25))
    time.sleep(0.5)
    with hung_mount(polled), hung_mount(announced):
        for number in range(5):
            write_image(daemon.drop / f"{number}.png", 200)
        daemon.wait_for_rows(7)
        for folder in (polled, announced):
            says = f"folder {folder} does not answer"
            daemon.wait_until(lambda says=says: says in daemon.log.read_text())
        write_image(daemon.drop / "late.png", 200)
        daemon.wait_for_rows(8)
        status = ("pic-daemon", "status", "--database", daemon.database)
        daemon.wait_until(lambda: str(polled) in run_tool(*status).stdout)
        assert run_tool(*status).returncode == 1
    write_image(polled / "after.png", 200)
    rows = daemon.wait_for_rows(11)
    assert len({row["path"] for row in rows}) == len(rows) == 11
    assert {row["status"] for row in rows} == {"match", "no-match"}
    log = daemon.log.read_text()
    assert log.count("does not answer") == log.count("answers again") == 2
    assert daemon.stop() == 0


def test_a_mount_that_hangs_at_the_start_is_offline_until_it_answers(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    hung = tmp_path / "hung"
    write_image(hung / "a.png", 200)
    write_image(daemon.drop / "b.png", 200)
    config = tmp_path / "daemon.toml"
    tables = (f'[[watch]]\npath = "{folder}"\n' for folder in (daemon.drop, hung))
    config.write_text("".join(tables))
    with hung_mount(hung):
        daemon.start("--config", config, watch=False)
        daemon.wait_for_rows(1)
        assert f"folder {hung} does not answer; it is offline" in daemon.log.read_text()
    rows = daemon.wait_for_rows(2)
    assert [Path(str(row["path"])).name for row in rows] == ["b.png", "a.png"]
    assert daemon.stop() == 0


def test_a_folder_that_is_shut_is_offline_and_heard_of_once_it_is_opened(
    daemon: DaemonProcess,
) -> None:
    bounds = "--bounding-set=-dac_override,-dac_read_search"
    # Root without these rights may be shut out as anybody.
    under = ["setpriv", bounds, "--inh-caps=-all"] if os.geteuid() == 0 else []
    daemon.start(under=under)
    daemon.drop.chmod(0)
    daemon.wait_until(lambda: "is offline" in daemon.log.read_text())
    assert daemon.stop() == 0
    daemon.start(under=under)  # it was watched before
    assert "is offline" in daemon.log.read_text()
    daemon.drop.chmod(0o755)
    daemon.wait_until(lambda: "is back" in daemon.log.read_text())
    write_image(daemon.drop / "a.png", 200)
    daemon.wait_for_rows(1)
    daemon.wait_until(lambda: inotify_watches(daemon) == 1)
    write_image(daemon.drop / "b.png", 200)
    daemon.wait_for_rows(2)


@pytest.mark.alone
def test_one_flood_in_more_folders_than_the_queue_holds_is_no_more_than_one(
    daemon: DaemonProcess,
) -> None:
    for number in range(400):
        (daemon.drop / str(number)).mkdir()
    with lowered(Path("/proc/sys/fs/inotify/max_queued_events"), 100):
        daemon.start()
    flood(daemon, 1000, then="late/a.png")
    daemon.wait_for_rows(1)
    daemon.wait_until(lambda: inotify_watches(daemon) == 402)
    time.sleep(1)  # taking the watches away may be one more
    said = daemon.log.read_text().count("the kernel dropped file events")
    assert said >= 1
    time.sleep(3)
    assert daemon.log.read_text().count("the kernel dropped file events") == said
    write_image(daemon.drop / "late" / "b.png", 200)
    daemon.wait_for_rows(2)
