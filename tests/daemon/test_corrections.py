import sqlite3
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest
from shop import Shop

from pic_daemon.corrections import NotCorrectable, correct, history, read_corrections
from pic_daemon.errors import InputError
from pic_daemon.match_log import MatchLog


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "shop")


def test_a_picture_corrected_twice_takes_the_latest_and_keeps_both(shop: Shop) -> None:
    path = str(shop.copy_of(1, "a.jpg"))
    correct(shop.database, 1, "ours", "Ada")
    correct(shop.database, 1, "not-ours", "Grace")
    (latest,) = read_corrections(shop.database)
    assert (latest.path, latest.label, latest.who) == (path, "not-ours", "Grace")
    assert latest.sha256 == sha256(Path(path).read_bytes()).hexdigest()
    said = history(shop.log._db.conn, latest.sha256)
    assert [(c.label, c.who) for c in said] == [("not-ours", "Grace"), ("ours", "Ada")]
    assert said[1].at <= said[0].at


def test_the_same_bytes_under_two_names_are_one_picture(shop: Shop) -> None:
    first = shop.stranger(50, "one/same.jpg")
    shop._record(first.rename(first.with_name("again.jpg")), "no-match", 0, score=0.1)
    correct(shop.database, 2, "not-ours", "Ada")
    correct(shop.database, 1, "ours", "Ada")
    assert [c.label for c in read_corrections(shop.database)] == ["ours"]
    correct(shop.database, 2, "not-ours", "Ada")
    (latest,) = read_corrections(shop.database)
    assert (latest.label, latest.path) == ("not-ours", str(first.with_name("again.jpg")))


def test_saying_the_same_again_adds_nothing(shop: Shop) -> None:
    shop.copy_of(1, "a.jpg")
    for _ in range(3):
        correct(shop.database, 1, "ours", "Ada")
    assert shop.log._db["corrections"].count == 1


def test_the_same_said_of_the_same_bytes_elsewhere_counts_from_there(shop: Shop) -> None:
    first = shop.copy_of(1, "a.jpg")
    correct(shop.database, 1, "ours", "Ada")
    again = first.rename(first.with_name("again.jpg"))
    shop._record(again, "match", 0, score=0.9, threshold=0.5)
    correct(shop.database, 2, "ours", "Ada")
    assert [c.path for c in read_corrections(shop.database)] == [str(again)]


def test_only_a_row_with_a_verdict_can_be_corrected(shop: Shop) -> None:
    shop.broken("b.jpg", "the file is empty")
    for number, reason in ((1, "no verdict"), (2, "no record 2")):
        with pytest.raises(NotCorrectable, match=reason):
            correct(shop.database, number, "ours", "Ada")
    assert read_corrections(shop.database) == []


def test_a_correction_is_of_the_picture_that_was_looked_at(shop: Shop) -> None:
    seen = sha256(shop.copy_of(1, "a.jpg").read_bytes()).hexdigest()
    with shop.log._db.conn:
        shop.log._db.execute("DELETE FROM images")
    now = sha256(shop.copy_of(2, "b.jpg").read_bytes()).hexdigest()  # under the same id
    with pytest.raises(NotCorrectable, match="record 1 is of another picture now"):
        correct(shop.database, 1, "ours", "Ada", seen)
    assert read_corrections(shop.database) == []
    correct(shop.database, 1, "ours", "Ada", now)
    assert [c.sha256 for c in read_corrections(shop.database)] == [now]


def test_a_correction_outlives_its_row_and_is_not_taken_for_another(shop: Shop) -> None:
    shop.copy_of(1, "a.jpg")
    correct(shop.database, 1, "ours", "Ada")
    with shop.log._db.conn:
        shop.log._db.execute("DELETE FROM images")
    shop.copy_of(2, "b.jpg")
    (row,) = shop.log._db["images"].rows
    assert row["id"] == 1  # used again
    assert history(shop.log._db.conn, row["sha256"]) == []
    assert len(read_corrections(shop.database)) == 1


def test_a_correction_waits_for_the_service_to_finish_its_transaction(shop: Shop) -> None:
    shop.copy_of(1, "a.jpg")
    shop.log._db.execute("BEGIN IMMEDIATE")
    saying = threading.Thread(target=correct, args=[shop.database, 1, "ours", "Ada"])
    saying.start()
    time.sleep(0.3)
    assert saying.is_alive()
    shop.log._db.conn.rollback()
    saying.join(10)
    assert len(read_corrections(shop.database)) == 1


def test_a_log_from_before_corrections_is_refused(shop: Shop) -> None:
    shop.log._db["corrections"].drop()
    with pytest.raises(InputError, match="holds no corrections"):
        read_corrections(shop.database)
    with pytest.raises(InputError, match="does not exist"):
        read_corrections(shop.home / "none.db")


def test_a_log_of_an_earlier_version_gets_its_tables_and_indexes(tmp_path: Path) -> None:
    MatchLog.open(tmp_path / "log.db").close()
    db = sqlite3.connect(tmp_path / "log.db")
    schema = "SELECT sql FROM sqlite_schema WHERE type = 'index' ORDER BY sql"
    whole = db.execute(schema).fetchall()
    db.executescript(
        """
        DROP TABLE corrections; DROP TABLE watched; DROP INDEX images_by_status;
        DROP INDEX images_by_product;
        CREATE INDEX matches_by_time ON images (classified_at) WHERE status = 'match';
        DELETE FROM _sqlite_migrations WHERE name IN
            ('add_watched', 'add_corrections', 'add_indexes_for_the_page',
             'widen_indexes_for_the_page', 'find_corrections_by_content',
                 'add_mount_points');
        """
    )
    MatchLog.open(tmp_path / "log.db").close()
    assert db.execute(schema).fetchall() == whole
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    assert {"corrections", "watched", "images_by_status", "images_by_product"} <= names
    assert "matches_by_time" not in names
    db.close()
