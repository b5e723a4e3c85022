import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlite_utils import Database

from pic_daemon.deliveries import Attempt, Hook, due, note
from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.match_queries import read_images
from pic_daemon.model import Model, load_model
from pic_daemon.schema import iso_time, migrations
from pic_daemon.web.queries import Filters

STAMP = FileStamp(1000, 5, 7)


@pytest.fixture
def model(model_file: Path) -> Model:
    return load_model(model_file, "cpu")


@pytest.fixture
def log(tmp_path: Path, model: Model) -> MatchLog:
    log = MatchLog.open(tmp_path / "log.db")
    log.use_model(model)
    return log


def match(
    path: str, sha256: str = "a" * 64, score: float = 0.9, at: float = 100.0
) -> Outcome:
    return Outcome(path, sha256, STAMP, "match", at - 0.25, at, 40, 30, "PNG", score, 0.5)


def failure(path: str, sha256: str = "b" * 64) -> Outcome:
    return Outcome(path, sha256, STAMP, "failed", 99.0, 100.0, error="truncated")


def query(log: MatchLog, sql: str) -> list[dict[str, object]]:
    database = Database(log.path)
    try:
        return list(database.query(sql))
    finally:
        database.close()


def test_a_row_holds_everything_about_an_image(log: MatchLog, model: Model) -> None:
    log.record([match("/drop/a.png")], model)
    (row,) = query(log, "SELECT * FROM images")
    del row["id"], row["mtime_ns"], row["inode"]
    assert row == {
        "path": "/drop/a.png", "sha256": "a" * 64, "bytes": 1000, "width": 40,
        "height": 30, "format": "PNG", "status": "match", "score": 0.9,
        "threshold": 0.5, "model": model.sha256, "seen_at": "1970-01-01T00:01:39.750Z",
        "classified_at": "1970-01-01T00:01:40.000Z", "latency_ms": 250.0, "error": None,
        "catalog_item": None, "similarity": None, "runner_up": None,
        "runner_up_similarity": None, "catalog_index": None,
        "joint_score": None, "joint_threshold": None, "revision": 1,
    }  # fmt: skip
    (used,) = query(log, "SELECT * FROM models")
    assert used["sha256"] == model.sha256
    assert str(used["first_used_at"]) <= str(used["last_used_at"])


def test_the_view_holds_matches_alone(log: MatchLog, model: Model) -> None:
    log.record([match("/drop/a.png"), failure("/drop/b.png")], model)
    (row,) = query(log, "SELECT * FROM matches")
    assert list(row) == [
        "path", "score", "threshold", "model", "classified_at", "sha256", "catalog_item",
        "similarity", "runner_up", "runner_up_similarity", "joint_score", "joint_threshold",
    ]  # fmt: skip


def test_the_present_model_is_known_though_the_clock_was_set_back(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png")], model)
    present = replace(model, sha256="c" * 64)
    log.use_model(present)
    log.record([match("/drop/b.png")], present)
    log._db.execute(
        "UPDATE models SET last_used_at = '2999' WHERE sha256 = ?", [model.sha256]
    )
    log._db.conn.commit()
    log.beat({"model": present.sha256})
    assert log.mark_outdated() == 1
    assert log.row_of("/drop/b.png", STAMP) and not log.row_of("/drop/a.png", STAMP)


def test_a_picture_that_no_index_was_asked_about_is_not_outdated_by_it(
    log: MatchLog, model: Model
) -> None:
    blank = replace(match("/drop/a.png", score=0.0), status="no-match", error="uniform")
    log.record([blank], model)
    log.beat({"model": model.sha256, "catalog_index": "i" * 64, "gate_threshold": 0.0})
    assert log.mark_outdated() == 0
    log.record([match("/drop/b.png")], model)
    assert log.mark_outdated() == 1


def test_a_path_and_content_has_one_row_however_often_it_is_recorded(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png")], model)
    log.record([match("/drop/a.png")], model)
    log.record([match("/drop/a.png", "c" * 64), match("/drop/b.png")], model)
    assert len(query(log, "SELECT * FROM images")) == 3


def test_an_image_scored_again_keeps_of_its_row_when_it_was_first_noticed_alone(
    log: MatchLog, model: Model
) -> None:
    before = Outcome(
        "/drop/a.png", "a" * 64, STAMP, "match", 99.75, 100.0, 40, 30, "PNG", 0.9, 0.5,
        None, "shoes.jpg", 0.95, "hats.jpg", 0.4, "i" * 64, 0.8, 0.6,
    )  # fmt: skip
    after = Outcome(
        "/drop/a.png", "a" * 64, FileStamp(2000, 6, 8), "no-match", 199.0, 200.0, 80, 60,
        "JPEG", 0.2, 0.3, "uniform", "boots.jpg", 0.7, "caps.jpg", 0.25, "j" * 64, 0.1, 0.7,
    )  # fmt: skip
    present = replace(model, sha256="c" * 64)
    log.use_model(present)
    log.record([before], model)
    log.record([after], present)
    (row,) = query(log, "SELECT * FROM images")
    del row["id"]
    assert row == {
        "path": "/drop/a.png", "sha256": "a" * 64, "bytes": 2000, "width": 80,
        "height": 60, "format": "JPEG", "status": "no-match", "score": 0.2,
        "threshold": 0.3, "model": present.sha256, "seen_at": "1970-01-01T00:01:39.750Z",
        "classified_at": "1970-01-01T00:03:20.000Z", "latency_ms": 250.0,
        "error": "uniform", "mtime_ns": 6, "inode": 8, "catalog_item": "boots.jpg",
        "similarity": 0.7, "runner_up": "caps.jpg", "runner_up_similarity": 0.25,
        "catalog_index": "j" * 64, "joint_score": 0.1, "joint_threshold": 0.7,
        "revision": 2,
    }  # fmt: skip


def test_what_was_recorded_is_known_until_the_file_changes(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png")], model)
    touched = FileStamp(1000, 6, 7)
    assert log.row_of("/drop/a.png", STAMP)
    assert not log.row_of("/drop/a.png", touched)
    assert log.recognise("/drop/a.png", "a" * 64, touched)
    assert log.row_of("/drop/a.png", touched)
    assert not log.recognise("/drop/a.png", "d" * 64, touched)


def test_a_file_that_is_read_again_leaves_no_failed_row_behind(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png")], model)
    log.record([failure("/drop/a.png", sha256="")], model)  # touched, and not readable
    assert log.recognise("/drop/a.png", "a" * 64, FileStamp(1000, 6, 7))
    assert [row["status"] for row in query(log, "SELECT * FROM images")] == ["match"]


def test_a_failure_gives_way_to_what_the_file_became(log: MatchLog, model: Model) -> None:
    log.record([failure("/drop/a.png"), failure("/drop/b.png")], model)
    log.record([match("/drop/a.png")], model)
    rows = query(log, "SELECT path, status FROM images ORDER BY path")
    assert [row["status"] for row in rows] == ["match", "failed"]


def test_a_file_that_could_not_be_read_is_tried_again(log: MatchLog, model: Model) -> None:
    unread = replace(failure("/drop/a.png", sha256=""), error="cannot be read: no leave")
    log.record([unread], model)
    assert not log.row_of("/drop/a.png", STAMP)  # a row of 1970
    log.record([replace(unread, classified_at=time.time())], model)
    assert log.row_of("/drop/a.png", STAMP)  # not again by the very next scan
    log.record([replace(unread, classified_at=time.time() + 86400)], model)
    assert not log.row_of("/drop/a.png", STAMP)  # the clock was ahead
    log.record([replace(unread, classified_at=time.time())], model)
    assert len(query(log, "SELECT * FROM images")) == 1
    log.record([match("/drop/a.png")], model)
    assert [row["status"] for row in query(log, "SELECT * FROM images")] == ["match"]


def test_a_file_that_crashed_its_decoders_is_left_alone_until_asked(
    log: MatchLog, model: Model
) -> None:
    crashed = replace(failure("/drop/a.png", sha256=""), error="decoding crashed")
    log.record([crashed], model)
    assert log.row_of("/drop/a.png", STAMP)
    assert log.mark_failed() == 1
    assert not log.row_of("/drop/a.png", STAMP)


def test_folders_are_noted_instead_of_those_before_or_besides_them(log: MatchLog) -> None:
    log.watch({Path("/mnt/nas"): "/mnt/nas", Path("/srv/drop"): "/"})
    log.watch({Path("/mnt/nas"): "/", Path("/archive"): "/"}, besides=True)
    assert log.mount_points() == {"/mnt/nas": "/mnt/nas", "/srv/drop": "/", "/archive": "/"}
    log.watch({Path("/srv/drop"): "/"})
    assert log.mount_points() == {"/srv/drop": "/"}


def test_what_is_asked_for_each_image_does_not_look_through_the_log(
    log: MatchLog, model: Model
) -> None:
    # As somebody may add for questions of their own.
    log._db.execute("CREATE INDEX by_score ON images (status, score)")
    asked: list[str] = []
    log._db.conn.set_trace_callback(asked.append)
    log.record([match("/drop/a.png"), failure("/drop/b.png")], model, ["webhook"])
    log.row_of("/drop/a.png", STAMP)
    log.recognise("/drop/a.png", "a" * 64, FileStamp(1000, 6, 7))
    log._db.conn.set_trace_callback(None)
    details = {
        str(step["detail"])
        for sql in asked
        if " images" in sql
        for step in query(log, f"EXPLAIN QUERY PLAN {sql}")
    }
    used = {detail for detail in details if " images " in detail}
    assert {detail.partition(" USING ")[2] for detail in used} == {
        "INDEX failed_by_path (path=?)",
        "INDEX images_by_stamp (mtime_ns=? AND inode=?)",
        "INDEX sqlite_autoindex_images_1 (path=? AND sha256=?)",
        "INTEGER PRIMARY KEY (rowid=?)",
    }


def test_the_log_is_durable_and_strict(log: MatchLog, model: Model) -> None:
    log.take_in_hand(["/drop/a.png"])
    log.record([match("/drop/a.png")], model)
    modes = [log._db.execute(f"PRAGMA {p}").fetchone()[0]
             for p in ("journal_mode", "synchronous", "foreign_keys")]  # fmt: skip
    assert modes == ["wal", 2, 1]
    for table in ("images", "models"):
        assert log._db[table].strict
    with pytest.raises(sqlite3.IntegrityError):
        log._db.execute("UPDATE models SET sha256 = NULL")


def test_a_batch_is_written_whole_or_not_at_all(log: MatchLog, model: Model) -> None:
    wrong = Outcome("/drop/b.png", "", STAMP, "failed", 1, 1, error=None)
    with pytest.raises(sqlite3.IntegrityError):
        log.record([match("/drop/a.png"), wrong], model)
    assert query(log, "SELECT * FROM images") == []


def test_a_name_that_is_not_utf8_is_written_readably(log: MatchLog, model: Model) -> None:
    path = b"/drop/caf\xe9.png".decode("utf-8", "surrogateescape")
    log.record([match(path)], model)
    assert query(log, "SELECT path FROM images") == [{"path": "/drop/caf\\xe9.png"}]
    assert log.row_of(path, STAMP)


def test_matches_are_read_newest_first_while_the_writer_holds_its_lock(
    log: MatchLog, model: Model
) -> None:
    log.record([match(f"/drop/{n}.png", score=n / 10, at=n) for n in range(10)], model)
    log._db.execute("BEGIN IMMEDIATE")
    filters = Filters(since=datetime.fromtimestamp(4, UTC), min_score=0.6)
    (rows,) = read_images(log.path, filters, limit=2)
    assert [row["path"] for row in rows] == ["/drop/9.png", "/drop/8.png"]
    log._db.conn.rollback()


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    Database(tmp_path / "other.db")["songs"].insert({"title": "x"})
    with pytest.raises(InputError, match=r"another program \(it holds songs\)"):
        MatchLog.open(tmp_path / "other.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_text("these are my notes, not a database\n" * 50)
    with pytest.raises(InputError, match="file is not a database"):
        MatchLog.open(tmp_path / "log.db")


def test_a_newer_schema_is_refused(log: MatchLog) -> None:
    log.close()
    database = Database(log.path)
    database["_sqlite_migrations"].insert(
        {"migration_set": "product-image-classifier", "name": "of_the_future",
         "applied_at": "2030"}
    )  # fmt: skip
    database.close()
    with pytest.raises(InputError, match=r"newer version .*of_the_future"):
        MatchLog.open(log.path)


def test_times_sort_as_text() -> None:
    moments = [0.0, 1.0, 1.5, 1_700_000_000.0]
    texts = [iso_time(m) for m in moments]
    assert texts == sorted(texts)
    assert texts[2] == "1970-01-01T00:00:01.500Z"


def hooks_told_of(log: MatchLog) -> list[object]:
    rows = query(log, "SELECT message ->> 'path' AS path FROM deliveries ORDER BY id")
    return [row["path"] for row in rows]


def test_a_delivery_is_queued_with_its_row_and_only_for_a_hook(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png")], model)
    assert hooks_told_of(log) == []
    wrong = Outcome("/drop/c.png", "", STAMP, "failed", 1, 1, error=None)
    with pytest.raises(sqlite3.IntegrityError):
        log.record([match("/drop/b.png"), wrong], model, ["webhook"])
    assert hooks_told_of(log) == []
    other = replace(match("/drop/no.png"), status="no-match", score=0.1)
    log.record([match("/drop/b.png"), other, failure("/drop/d.png")], model, ["webhook"])
    assert hooks_told_of(log) == ["/drop/b.png"]


def test_what_waits_for_a_hook_that_was_taken_out_is_given_up_until_asked(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png")], model, ["webhook", "command"])
    log.deliver_only_to(["command"])
    pending = "SELECT hook FROM deliveries WHERE due_at IS NOT NULL"
    assert query(log, pending) == [{"hook": "command"}]
    log.deliver_only_to([])
    assert query(log, pending) == []
    assert log.deliver_again() == 2


def test_what_is_tried_again_is_as_if_just_queued_and_what_waits_is_left_alone(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png"), match("/drop/b.png")], model, ["webhook"])
    log._db.execute("UPDATE deliveries SET attempts = 3, due_at = NULL WHERE id = 1")
    log._db.execute("UPDATE deliveries SET attempts = 4, due_at = 108 WHERE id = 2")
    log._db.conn.commit()
    assert log.deliver_again() == 1
    again, waiting = query(log, "SELECT attempts, queued_at, due_at FROM deliveries")
    assert again["attempts"] == 0
    assert again["queued_at"] == again["due_at"] != 100.0
    assert waiting == {"attempts": 4, "queued_at": 100.0, "due_at": 108.0}


def test_the_longest_due_is_told_first(log: MatchLog, model: Model) -> None:
    at = {"/drop/c.png": 300.0, "/drop/a.png": 100.0, "/drop/b.png": 200.0}
    log.record([match(path, at=due_at) for path, due_at in at.items()], model, ["webhook"])
    told = due(log._db.conn, "webhook", now=400, limit=2)
    assert [delivery.queued_at for delivery in told] == [100.0, 200.0]


def test_what_was_given_up_can_be_forgotten(
    log: MatchLog, model: Model, run_tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    log.record([match("/drop/a.png")], model, ["webhook", "command"])
    log.deliver_only_to(["command"])
    retry = "retry", "--database", log.path, "--forget"
    assert run_tool("pic-daemon", *retry).returncode == 2
    told = run_tool("pic-daemon", *retry, "--deliveries").stdout
    assert told == "1 deliveries were deleted\n"
    assert query(log, "SELECT hook FROM deliveries") == [{"hook": "command"}]


def test_a_name_that_nothing_can_be_found_under_is_told_once(log: MatchLog) -> None:
    log.take_in_hand(["/drop/a.png", "/drop/b.png", "/drop/\udcff.png"])
    for path in ("/drop/b.png", "/drop/\udcff.png"):
        log.strike(path)
    assert log.left_in_hand() == ["/drop/\\xff.png", "/drop/a.png", "/drop/b.png"]
    assert log.left_in_hand() == log.struck() == ["/drop/b.png"]


def test_after_a_clean_stop_nothing_was_in_hand_and_strikes_are_kept(log: MatchLog) -> None:
    log.take_in_hand(["/drop/a.png", "/drop/b.png"])
    log.strike("/drop/b.png")
    log.put_all_down()
    assert log.left_in_hand() == []
    assert log.struck() == ["/drop/b.png"]
    log.take_in_hand(["/drop/b.png"])
    assert log.left_in_hand() == ["/drop/b.png"]


def test_a_hook_that_has_failed_for_weeks_is_still_tried_again(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png", at=0)], model, ["webhook"])
    log._db.execute("UPDATE deliveries SET attempts = 5000")
    (delivery,) = due(log._db.conn, "webhook", now=100, limit=1)
    attempt = Attempt(delivery, "down")
    assert not note(log._db.conn, [attempt], now=100, give_up_after=1e9, tried_for=0)
    assert query(log, "SELECT attempts, due_at FROM deliveries") == [
        {"attempts": 5001, "due_at": 700.0}
    ]


def test_a_clock_that_was_wrong_neither_ends_nor_delays_a_delivery(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png", at=0)], model, ["webhook"])  # in 1970
    (early,) = due(log._db.conn, "webhook", now=1e9, limit=1)
    late, failed = 1e9 + 7200, [Attempt(early, "down")]
    assert not note(log._db.conn, failed, now=1e9, give_up_after=7200, tried_for=60)
    assert note(log._db.conn, failed, now=late, give_up_after=7200, tried_for=3600)
    log.record([match("/drop/b.png", at=2e9)], model, ["webhook"])
    (ahead,) = due(log._db.conn, "webhook", now=1e9, limit=2)
    assert "/drop/b.png" in ahead.message


def test_a_match_scored_again_is_news_only_if_its_verdict_or_product_changed(
    log: MatchLog, model: Model
) -> None:
    hooks: tuple[Hook, ...] = ("webhook", "command")
    log.record([replace(match("/drop/a.png"), status="no-match", score=0.1)], model, hooks)
    for told, outcome in (
        (2, match("/drop/a.png")),
        (2, match("/drop/a.png", score=0.8)),
        (4, replace(match("/drop/a.png"), catalog_item="shoes.jpg")),
        (4, replace(match("/drop/a.png"), catalog_item="shoes.jpg", score=0.7)),
    ):
        log.record([outcome], model, hooks)
        assert len(hooks_told_of(log)) == told


def test_a_status_says_where_a_scan_may_bring_more(
    log: MatchLog, run_tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    log.beat({"backlog": 64, "oldest_waiting_s": 1.0, "scanning": True})
    told = run_tool("pic-daemon", "status", "--database", log.path)
    assert told.stdout == "healthy; 64 waiting, and a scan may bring more; rows: 0\n"


def test_no_revision_is_used_twice_though_rows_are_deleted(
    log: MatchLog, model: Model
) -> None:
    log.record([match("/drop/a.png"), failure("/drop/b.png")], model)
    log.record([match("/drop/b.png")], model)  # takes the place of the failure, id and all
    log.record([match("/drop/a.png", score=0.8)], model)  # the same row, written again
    rows = query(log, "SELECT path, revision FROM images ORDER BY revision")
    assert [tuple(row.values()) for row in rows] == [("/drop/b.png", 3), ("/drop/a.png", 4)]
    log._db.execute("DELETE FROM images WHERE revision = 4")
    log._db.conn.commit()
    log.record([match("/drop/c.png")], model)
    assert query(log, "SELECT max(revision) AS last FROM images") == [{"last": 5}]


def test_a_log_whose_making_was_cut_short_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    begun = Database(path)
    migrations.ensure_migrations_table(begun)
    begun.close()
    log = MatchLog.open(path)
    assert query(log, "SELECT * FROM images") == []
    log.close()
