"""What the service keeps of the files that wait."""

import queue
from contextlib import closing
from pathlib import Path

import pytest
from conftest import write_image

from pic_daemon import backlog
from pic_daemon.backlog import Backlog
from pic_daemon.config import Config
from pic_daemon.folders import Folder, stamp_of
from pic_daemon.health import Health
from pic_daemon.match_log import MatchLog
from pic_daemon.recording import Recorder
from pic_daemon.scanning import Found, Sight, scanning
from pic_daemon.watch import FileHint


def test_files_announced_beyond_what_is_kept_in_memory_are_found_by_a_scan(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "_MOST_IN_HAND", 3)
    paths = [str(write_image(tmp_path / "drop" / f"{n}.png", n)) for n in range(10)]
    config = Config((Folder(tmp_path / "drop"),), model_file, tmp_path / "log.db")
    inbox: queue.Queue[Sight] = queue.Queue()
    with (
        closing(MatchLog.open(config.database)) as log,
        scanning(config.folders, inbox.put) as scanners,
    ):
        waiting = Backlog(Recorder(log, config, Health(60)), 0.0, lambda _: None)
        waiting.watch(scanners)
        for path in paths:
            stamp = stamp_of(path)
            assert stamp
            waiting.heed(FileHint(path, stamp, complete=True))
        assert len(waiting) == 3
        chosen, _ = waiting.choose(room=100)
        for path in chosen:
            waiting.let_go(path)
        assert not waiting.done()
        assert waiting.choose(room=100) == ([], False)  # a scan is asked for
        found = inbox.get(timeout=10)
        assert isinstance(found, Found)
        waiting.heed(found)
        chosen, _ = waiting.choose(room=100)
    assert sorted(chosen) == sorted(paths)
