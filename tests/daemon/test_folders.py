import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import write_image

from pic_daemon.folders import Folder, mount_of, stamp_of, text_of
from pic_daemon.setting_aside import set_aside


def names(folder: Folder) -> set[str]:
    return {os.path.relpath(path, folder.path) for path, _ in folder.scan()}


def test_images_are_found_by_name_whatever_the_case(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.PNG", "c.txt", ".hidden.jpg", "d.jpg.part", "sub/e.webp"):
        write_image(tmp_path / "x.png", 25).rename(path := tmp_path / "x")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path.rename(tmp_path / name)
    assert names(Folder(tmp_path)) == {"a.jpg", "b.PNG", "sub/e.webp"}
    assert names(Folder(tmp_path, recursive=False)) == {"a.jpg", "b.PNG"}
    assert names(Folder(tmp_path, include=("*.txt",))) == {"c.txt"}
    assert names(Folder(tmp_path, exclude=("SUB", "a*"))) == {"b.PNG", ".hidden.jpg"}


def test_wants_agrees_with_scan(tmp_path: Path) -> None:
    folder = Folder(tmp_path, recursive=False)
    assert folder.wants(str(tmp_path / "a.jpg"))
    assert not folder.wants(str(tmp_path / "sub" / "a.jpg"))
    assert not folder.wants(str(tmp_path.parent / "a.jpg"))
    assert not Folder(tmp_path).wants(str(tmp_path / ".trash" / "a.jpg"))


def test_links_pipes_and_folders_named_like_images_are_no_files(tmp_path: Path) -> None:
    outside = write_image(tmp_path / "outside" / "real.png", 25)
    drop = tmp_path / "drop"
    (drop / "x.jpg").mkdir(parents=True)
    (drop / "link.png").symlink_to(outside)
    (drop / "tree").symlink_to(outside.parent)
    os.mkfifo(drop / "pipe.png")
    assert names(Folder(drop)) == set()
    assert stamp_of(str(drop / "link.png")) is None


def test_a_folder_that_vanished_holds_nothing(tmp_path: Path) -> None:
    assert names(Folder(tmp_path / "gone")) == set()


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    beyond = str(tmp_path / ("x" * 300))  # as root may read everything else
    assert list(Folder(tmp_path).walk(beyond, lambda path, _: told.append(path))) == []
    assert told == [beyond]


def test_a_file_with_the_longest_name_is_set_aside_beside_another(tmp_path: Path) -> None:
    (tmp_path / "failed").mkdir()
    name = f"{'ü' * 125}n.jpg"  # of 255 bytes
    for number in range(12):
        path = tmp_path / name
        path.write_bytes(bytes([number]))
        stamp = stamp_of(str(path))
        assert stamp and set_aside(str(path), stamp, tmp_path / "failed")
    moved = list((tmp_path / "failed").iterdir())
    assert sorted(path.read_bytes()[0] for path in moved) == [*range(12)]
    assert {path.suffix for path in moved} == {".jpg"}


def test_a_file_is_set_aside_on_another_file_system_too(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system at hand")
    path = str(write_image(tmp_path / "a.png", 25))
    stamp = stamp_of(path)
    assert stamp
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        moved = set_aside(path, stamp, Path(folder))
        assert moved == Path(folder) / "a.png" and moved.stat().st_size == stamp.bytes
        assert os.listdir(folder) == ["a.png"]
    assert stamp_of(path) is None


def test_a_file_that_cannot_be_taken_away_is_not_copied_again_and_again(
    tmp_path: Path,
) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system at hand")
    path = write_image(tmp_path / "a.png", 25)
    stamp = stamp_of(str(path))
    assert stamp
    if subprocess.run(["chattr", "+i", str(path)], capture_output=True).returncode:
        pytest.skip("a file that nobody may remove needs root and a file system for it")
    try:
        with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
            with pytest.raises(OSError, match="not permitted"):
                set_aside(str(path), stamp, Path(folder))
            assert os.listdir(folder) == []
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)
    assert path.exists()


def test_a_name_that_is_not_utf8_becomes_readable_text() -> None:
    assert text_of(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"
    assert text_of("café.jpg") == "café.jpg"


def test_the_file_system_is_named() -> None:
    assert mount_of(Path("/proc")).type == "proc"
