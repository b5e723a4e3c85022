"""The watch on a folder: what it hears of, and what it survives."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import mounted

from pic_daemon import watch
from pic_daemon.folders import Folder
from pic_daemon.inotify_limits import _inotify_of, instances_left, watches_left
from pic_daemon.watch import FileHint, FolderWatch

Watched = tuple[FolderWatch, Path, list[FileHint]]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    drop = tmp_path / "drop"
    drop.mkdir()
    hints: list[FileHint] = []
    found = FolderWatch(Folder(drop), hints.append, lambda _: None)
    assert found.look()
    yield found, drop, hints
    found.end()


THIS = Path("/proc/self")


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def inotify_watches() -> int:
    """How many this process holds."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        info = Path("/proc/self/fdinfo", number)
        if info.exists():
            count += info.read_text().count("inotify wd:")
    return count


def hears_of_a_new_file(watched: Watched, name: str) -> bool:
    _, drop, hints = watched
    (drop / name).write_bytes(b"x")
    until(lambda: any(hint.path.endswith(name) for hint in hints))
    return True


def move_away(found: FolderWatch, folder: Path, to: Path) -> None:
    """Returns once watchdog has waited in vain for the other half of the move."""
    found._handler.moved_away = False
    folder.rename(to)
    until(lambda: found._handler.moved_away)


@pytest.mark.parametrize("order", ["12", "21"])
def test_sub_folders_moved_away_and_deleted_there_do_not_end_it(
    watched: Watched, tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, drop, _ = watched
    held = inotify_watches()
    for day in (1, 2):
        (drop / "batch").mkdir()
        until(lambda: inotify_watches() == held + day)  # noqa: B023
        move_away(found, drop / "batch", tmp_path / str(day))
    (drop / "batch").mkdir()
    (drop / "batch").rmdir()
    for name in order:
        shutil.rmtree(tmp_path / name)
        assert hears_of_a_new_file(watched, f"{name}.jpg")
    monkeypatch.setattr(found, "_renew_at", 0.0)
    assert found.look()
    assert hears_of_a_new_file(watched, "newer.jpg")


def test_sub_folders_moved_away_are_not_watched_for_ever(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, drop, _ = watched
    held = inotify_watches()
    (drop / "batch").mkdir()
    until(lambda: inotify_watches() == held + 1)
    move_away(found, drop / "batch", tmp_path / "archive")
    assert not found.look()  # not at every one that goes
    monkeypatch.setattr(found, "_renew_at", 0.0)
    assert found.look()
    assert inotify_watches() == held
    assert not found.look()
    assert hears_of_a_new_file(watched, "new.jpg")


def test_a_disk_mounted_again_between_two_looks_is_watched_anew(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    subprocess.run(["truncate", "-s", "4M", disk], check=True)
    if not shutil.which("mkfs.ext4"):
        pytest.skip("making a file system needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    drop = tmp_path / "drop"
    drop.mkdir()
    hints: list[FileHint] = []
    found = FolderWatch(Folder(drop), hints.append, lambda _: None)
    with mounted(disk, drop, "-o", "loop"):
        assert found.look()
    with mounted(disk, drop, "-o", "loop"):
        until(found.look)
        assert hears_of_a_new_file((found, drop, hints), "new.jpg")
        found.end()


def test_an_empty_folder_whose_disk_was_mounted_when_last_seen_is_offline(
    tmp_path: Path,
) -> None:
    disk, drop = tmp_path / "disk", tmp_path / "drop"
    disk.mkdir()
    drop.mkdir()
    found = FolderWatch(Folder(drop), lambda _: None, lambda _: None, str(drop))
    assert not found.look() and not found.online
    with mounted(disk, drop):
        assert found.look() and found.online
        found.end()
    moved_here = FolderWatch(Folder(drop), lambda _: None, lambda _: None, str(drop))
    (drop / "a.jpg").write_bytes(b"x")
    assert moved_here.look() and moved_here.online
    assert moved_here.mount_point == str(drop)  # whose rows are kept
    with mounted(disk, drop):
        assert moved_here.look() and moved_here.online
    assert not moved_here.look() and not moved_here.online
    moved_here.end()


def test_a_sub_folder_that_could_not_be_watched_is_tried_once_it_is_opened(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _, _ = watched
    sub = tmp_path / "sub"  # shut, as far as root can have it: it is not there
    assert found._observer
    (emitter,) = found._observer.emitters
    # As watchdog keeps what the kernel refused (test_offline has a folder that is shut).
    emitter._inotify._active_callbacks_by_path[bytes(sub)] = -1  # type: ignore[attr-defined]
    monkeypatch.setattr(found, "_renew_at", 0.0)
    assert not found.look()  # still shut
    sub.mkdir()
    assert found.look()
    assert not found.look()
    assert hears_of_a_new_file(watched, "new.jpg")


def test_a_folder_that_goes_while_it_is_walked_is_watched_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    found = FolderWatch(Folder(tmp_path), lambda _: None, lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(watch, "watches_needed", gone)
        assert not found.look() and not found.online
    assert found.look() and found.online and not found.polled
    found.end()


def test_a_long_walk_is_told_from_a_disk_that_hangs(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).mkdir()
    told: list[int] = []
    found = FolderWatch(
        Folder(tmp_path), lambda _: None, lambda _: None, progress=lambda: told.append(1)
    )
    assert found.look()
    found.end()
    assert len(told) > 20


AUTOMOUNT = """
import fcntl, os, struct, subprocess, sys
disk, folder = sys.argv[1:]
reading, writing = os.pipe()
os.setpgid(0, 0)  # who mounts is told by its group
options = f"fd={writing},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
mount = ["mount", "-t", "autofs", "-o", options, "auto", folder]
if subprocess.run(mount, pass_fds=[writing], capture_output=True).returncode:
    sys.exit("no automount here")
os.close(writing)
root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
print("ready", flush=True)
while asked := os.read(reading, 304):  # auto_fs.h, autofs_v5_packet
    subprocess.run(["mount", "--bind", disk, folder], check=True)
    fcntl.ioctl(root, 0x9360, struct.unpack_from("I", asked, 8)[0])  # AUTOFS_IOC_READY
"""


def test_a_folder_that_is_mounted_when_it_is_used_is_online(tmp_path: Path) -> None:
    disk, drop = tmp_path / "disk", tmp_path / "drop"
    disk.mkdir()
    drop.mkdir()
    command = [sys.executable, "-c", AUTOMOUNT, disk, drop]
    mounting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert mounting.stdout
    if not mounting.stdout.readline():
        pytest.skip("an automount point needs root, and a kernel with autofs")
    try:
        hints: list[FileHint] = []
        found = FolderWatch(Folder(drop), hints.append, lambda _: None)
        assert found.look()
        assert not found.look() and found.online
        (disk / "new.jpg").write_bytes(b"x")
        until(lambda: bool(hints))
        found.end()
    finally:
        for _ in range(2):  # what it mounted, and itself
            subprocess.run(["umount", "--lazy", str(drop)], capture_output=True)
        mounting.kill()
        mounting.communicate()


def test_each_watched_folder_holds_an_inotify_instance_with_its_watches(
    watched: Watched, tmp_path: Path
) -> None:
    (tmp_path / "second" / "sub").mkdir(parents=True)
    second = FolderWatch(Folder(tmp_path / "second"), lambda _: None, lambda _: None)
    assert second.look()
    held = [info.count("inotify wd:") for info in _inotify_of(THIS)]
    assert sorted(held) == [1, 2]
    # A number that is free, as that of the listing of them is once it is over.
    gap = os.dup(2)
    third = FolderWatch(Folder(tmp_path / "second"), lambda _: None, lambda _: None)
    assert third.look()
    os.close(gap)
    assert len(list(_inotify_of(THIS))) == 3
    third.end()
    second.end()


def test_what_watches_the_folders_asked_about_is_not_counted_as_taken(
    watched: Watched,
) -> None:
    _, drop, _ = watched
    for left in (watches_left, instances_left):
        # Services of other tests come and go meanwhile.
        until(lambda: (left([Folder(drop)]) or 0) > (left() or 0))  # noqa: B023


def test_inotify_of_another_users_processes_is_not_counted(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(_inotify_of(THIS))
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    assert not list(_inotify_of(THIS))
