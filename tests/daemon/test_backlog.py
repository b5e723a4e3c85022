"""What the service keeps of the files that wait, and in which order it takes them."""

import math
import os
import queue
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SIZE, DaemonProcess, write_image
from sqlite_utils import Database

from pic_daemon import backlog, service, setting_aside
from pic_daemon.backlog import Backlog, InHand
from pic_daemon.config import Config
from pic_daemon.decoding import Decoders
from pic_daemon.folders import FileStamp, Folder, stamp_of
from pic_daemon.health import Health
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.model import load_model
from pic_daemon.reading import Reading, read_image
from pic_daemon.recording import Recorder
from pic_daemon.scanning import Found, Scanner, SeenAgain, Sight, scanning
from pic_daemon.schema import Status
from pic_daemon.service import Service
from pic_daemon.setting_aside import Mover, SetAside, set_aside
from pic_daemon.watch import FileHint, HintsLost


def test_files_announced_beyond_what_is_kept_in_memory_are_found_by_a_scan(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "_MOST_HELD", 3)
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
            waiting.heed(FileHint(path, stamp, True, Path()))
        assert len(waiting) == 3
        chosen, _ = waiting.choose(room=100)
        for path in chosen:
            waiting.let_go(path)
        assert not waiting.done()
        assert waiting.choose(room=100) == ([], False)  # a scan is asked for
        found = inbox.get(timeout=10)
        assert isinstance(found, Found)
        waiting.heed(found)
        while more := waiting.choose(room=100)[0]:
            chosen += more
            for path in more:
                waiting.let_go(path)
    assert sorted(set(chosen)) == sorted(paths)


@contextmanager
def backlog_of(
    tmp_path: Path, model_file: Path, *folders: Folder
) -> Iterator[tuple[Backlog, list[Scanner]]]:
    config = Config(folders, model_file, tmp_path / "log.db")
    with (
        closing(MatchLog.open(config.database)) as log,
        scanning(config.folders, lambda _: None) as scanners,
    ):
        waiting = Backlog(Recorder(log, config, Health(60)), 2.0, lambda _: None)
        waiting.watch(scanners)
        yield waiting, scanners


def found_in(scanner: Scanner, count: int, mtime: float) -> Found:
    stamp = FileStamp(1, int(mtime * 1e9), 1)
    paths = [os.path.join(scanner.within, f"{n}.png") for n in range(count)]
    return Found(scanner, deque((path, stamp) for path in paths))


def test_a_file_closed_again_while_it_is_read_is_read_once_more(
    tmp_path: Path, model_file: Path
) -> None:
    folder = Folder(tmp_path / "drop", mode="poll")
    folder.path.mkdir()
    # Written just now: what is not known to be complete would wait first.
    path, stamp = str(folder.path / "a.png"), FileStamp(1, time.time_ns(), 1)
    with backlog_of(tmp_path, model_file, folder) as (waiting, _):
        waiting.heed(FileHint(path, stamp, True, folder.path))
        assert waiting.choose(room=10)[0] == [path]
        waiting.heed(FileHint(path, stamp, True, folder.path))  # its stamp as before
        waiting.heed(FileHint(path, stamp, False, folder.path))
        waiting.let_go(path)
        assert waiting.choose(room=10)[0] == [path]
        # A folder around it hears of the same that its own has told of.
        for complete, heard_in in ((False, folder.path), (True, tmp_path)):
            waiting.heed(FileHint(path, stamp, complete, heard_in))
        waiting.let_go(path)
        assert waiting.choose(room=10)[0] == []


def test_a_file_closed_while_its_unfinished_state_was_read_does_not_wait(
    tmp_path: Path, model_file: Path
) -> None:
    folder = Folder(tmp_path / "drop", mode="poll")
    folder.path.mkdir()
    path = str(folder.path / "a.png")
    half, whole = (FileStamp(n, time.time_ns(), 1) for n in (1, 2))
    with backlog_of(tmp_path, model_file, folder) as (waiting, _):
        for closed, chosen in ((True, [path]), (False, [])):
            waiting.heed(FileHint(path, half, True, folder.path))
            assert waiting.choose(room=10)[0] == [path]
            waiting.heed(FileHint(path, whole, closed, folder.path))
            waiting.wait_again(path, half)
            assert waiting.choose(room=10)[0] == chosen
            if chosen:
                waiting.let_go(path)


def test_a_busy_folder_does_not_keep_others_waiting(
    tmp_path: Path, model_file: Path
) -> None:
    busy, quiet = (Folder(tmp_path / name, mode="poll") for name in ("busy", "quiet"))
    for folder in (busy, quiet):
        folder.path.mkdir()
    with backlog_of(tmp_path, model_file, busy, quiet) as (waiting, scanners):
        for number in range(1000):
            path = str(busy.path / f"announced-{number}.png")
            waiting.heed(FileHint(path, FileStamp(1, number, 1), True, busy.path))
        (scanner,) = (s for s in scanners if s.folder == quiet)
        assert not waiting.scanning()
        waiting.heed(found_in(scanner, 1000, mtime=1))
        chosen, _ = waiting.choose(room=100)
        assert waiting.scanning()
    assert len([path for path in chosen if path.startswith(scanner.within)]) == 50


def test_files_of_tomorrow_do_not_fill_the_memory(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "_MOST_HELD", 10)
    monkeypatch.setattr(backlog, "_SCAN_STEP", 5)
    folder = Folder(tmp_path / "drop", mode="poll")
    folder.path.mkdir()
    with backlog_of(tmp_path, model_file, folder) as (waiting, scanners):
        waiting.heed(found_in(scanners[0], 1000, mtime=time.time() + 86400))
        while waiting.choose(room=100)[1]:
            pass
        assert len(waiting) == 10
        assert waiting.scanning()


def test_a_folder_whose_files_do_not_settle_keeps_no_other_waiting(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "_MOST_HELD", 10)
    full, other = (Folder(tmp_path / name, mode="poll") for name in ("full", "other"))
    for folder in (full, other):
        folder.path.mkdir()
    with backlog_of(tmp_path, model_file, full, other) as (waiting, scanners):
        by_name = {scanner.folder.path.name: scanner for scanner in scanners}
        tomorrow = time.time() + 86400
        waiting.heed(found_in(by_name["full"], 20, mtime=tomorrow))
        assert waiting.choose(room=100)[0] == []
        waiting.heed(found_in(by_name["other"], 3, mtime=1))
        assert len(waiting.choose(room=100)[0]) == 3


def test_an_upload_that_went_on_after_its_file_was_chosen_is_waited_for(
    tmp_path: Path, model_file: Path
) -> None:
    path = write_image(tmp_path / "drop" / "large.png", 200, side=400)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    os.utime(path, (1e9, 1e9))  # it paused long ago
    stamp = stamp_of(str(path))
    assert stamp
    config = Config((Folder(tmp_path / "drop"),), model_file, tmp_path / "log.db")
    with (
        closing(MatchLog.open(config.database)) as log,
        scanning(config.folders, lambda _: None) as scanners,
    ):
        service = Service(config, load_model(model_file, "cpu"), log)
        service._backlog.watch(scanners)
        for goes_on in (False, True):
            service._backlog.heed(Found(scanners[0], deque([(str(path), stamp)])))
            assert service._backlog.choose(room=10)[0] == [str(path)]
            if goes_on:
                path.write_bytes(whole[: len(whole) * 3 // 4])
            service._sort(read_image(str(path), SIZE))
            assert len(service._batch) == (0 if goes_on else 1)
            if not goes_on:  # it is no picture, and would be recorded so
                service._backlog.let_go(service._batch.pop().path)
        assert len(service._backlog) == 1 and not service._backlog.in_hand


ALWAYS_WRITING = """
import os, sys
camera, picture = sys.argv[1:]
data = open(picture, "rb").read()
while True:
    with open(camera + ".part", "wb") as part:
        part.write(data)
    os.rename(camera + ".part", camera)
"""


@contextmanager
def camera(folder: Path) -> Iterator[None]:
    """A picture there is always replaced by the next."""
    folder.mkdir(exist_ok=True)
    picture = write_image(folder.parent / "picture.png", 200)
    command = [sys.executable, "-c", ALWAYS_WRITING, folder / "camera.png", picture]
    with subprocess.Popen(command) as writing:
        try:
            yield
        finally:
            writing.kill()


def test_a_file_that_never_stands_still_is_read_as_it_is(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    config = tmp_path / "daemon.toml"
    table = f'[[watch]]\npath = "{daemon.drop}"\nmode = "poll"\npoll_seconds = 1\n'
    config.write_text(table)
    daemon.start("--config", config, "--settle-seconds", 0.1, watch=False)
    with camera(daemon.drop):
        (row,) = daemon.wait_for_rows(1)
        assert (Path(str(row["path"])).name, row["status"]) == ("camera.png", "match")


def test_a_single_pass_ends_although_files_are_always_written_to(
    tmp_path: Path, model_file: Path
) -> None:
    folders = (Folder(tmp_path / "archive", mode="poll", poll_seconds=math.inf),)
    config = Config(folders, model_file, tmp_path / "log.db", settle_seconds=0.1)
    with closing(MatchLog.open(config.database)) as log, camera(folders[0].path):
        running = Service(config, load_model(model_file, "cpu"), log, until_done=True)
        running.run()
        (row,) = Database(config.database)["images"].rows
        assert row["status"] == "match"

        path, stamp = row["path"], FileStamp(1, 1, 1)
        for settled, wanted in (
            (True, None),
            (False, "was written to whenever it was read"),
        ):
            running._backlog.in_hand[path] = InHand(0.0, stamp, settled)
            running._sort(Reading(path, FileStamp(2, 2, 1), changed=True))
            errors = [reading.error for reading in running._batch]
            assert errors == ([wanted] if wanted else [])
        # Nothing is known of one whose worker was left behind.
        waiting, path = len(running._backlog), f"{path}-2"
        running._backlog.in_hand[path] = InHand(0.0, stamp, settled=False)
        running._sort(Reading(path, None, changed=True))
        assert path not in running._backlog.in_hand
        assert (len(running._backlog), running.gone) == (waiting + 1, 0)


def test_a_stop_is_heeded_while_folders_are_looked_at_for_the_first_time(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def slow(_: Folder, progress: Callable[[], None]) -> int:
        for _ in range(600):
            time.sleep(0.1)
            progress()
        ended.append(True)
        return 1

    monkeypatch.setattr("pic_daemon.watch.watches_needed", slow)
    (tmp_path / "drop").mkdir()
    config = Config((Folder(tmp_path / "drop"),), model_file, tmp_path / "log.db")
    with closing(MatchLog.open(config.database)) as log:
        running = Service(config, load_model(model_file, "cpu"), log)
        running.stop()
        running.run()
    assert not ended


def test_where_a_server_tells_the_times_a_young_file_must_stand_still(
    tmp_path: Path, model_file: Path
) -> None:
    folder = Folder(tmp_path / "drop", mode="poll")
    folder.path.mkdir()
    with backlog_of(tmp_path, model_file, folder) as (waiting, scanners):
        # By a clock that is 30 s behind this is of just now.
        waiting.heed(found_in(scanners[0], 1, mtime=time.time() - 30))
        assert waiting.choose(room=100)[0] == []
        assert len(waiting) == 1


def test_a_file_that_comes_anew_while_it_is_looked_for_is_not_forgotten(
    tmp_path: Path, model_file: Path
) -> None:
    folder = Folder(tmp_path / "drop", mode="poll")
    folder.path.mkdir()
    with backlog_of(tmp_path, model_file, folder) as (waiting, _):
        path, now = str(folder.path / "a.png"), time.time_ns()
        first, second = FileStamp(1, now, 1), FileStamp(2, now, 2)
        waiting.heed(FileHint(path, first, False, Path()))
        waiting.heed(FileHint(path, second, False, Path()))
        waiting.heed(SeenAgain([(path, first, None)]))
        assert len(waiting) == 1
        waiting.heed(SeenAgain([(path, second, None)]))
        assert len(waiting) == 0


def test_hints_beyond_what_fits_while_the_database_takes_nothing_cost_a_scan(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_MOST_MESSAGES", 10)
    drop = tmp_path / "drop"
    drop.mkdir()
    config = Config((Folder(drop),), model_file, tmp_path / "log.db")
    with closing(MatchLog.open(config.database)) as log:
        running = Service(config, load_model(model_file, "cpu"), log)
        hint = FileHint(str(drop / "a.png"), FileStamp(1, 1, 1), True, drop)
        for _ in range(100):
            running._hear(hint)
        running._hear(HintsLost())  # whatever else comes is heeded
        assert running.inbox.qsize() == 11
        with Decoders(1, 60, lambda _: None) as decoders:
            asked: list[bool] = []
            monkeypatch.setattr(running._backlog, "scan", asked.append)
            running._next_rescan = math.inf
            running._look_around(0.0, decoders)
            assert asked == []  # not while there is no room
            while not running.inbox.empty():
                running.inbox.get()
            running._look_around(0.0, decoders)
            running._look_around(0.0, decoders)
            assert asked == [True]


def failure(path: Path) -> Outcome:
    path.write_text("no picture")
    os.utime(path, (1e9, 1e9))
    stamp = stamp_of(str(path))
    assert stamp
    return Outcome(str(path), "", stamp, "failed", 0.0, 0.0)


def test_of_many_earlier_failures_a_few_are_moved_at_a_time_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting_aside, "_AT_ONCE", 3)
    monkeypatch.setattr(setting_aside, "_MOST_WAITING", 5)
    sent: queue.SimpleQueue[SetAside] = queue.SimpleQueue()
    mover = Mover(tmp_path, sent.put)
    (tmp_path / "drop").mkdir()
    met = [failure(tmp_path / "drop" / f"{number}.png") for number in range(10)]
    for outcome in (*met, *met):
        mover.meet(outcome)
    first = [sent.get(timeout=30) for _ in range(3)]
    mover.look()
    time.sleep(0.2)
    assert sent.empty()  # until these are noted
    for moved in first:
        mover.note(moved)
    mover.look()
    then = [sent.get(timeout=30) for _ in range(3)]
    assert {m.outcome.path for m in (*first, *then)} == {o.path for o in met[:6]}
    assert all(m.target and m.target.exists() for m in (*first, *then))
    mover.end()


def test_what_cannot_be_moved_is_left_until_it_fails_again(tmp_path: Path) -> None:
    sent: queue.SimpleQueue[SetAside] = queue.SimpleQueue()
    mover = Mover(tmp_path / "failed", sent.put)
    outcome = failure(tmp_path / "bad.png")
    for tell in (mover.meet, mover.heed):
        tell(outcome)
        moved = sent.get(timeout=30)
        assert moved.problem == "No such file or directory"
        mover.note(moved)
    (tmp_path / "failed").mkdir()
    mover.meet(outcome)
    mover.look()
    assert not mover._moving and not mover._waiting
    for tell in (mover.heed, mover.meet):  # then it is as any other
        tell(outcome)
        moved = sent.get(timeout=30)
        assert moved.target
        mover.note(moved)
        outcome = failure(tmp_path / "bad.png")
    mover.end()
    assert sent.empty()


def test_a_failed_file_that_may_still_be_written_to_is_moved_once_it_is_quiet(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop, failed = tmp_path / "drop", tmp_path / "failed"
    failed.mkdir()
    paths = [str(write_image(drop / f"{name}.png", 25)) for name in ("fresh", "old")]
    os.utime(paths[1], (1e9, 1e9))
    folders = (Folder(drop),)
    config = Config(folders, model_file, tmp_path / "log.db", failed_folder=failed)
    with closing(MatchLog.open(config.database)) as log:
        running = Service(config, load_model(model_file, "cpu"), log)
        mover = running._mover
        log.use_model(running.model)

        def record(path: str, status: Status) -> None:
            stamp = stamp_of(path)
            assert stamp
            running._backlog.in_hand[path] = InHand(0.0, stamp, settled=True)
            outcome = Outcome(path, "", stamp, status, 0.0, 0.0)
            if status == "failed":
                outcome = replace(outcome, error="cut short")
            else:
                outcome = replace(outcome, score=0.1, threshold=0.5)
            running._record([outcome], running.model)

        def moved() -> Path | None:
            message = running.inbox.get(timeout=30)
            assert isinstance(message, SetAside)
            return message.target

        for path in paths:
            record(path, "failed")
        assert moved() == failed / "old.png"
        record(paths[0], "no-match")  # it was completed
        monkeypatch.setattr(setting_aside, "_QUIET_S", 0.0)
        mover.look()
        monkeypatch.undo()
        record(paths[0], "failed")
        mover.look()
        assert Path(paths[0]).exists()
        monkeypatch.setattr(setting_aside, "_QUIET_S", 0.0)
        running._next_rescan = math.inf
        with Decoders(1, 60, lambda _: None) as decoders:
            running._look_around(0.0, decoders)
        assert moved() == failed / "fresh.png"
        mover.end()
        running._note_moves()
        assert running.inbox.empty()


def test_what_is_being_moved_at_the_end_is_noted_in_its_row(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(path: str, stamp: FileStamp, folder: Path) -> Path | None:
        time.sleep(1)
        return set_aside(path, stamp, folder)

    monkeypatch.setattr(setting_aside, "set_aside", slowly)
    folders = (Folder(tmp_path / "archive", mode="poll", poll_seconds=math.inf),)
    for folder in ("archive", "failed"):
        (tmp_path / folder).mkdir()
    failure(tmp_path / "archive" / "bad.png")
    config = Config(
        folders, model_file, tmp_path / "log.db", failed_folder=tmp_path / "failed"
    )
    with closing(MatchLog.open(config.database)) as log:
        Service(config, load_model(model_file, "cpu"), log, until_done=True).run()
    assert (tmp_path / "failed" / "bad.png").exists()
    (row,) = Database(config.database)["images"].rows
    assert "moved to" in row["error"]
