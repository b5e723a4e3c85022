import os
from pathlib import Path

import pytest

from pic_daemon.folders import FileStamp, stamp_of
from pic_daemon.reading import Reading, read_bytes


@pytest.mark.parametrize("length", [1000, 2000, 10])
def test_what_is_written_to_while_it_is_read_has_no_content(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"a" * 1000)
    os.utime(path, (0, 0))
    of = FileStamp.of

    def written_once_looked_at(status: os.stat_result) -> FileStamp:
        if not status.st_mtime:
            path.write_bytes(b"b" * length)
        return of(status)

    monkeypatch.setattr(FileStamp, "of", written_once_looked_at)
    reading, data = read_bytes(str(path))
    assert reading == Reading(str(path), stamp_of(str(path)), changed=True)
    assert data == b""


def test_a_folder_under_a_pictures_name_costs_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        reading, data = read_bytes(str(tmp_path))
        assert (data, reading.sha256) == (b"", "")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_regular_file_any_more_has_no_stamp(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "link.png").symlink_to("a.png")
    for path in (tmp_path, tmp_path / "link.png"):
        reading, _ = read_bytes(str(path))
        assert reading.stamp is None
        assert reading.transient and "cannot be read" in str(reading.error)
