import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import write_model

from pic_daemon.folders import FileStamp
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.model import load_model
from pic_daemon.schema import open_read_only
from pic_daemon.web import queries
from pic_daemon.web.queries import Cursor, FilterError, Filters, Page, page_of, statement

START = datetime(2026, 11, 20, tzinfo=UTC)
STATUSES = ["match", "no-match", "match", "failed", "no-match"]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> sqlite3.Connection:
    """100 rows a minute apart, three in each moment, their kinds taking turns."""
    home = tmp_path_factory.mktemp("queries")
    model = load_model(write_model(home / "model.onnx"), "cpu")
    log = MatchLog.open(home / "log.db")
    log.use_model(model)
    log.record([outcome(number) for number in range(100)], model)
    log.close()
    return open_read_only(home / "log.db").conn


def outcome(number: int) -> Outcome:
    status = STATUSES[number % 5]
    at = (START + timedelta(minutes=number // 3)).timestamp()
    more: dict[str, object] = {"error": "the file is empty"}
    if status != "failed":
        more = {"score": number / 100, "threshold": 0.5}
    if status == "match":
        more |= {"catalog_item": f"item-{number % 4}.jpg", "similarity": 0.9}
    folder = "/drop/a" if number % 2 else "/drop/a-b"
    return Outcome(
        f"{folder}/{number:03d}.jpg", f"{number:064d}", FileStamp(1, 2, 3),
        status, at - number / 1000, at, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def numbers(page: Page) -> list[int]:
    return [int(Path(row["path"]).stem) for row in page.rows]


@pytest.mark.parametrize("status", ["match", "no-match", "failed", "all"])
def test_paging_down_and_up_shows_every_row_once_newest_first(
    db: sqlite3.Connection, status: str
) -> None:
    filters = Filters.of({"status": status})
    page = page_of(db, filters, size=7)
    assert page.newer is None
    pages = [page]
    while pages[-1].older:
        pages.append(page_of(db, filters, pages[-1].older, size=7))
    kinds = STATUSES if status == "all" else [status]
    assert [n for page in pages for n in numbers(page)] == [
        n for n in reversed(range(100)) if STATUSES[n % 5] in kinds
    ]
    back = [pages[-1]]
    while back[-1].newer:
        back.append(page_of(db, filters, back[-1].newer, size=7))
    assert [numbers(page) for page in reversed(back)] == [numbers(page) for page in pages]


def test_filters_narrow_by_time_score_folder_and_product(db: sqlite3.Connection) -> None:
    def found(**given: str) -> list[int]:
        return numbers(page_of(db, Filters.of({"status": "all", **given}), size=200))

    assert found(**{"from": "2026-11-20T00:10", "to": "2026-11-20T00:11"}) == [32, 31, 30]
    assert found(min="0.9", max="0.92") == [92, 91, 90]
    assert found(folder="/drop/a") == [n for n in reversed(range(100)) if n % 2]
    assert found(folder="/drop/a-b/") == [n for n in reversed(range(100)) if not n % 2]
    assert found(folder="/dro") == []
    assert set(found(product="item-2.jpg")) == {
        n for n in range(100) if STATUSES[n % 5] == "match" and n % 4 == 2
    }
    assert found(folder="/drop/a", min="0.9", max="0.92") == [91]


def test_a_large_folder_is_met_on_the_way_through_time(
    db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = Filters.of({"folder": "/drop/a"})
    small = numbers(page_of(db, filters))
    monkeypatch.setattr(queries, "_FEW", 10)
    assert numbers(page_of(db, filters)) == small
    steps = plan(db, {"folder": "/drop/a"}, None)
    assert steps == ["SEARCH images USING INDEX images_by_status (status=?)"]


@pytest.mark.parametrize(
    "given",
    [{"status": "bogus"}, {"from": "soon"}, {"to": "0001-01-01T00:00+05:00"},
     {"min": "2"}, {"max": "nan"}, {"min": "much"}],
)  # fmt: skip
def test_a_filter_that_means_nothing_is_named(given: dict[str, str]) -> None:
    with pytest.raises(FilterError):
        Filters.of(given)


@pytest.mark.parametrize(
    "text", ["", "x", "_", "now_1x", "now_" + "9" * 30, "now_-1", "a_²"]
)
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(FilterError):
        Cursor.of(text, newer=False)


def test_filters_survive_the_way_through_the_address() -> None:
    given = {"status": "no-match", "from": "2026-11-20T00:10", "min": "0.25",
             "max": "0.5", "to": "2026-11-21T00:00",
              "folder": "/a", "product": "x & y"}  # fmt: skip
    assert Filters.of(given).query() == given
    spaced = {"folder": "/a ", "product": " lead.jpg "}  # as files may be called
    assert Filters.of(spaced).query() == spaced
    assert Filters.of({}).query() == {}
    exact = Filters.of(
        {"from": "2026-11-20T00:10:09", "min": "0.7071068", "max": "0.99999951"}
    )
    assert Filters.of(exact.query()) == exact


def plan(
    db: sqlite3.Connection, filters: dict[str, str], cursor: Cursor | None
) -> list[str]:
    sql, values = statement(db, Filters.of(filters), cursor, 31)
    return [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]


PLACE = "2026-11-20T00:20:00.000Z"


@pytest.mark.parametrize("cursor", [None, Cursor(PLACE, 60), Cursor(PLACE, 60, newer=True)])
@pytest.mark.parametrize(
    ("filters", "index"),
    [({}, "images_by_status"),
     ({"status": "failed"}, "images_by_status"),
     ({"status": "no-match", "from": "2026-11-20T00:10"}, "images_by_status"),
     ({"status": "all", "min": "0.5"}, "images_by_status"),
     ({"product": "item-1.jpg"}, "images_by_product"),
     ({"product": "item-1.jpg", "status": "all"}, "images_by_product"),
     ({"product": "item-1.jpg", "folder": "/drop/a"}, "images_by_product")],
)  # fmt: skip
def test_a_page_is_read_in_order_from_an_index(
    db: sqlite3.Connection, filters: dict[str, str], index: str, cursor: Cursor | None
) -> None:
    steps = plan(db, filters, cursor)
    assert not [step for step in steps if "TEMP B-TREE" in step or "SCAN" in step], steps
    reads = [step for step in steps if "images" in step]
    assert reads and all(f"USING INDEX {index} " in step for step in reads), steps
    if cursor:
        assert all("classified_at" in step for step in reads), steps


@pytest.mark.parametrize("status", ["match", "no-match", "all"])
def test_a_score_is_compared_in_the_index_before_any_row_is_looked_up(
    db: sqlite3.Connection, status: str
) -> None:
    given = {"status": status, "min": "0.25", "max": "0.5"}
    sql, values = statement(db, Filters.of(given), Cursor(PLACE, 60), 31)
    # Were the score not in it, the index would not cover what finds the rows.
    found = sql.replace("SELECT *", "SELECT id, classified_at")
    steps = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {found}", values)]
    reads = [step for step in steps if "images" in step]
    assert reads
    assert all("USING COVERING INDEX images_by_status " in step for step in reads), steps


def test_the_rows_of_a_small_folder_are_found_by_path(db: sqlite3.Connection) -> None:
    steps = plan(db, {"folder": "/drop/a"}, None)
    assert "sqlite_autoindex_images_1 (path>? AND path<?)" in steps[0], steps


def test_the_figures_count_from_an_index_alone(db: sqlite3.Connection) -> None:
    asked: list[str] = []
    db.set_trace_callback(asked.append)
    days = queries.counts_by_day(db, START + timedelta(hours=30))
    db.set_trace_callback(None)
    counts = {d["day"]: (d["matches"], d["failures"]) for d in days}
    assert (counts["2026-11-21"], counts["2026-11-20"]) == ((0, 0), (40, 20))
    for sql in asked:
        (step,) = (row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}"))
        assert "USING COVERING INDEX images_by_status (status=? AND classified_at>" in step


def test_latency_is_of_the_latest_rows(db: sqlite3.Connection) -> None:
    assert queries.latency(db) == {"of": 100, "median": 49.0, "p95": 94.0}


def test_products_are_each_named_once(db: sqlite3.Connection) -> None:
    assert queries.products(db) == [f"item-{number}.jpg" for number in range(4)]
