"""pic-matches as people and scripts use it, on a log that is being written."""

import csv
import io
import json
import os
import signal
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN
from sqlite_utils import Database

from pic_daemon.folders import FileStamp
from pic_daemon.match_formats import printer
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.match_queries import Row, follow_images
from pic_daemon.model import Model, load_model
from pic_daemon.schema import iso_time, migrations, open_read_only
from pic_daemon.web.queries import Filters

Run = Callable[..., subprocess.CompletedProcess[str]]


def match(path: str, at: float, score: float = 0.9, item: str | None = None) -> Outcome:
    return Outcome(path, f"{hash(path):x}", FileStamp(9, 5, 7), "match", at - 0.25, at,
                   40, 30, "PNG", score, 0.5, catalog_item=item)  # fmt: skip


@pytest.fixture
def model(model_file: Path) -> Model:
    return load_model(model_file, "cpu")


@pytest.fixture
def log(tmp_path: Path, model: Model) -> Iterator[MatchLog]:
    log = MatchLog.open(tmp_path / "log.db")
    log.use_model(model)
    yield log
    log.close()


@pytest.fixture
def filled(log: MatchLog, model: Model) -> MatchLog:
    no_match = replace(match("/drop/b/no.png", 3), status="no-match", score=0.2)
    failed = replace(match("/drop/bad.png", 4), status="failed", score=None, error="cut")
    log.record([match("/drop/a/1.png", 1), match("/drop/b/2.png", 2, 0.6, "hat")], model)
    log.record([no_match, failed, match("/drop/bb/5.png", 5, 0.7, "coat")], model)
    return log


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ((), "5 2 1"),
        (("--status", "no-match"), "no"),
        (("--status", "failed"), "bad"),
        (("--status", "all"), "5 bad no 2 1"),
        (("--since", "1970-01-01T00:00:02"), "5 2"),
        (("--until", "1970-01-01T00:00:02"), "1"),
        (("--min-score", "0.65"), "5 1"),
        (("--max-score", "0.65"), "2"),
        (("--folder", "/drop/b", "--status", "all"), "no 2"),
        (("--folder", "/drop/a/../bb/"), "5"),
        (("--product", "hat"), "2"),
        (("--limit", "1"), "5"),
    ],
)
def test_filters_narrow_the_list(
    filled: MatchLog, run_tool: Run, options: tuple[str, ...], names: str
) -> None:
    result = run_tool("pic-matches", "--database", filled.path, "--json", *options)
    paths = [Path(json.loads(line)["path"]) for line in result.stdout.splitlines()]
    assert " ".join(path.stem for path in paths) == names


def test_the_table_is_aligned_and_names_products_verdicts_and_reasons(
    filled: MatchLog, run_tool: Run
) -> None:
    asked = "--database", filled.path, "--status", "all"
    lines = run_tool("pic-matches", *asked).stdout.splitlines()
    head, *rows = lines
    for title, values in (
        ("PATH", ["/drop/bb/5.png", "/drop/bad.png  (cut)", "/drop/b/no.png"]),
        ("PRODUCT", ["coat", "-", "-", "hat"]),
        ("VERDICT", ["match", "failed", "no-match"]),
        ("TIME", ["1970-01-01T00:00:05.000Z"]),
    ):
        for value, line in zip(values, rows, strict=False):
            assert line[head.index(title) :].startswith(value), (title, line)
    assert [line[head.index("SCORE") - 3 :].split()[0] for line in rows[:2]] == [
        "0.700000",
        "-",
    ]


def test_csv_and_json_hold_the_same(filled: MatchLog, run_tool: Run) -> None:
    asked = "--database", filled.path, "--status", "all"
    text = run_tool("pic-matches", *asked, "--csv").stdout
    table = list(csv.DictReader(io.StringIO(text)))
    lines = run_tool("pic-matches", *asked, "--json").stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert table == [
        {name: "" if value is None else str(value) for name, value in record.items()}
        for record in records
    ]
    assert [row["error"] for row in table] == ["", "cut", "", "", ""]


def test_no_name_and_no_reason_breaks_a_line_or_ends_the_list(
    log: MatchLog, model: Model, run_tool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = replace(match("/drop/bad\n.png", 4), status="failed", score=None)
    log.record([replace(failed, error="cut\n\x1b[2J"), match("/drop/jörg.png", 1)], model)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for options in ((), ("--csv",), ("--json",)):
        asked = "--database", log.path, "--status", "all", *options
        result = run_tool("pic-matches", *asked)
        assert result.returncode == 0, result.stderr
        escaped = "j\\u00f6rg.png" if "--json" in options else "j\\xf6rg.png"
        assert escaped in result.stdout
        if not options:
            assert len(result.stdout.splitlines()) == 3
            assert "bad\\n.png  (cut\\n\\x1b[2J)" in result.stdout


class Follower:
    """`pic-matches --follow` in a process of its own, read line by line."""

    def __init__(self, database: Path, *options: str) -> None:
        command = [BIN / "pic-matches", "--database", database, "--follow", *options]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._limit = threading.Timer(60, self.process.kill)
        self._limit.start()

    def name(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        return Path(json.loads(line)["path"]).stem

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate()
        self._limit.cancel()
        return self.process.returncode, errors


def test_follow_prints_what_is_there_and_then_what_comes_each_once(
    filled: MatchLog, model: Model
) -> None:
    follower = Follower(filled.path, "--json", "--limit", "2")
    assert [follower.name() for _ in range(2)] == ["2", "5"]
    no_match = replace(match("/drop/6.png", 6), status="no-match", score=0.1)
    filled.record([no_match, match("/drop/7.png", 7)], model)
    assert follower.name() == "7"
    # The clock was set back; a failed row makes way, so that its id is used again.
    filled.record([replace(match("/drop/8.png", 8), status="failed", score=None,
                           error="cut", sha256="cut")], model)  # fmt: skip
    filled.record([match("/drop/8.png", 1)], model)
    assert follower.name() == "8"
    # Scored again, as `pic-daemon reclassify` has it done: the row was there before.
    filled.record([replace(no_match, status="match", score=0.9)], model)
    assert follower.name() == "6"
    follower.process.send_signal(signal.SIGINT)
    assert follower.end() == (130, "")


def test_the_table_names_products_from_the_first_that_has_one() -> None:
    rows: list[Row] = [
        {"classified_at": "now", "score": 0.9, "status": "match", "path": f"/drop/{n}.png",
         "error": None, "catalog_item": item}
        for n, item in enumerate([None, None, "coat.png", None])
    ]  # fmt: skip
    written = io.StringIO()
    show = printer("table", written)
    for row in rows:
        show([row])
    lines = written.getvalue().splitlines()
    assert ["PRODUCT" in line for line in lines] == [False] * 3 + [True, False, False]
    assert lines[4].index("coat.png") == lines[3].index("PRODUCT")
    assert lines[5].index("/drop/3.png") == lines[3].index("PATH")


def test_follow_ends_when_nobody_reads_any_more(filled: MatchLog) -> None:
    follower = Follower(filled.path, "--json")
    assert follower.name() == "1"
    assert follower.process.stdout
    follower.process.stdout.close()  # no row comes: it must notice by itself
    follower.process.stdout = None
    assert follower.end() == (0, "")


def test_follow_narrows_what_comes_too(filled: MatchLog, model: Model) -> None:
    follower = Follower(filled.path, "--json", "--folder", "/drop/b")
    assert follower.name() == "2"
    filled.record([match("/drop/a/6.png", 6), match("/drop/b/7.png", 7)], model)
    assert follower.name() == "7"
    follower.process.terminate()
    follower.end()


def test_a_backup_made_while_the_service_writes_is_whole_and_private(
    filled: MatchLog, model: Model, run_tool: Run, tmp_path: Path
) -> None:
    output = tmp_path / "copy.db"
    output.touch()  # empty: as good as a log that holds nothing
    ended = threading.Event()

    def write() -> None:
        log = MatchLog.open(filled.path)
        number = 0
        while not ended.is_set():
            number += 1  # two rows at a time: none, or both
            log.record(
                [match(f"/drop/{number}{s}.png", number) for s in ("left", "right")], model
            )
        log.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2):  # the second replaces the first
            result = run_tool("pic-matches", "backup", "--database", filled.path,
                              "--output", output)  # fmt: skip
            assert result.returncode == 0, result.stderr
            assert "integrity_check ok" in result.stdout
    finally:
        ended.set()
        writer.join()
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.glob("*copy*")} == {"copy.db"}
    with closing(sqlite3.connect(output)) as db:
        paths = [path for (path,) in db.execute("SELECT path FROM images")]
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    lefts, rights = ({p.removesuffix(f"{side}.png") for p in paths if side in p}
                     for side in ("left", "right"))  # fmt: skip
    assert lefts == rights and "/drop/1" in lefts
    listed = run_tool("pic-matches", "--database", output, "--product", "hat")
    assert "/drop/b/2.png" in listed.stdout


def test_a_backup_replaces_nothing_but_an_earlier_copy(
    filled: MatchLog, run_tool: Run, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("notes " * 100)
    busy = MatchLog.open(tmp_path / "busy.db")
    cases: list[tuple[Any, str]] = [
        (tmp_path / "notes.txt", "not a database"),
        (filled.path, "is the database itself"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "copy.db", "folder does not exist"),
        (tmp_path / "busy.db", "is in use"),
    ]
    for output, sentence in cases:
        result = run_tool("pic-matches", "backup", "--database", filled.path,
                          "--output", output)  # fmt: skip
        assert (result.returncode, result.stdout) == (2, "")
        assert sentence in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "notes " * 100
    busy.close()


def test_a_backup_replaces_a_copy_that_was_asked_as_a_log(
    filled: MatchLog, run_tool: Run, tmp_path: Path
) -> None:
    command = ["pic-matches", "backup", "--database", filled.path,
               "--output", tmp_path / "copy.db"]  # fmt: skip
    assert run_tool(*command).returncode == 0
    log = MatchLog.open(tmp_path / "copy.db")
    with closing(open_read_only(log.path)) as reader:
        reader.execute("SELECT * FROM images").fetchone()
        log.close()
    assert (tmp_path / "copy.db-wal").exists()  # a reader may not take it away
    again = run_tool(*command)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "copy.db-wal").exists()


def test_a_backup_that_is_ended_leaves_no_half_behind(
    filled: MatchLog, run_tool: Run, tmp_path: Path
) -> None:
    place = tmp_path / "backup"
    place.mkdir()
    old, young = place / ".copy.db.abc.part", place / ".copy.db.abd.part"
    for half in (old, young):
        half.write_bytes(b"half a copy")
    os.utime(old, (0, 0))
    output = place / "copy.db"
    backup = "backup", "--database", filled.path, "--output", output
    assert run_tool("pic-matches", *backup).returncode == 0
    assert sorted(place.iterdir()) == [young, output]  # which may be under way
    young.unlink()
    log = sqlite3.connect(filled.path)  # makes it large, so that copying takes a while
    log.execute("CREATE TABLE ballast (x)")
    log.execute("INSERT INTO ballast VALUES (zeroblob(300000000))")
    log.commit()
    log.close()
    process = subprocess.Popen([BIN / "pic-matches", *map(str, backup)])
    while len(list(place.iterdir())) == 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143  # ended by it, not done before
    assert list(place.iterdir()) == [output]


def test_a_backup_by_a_link_replaces_what_the_link_names(
    filled: MatchLog, run_tool: Run, tmp_path: Path
) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link.db"
    link.symlink_to("far/copy.db")
    for _ in range(2):  # the copy is not there yet, and then is
        backup = "backup", "--database", filled.path, "--output", link
        assert run_tool("pic-matches", *backup).returncode == 0
        assert link.is_symlink()
        assert (tmp_path / "far" / "copy.db").stat().st_size


def test_a_damaged_log_makes_no_backup(
    filled: MatchLog, run_tool: Run, tmp_path: Path
) -> None:
    # An index that does not agree with its table: only a check of every entry sees it.
    with closing(sqlite3.connect(filled.path)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = 'CREATE INDEX images_by_revision ON "
                   "images (latency_ms)' WHERE name = 'images_by_revision'")  # fmt: skip
        db.commit()
    result = run_tool("pic-matches", "backup", "--database", filled.path,
                      "--output", tmp_path / "copy.db")  # fmt: skip
    assert result.returncode == 1
    assert "the copy is damaged" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.glob("*copy*")) == []


def test_a_backup_clears_away_the_halves_of_its_own_name_alone(
    filled: MatchLog, run_here: Run, tmp_path: Path
) -> None:
    place = tmp_path / "backup"
    place.mkdir()
    own, other = place / ".copy[1].db.abc.part", place / ".copy1.db.abc.part"
    for half in (own, other):
        half.write_bytes(b"half a copy")
        os.utime(half, (0, 0))
    output = place / "copy[1].db"
    backup = "backup", "--database", filled.path, "--output", output
    assert run_here("pic-matches", *backup).returncode == 0
    assert set(place.iterdir()) == {other, output}


@pytest.mark.parametrize(
    "options", [("--json", "--csv"), ("--follow", "--until", "2999-01-01")]
)
def test_options_that_exclude_each_other_are_refused(
    options: tuple[str, ...], run_here: Run, tmp_path: Path
) -> None:
    result = run_here("pic-matches", "--database", tmp_path / "log.db", *options)
    assert result.returncode == 2
    assert f"{options[0]} and {options[1]} exclude each other" in result.stderr


def test_two_programs_may_bring_a_log_up_to_date_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, apply = tmp_path / "log.db", migrations.apply
    with closing(Database(path)) as earlier:
        apply(earlier, stop_before="add_revision")

    def second(db: Database) -> None:
        """As `apply` is when another has just done what it found to do."""
        with closing(Database(path)) as other:
            apply(other)
        db.execute("ALTER TABLE images ADD COLUMN revision INTEGER")

    monkeypatch.setattr(migrations, "apply", second)
    with closing(MatchLog.open(path)) as log:
        assert not migrations.pending(log._db)


def test_a_list_that_cannot_be_printed_is_said_to_be(run_tool: Run, tmp_path: Path) -> None:
    MatchLog.open(tmp_path / "log.db").close()
    command = [str(BIN / "pic-matches"), "--database", str(tmp_path / "log.db"), "--csv"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "Error: cannot print: No space left on device" in result.stderr


def test_a_list_that_is_cut_short_says_so(
    model: Model, run_tool: Run, tmp_path: Path
) -> None:
    with closing(MatchLog.open(tmp_path / "log.db")) as log:
        log.use_model(model)
        log.record([match(f"/drop/{number}.png", 3) for number in range(60)], model)
    command = ("pic-matches", "--database", tmp_path / "log.db", "--csv")
    assert "at most 50 are shown" in run_tool(*command).stderr
    assert run_tool(*command, "--limit", 50).stderr == ""


def test_a_backup_replaces_nothing_but_a_file(run_tool: Run, tmp_path: Path) -> None:
    MatchLog.open(tmp_path / "log.db").close()
    os.mkfifo(tmp_path / "pipe")
    command = ("pic-matches", "backup", "--database", tmp_path / "log.db", "--output")
    result = run_tool(*command, tmp_path / "pipe")
    assert result.returncode == 2
    assert (tmp_path / "pipe").is_fifo()


def test_a_log_of_an_earlier_version_is_followed_in_the_order_of_its_rows(
    model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "log.db"
    with closing(Database(path)) as earlier:
        migrations.apply(earlier, stop_before="add_revision")
        for number in (1, 2, 7):
            earlier["images"].insert(
                {"id": number, "path": f"/drop/{number}.png", "sha256": "", "bytes": 9,
                 "status": "match", "score": 0.9, "seen_at": "", "latency_ms": 0.0,
                 "classified_at": iso_time(number), "mtime_ns": 5, "inode": 7}
            )  # fmt: skip
    with closing(MatchLog.open(path)) as log:
        log.use_model(model)
        more = iter(["/drop/8.png", "/drop/9.png"])

        def recorded() -> bool:
            if new := next(more, None):
                log.record([match(new, 3)], model)
            return new is not None

        looks = list(follow_images(path, Filters(), 50, recorded))
    assert [[Path(row["path"]).stem for row in rows] for rows in looks] == [
        ["1", "2", "7"],
        ["8"],
        ["9"],
    ]
    assert [row["revision"] for rows in looks for row in rows] == [1, 2, 7, 8, 9]
