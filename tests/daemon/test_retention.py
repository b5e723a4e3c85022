"""Old rows of no match go with their files, and only with them."""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DaemonProcess, write_image

from pic_daemon.backlog import Backlog
from pic_daemon.config import Config
from pic_daemon.folders import Folder, stamp_of
from pic_daemon.health import Health
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.model import Model, load_model
from pic_daemon.recording import Recorder
from pic_daemon.retention import Retention
from pic_daemon.scanning import scanning
from pic_daemon.service import Service


@pytest.fixture
def model(model_file: Path) -> Model:
    return load_model(model_file, "cpu")


@pytest.fixture
def log(tmp_path: Path, model: Model) -> MatchLog:
    log = MatchLog.open(tmp_path / "log.db")
    log.use_model(model)
    return log


def recorded(
    path: Path, days: float, status: str = "no-match", sha256: str = "a"
) -> Outcome:
    """The outcome, `days` ago, of the file that is at `path` now."""
    write_image(path, 40)
    stamp = stamp_of(str(path))
    assert stamp
    at = time.time() - days * 86400
    return Outcome(str(path), sha256, stamp, status, at, at, 40, 40, "PNG", 0.2, 0.5)  # type: ignore[arg-type]


def in_one_of(folders: tuple[Path, ...]) -> Callable[[str], bool]:
    return lambda path: any(path.startswith(f"{folder}/") for folder in folders)


def kept(log: MatchLog, *online: Path) -> list[str]:
    """Names in the log after a whole pass that keeps 30 days."""
    whole_pass(log, in_one_of(online))
    return names(log)


def whole_pass(
    log: MatchLog,
    online: Callable[[str], bool],
    there: Callable[[str], bool] = lambda _: True,
    days: float = 30,
) -> float:
    """Returns after how many seconds the next one is due."""
    retention, now = Retention(days), time.monotonic()
    while retention.next_due < now + 60:
        assert time.monotonic() < now + 60
        retention.step(log, online, there, now)
        time.sleep(0.001)
    return retention.next_due - now


def names(log: MatchLog) -> list[str]:
    with closing(sqlite3.connect(log.path)) as db:
        rows = db.execute("SELECT path, sha256 FROM images ORDER BY path, sha256")
        return [Path(path).stem + ("" if sha == "a" else sha) for path, sha in rows]


def test_rows_of_a_folder_within_another_stay_while_it_is_offline(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    drop = tmp_path / "drop"
    nas = drop / "nas"
    log.record([recorded(drop / "gone.png", 31), recorded(nas / "away.png", 31)], model)
    (drop / "gone.png").unlink()
    shutil.rmtree(nas)  # as if it was unmounted
    config = Config((Folder(drop), Folder(nas)), model.path, log.path)
    with scanning(config.folders, lambda _: None) as scanners:
        backlog = Backlog(Recorder(log, config, Health(60)), 0.0, lambda _: None)
        backlog.watch(scanners)
        whole_pass(log, backlog.online, backlog.there)
    assert names(log) == ["away"]


def test_a_folder_that_is_offline_is_not_looked_into(
    log: MatchLog, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.record([recorded(tmp_path / "hung" / "away.png", 31)], model)
    with monkeypatch.context() as patched:
        looked: list[object] = []
        patched.setattr(os, "lstat", looked.append)
        whole_pass(log, lambda _: False)
    assert (names(log), looked) == (["away"], [])


def test_a_folder_that_hangs_while_it_is_looked_into_keeps_nobody(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    row = recorded(tmp_path / "hung" / "gone.png", 31)
    log.record([row], model)
    Path(row.path).unlink()
    hung, retention, now = threading.Event(), Retention(30), time.monotonic()
    for _ in range(3):
        retention.step(log, lambda _: hung.wait(), lambda _: True, now)
    assert names(log) == ["gone"]
    for _ in range(1000):  # it is begun anew by another thread
        if retention.next_due >= now + 60:
            break
        now += 6
        retention.step(log, lambda _: True, lambda _: True, now)
        time.sleep(0.01)
    assert names(log) == []
    hung.set()


@pytest.mark.parametrize("status", ["match", "no-match"])
def test_a_row_that_was_written_again_since_its_file_was_missed_stays(
    log: MatchLog, model: Model, tmp_path: Path, status: str
) -> None:
    row = recorded(tmp_path / "drop" / "back.png", 31)
    log.record([row], model)
    Path(row.path).unlink()
    missed, back = threading.Event(), threading.Event()

    def there(_: str) -> bool:
        missed.set()
        return back.wait(60)

    retention, now = Retention(30), time.monotonic()
    retention.step(log, lambda _: True, there, now)
    assert missed.wait(60)
    log.record([recorded(Path(row.path), 0, status)], model)
    back.set()
    while retention.next_due < now + 60:
        assert time.monotonic() < now + 60
        retention.step(log, lambda _: True, lambda _: True, now)
        time.sleep(0.001)
    assert names(log) == ["back"]


@pytest.mark.parametrize("changed", [{"mtime_ns": 5}, {"inode": 7}])
def test_a_row_whose_file_is_back_since_it_was_missed_stays(
    log: MatchLog, model: Model, tmp_path: Path, changed: dict[str, int]
) -> None:
    row = recorded(tmp_path / "drop" / "back.png", 31)
    log.record([row], model)
    missed = log.no_matches_before(time.time(), ("", 0), 1)
    log.recognise(row.path, row.sha256, replace(row.stamp, **changed))
    assert log.delete(missed) == 0
    assert names(log) == ["back"]


def test_rows_stay_where_the_folder_went_while_it_was_looked_into(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    row = recorded(tmp_path / "drop" / "away.png", 31)
    log.record([row], model)
    Path(row.path).unlink()
    whole_pass(log, lambda _: True, lambda _: False)
    assert names(log) == ["away"]


def test_more_days_than_there_ever_were_keep_everything(log: MatchLog) -> None:
    whole_pass(log, lambda _: True, days=999_999)


def test_only_old_rows_of_no_match_whose_files_are_gone_are_deleted(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    drop = tmp_path / "drop"
    rows = [
        recorded(drop / "old-gone.png", 31),
        recorded(drop / "deep" / "old-gone-too.png", 31),
        recorded(drop / "old-there.png", 31),
        recorded(drop / "young-gone.png", 29),
        recorded(drop / "old-match-gone.png", 31, "match"),
    ]
    log.record(rows, model)
    for name in ("old-gone", "young-gone", "old-match-gone"):
        (drop / f"{name}.png").unlink()
    shutil.rmtree(drop / "deep")
    assert kept(log, drop) == ["old-match-gone", "old-there", "young-gone"]


def test_rows_of_a_folder_that_is_offline_or_not_watched_stay(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    log.record([recorded(tmp_path / "drop" / "a.png", 31)], model)
    shutil.rmtree(tmp_path / "drop")
    assert kept(log) == ["a"]
    assert kept(log, tmp_path / "dro") == ["a"]
    assert kept(log, tmp_path / "drop") == []


def test_a_name_that_holds_other_content_now_keeps_the_row_of_that_alone(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "drop" / "latest.png"
    log.record([recorded(path, 31)], model)
    os.utime(path, (1, 1))  # touched: the next scan looks for this row by its content
    assert kept(log, tmp_path / "drop") == ["latest"]
    log.record([recorded(path, 0, sha256="b")], model)
    assert kept(log, tmp_path / "drop") == ["latestb"]


def test_a_file_that_cannot_be_looked_at_keeps_its_row(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    long = recorded(tmp_path / "drop" / "a.png", 31)
    # Too long for the file system: lstat fails, though not for want of the file.
    log.record([replace(long, path=str(tmp_path / "drop" / ("x" * 300)))], model)
    assert len(kept(log, tmp_path / "drop")) == 1


def test_a_file_whose_name_is_not_utf8_keeps_its_row(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    log.record([recorded(tmp_path / "drop" / name, 31)], model)
    assert kept(log, tmp_path / "drop") == ["caf\\xe9"]


def test_a_file_whose_folder_gave_way_to_a_file_is_gone(
    log: MatchLog, model: Model, tmp_path: Path
) -> None:
    drop = tmp_path / "drop"
    log.record([recorded(drop / "deep" / "gone.png", 31)], model)
    shutil.rmtree(drop / "deep")
    (drop / "deep").touch()
    assert kept(log, drop) == []


def test_a_pass_is_made_every_hour(log: MatchLog) -> None:
    assert whole_pass(log, lambda _: True) == pytest.approx(3600)


@pytest.mark.parametrize(("silent_days", "at_once"), [(0.5, True), (2, False), (-2, False)])
def test_a_clock_that_may_have_jumped_is_given_an_hour(
    log: MatchLog, model: Model, tmp_path: Path, silent_days: float, at_once: bool
) -> None:
    log.beat({})
    with closing(sqlite3.connect(log.path)) as db:
        db.execute(
            "UPDATE heartbeat SET at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', ?)",
            [f"{-silent_days} days"],
        )
        db.commit()
    config = Config((), model.path, log.path, keep_no_match_days=30)
    service, now = Service(config, model, log), time.monotonic()
    service._take_over()
    assert (service._retention.next_due < now + 3600) == at_once


def test_many_rows_go_in_batches(log: MatchLog, model: Model, tmp_path: Path) -> None:
    one = recorded(tmp_path / "drop" / "there.png", 31)
    gone = [replace(one, path=f"{one.path}.{number}") for number in range(450)]
    log.record([*gone[:250], one, *gone[250:]], model)  # all at the same time
    assert kept(log, tmp_path / "drop") == ["there"]


def test_the_service_forgets_what_is_gone_and_classifies_nothing_twice(
    daemon: DaemonProcess,
) -> None:
    for name in ("gone", "there"):
        write_image(daemon.drop / f"{name}.png", 40)
    daemon.start()
    daemon.wait_for_rows(2)
    daemon.stop()
    with closing(sqlite3.connect(daemon.database)) as db:
        db.execute("UPDATE images SET classified_at = '2020-01-01T00:00:00.000Z'")
        db.commit()
    (daemon.drop / "gone.png").unlink()
    daemon.start("--keep-no-match-days", 1, "--rescan-seconds", 1)
    daemon.wait_until(lambda: len(daemon.rows()) == 1)
    assert "deleted 1 old rows of no match" in daemon.log.read_text()
    write_image(daemon.drop / "gone.png", 40)  # back again: a new file
    (new, old) = daemon.wait_for_rows(2)
    assert Path(str(new["path"])).stem == "gone"
    assert str(new["classified_at"]) > "2026"
    assert old["classified_at"] == "2020-01-01T00:00:00.000Z"
