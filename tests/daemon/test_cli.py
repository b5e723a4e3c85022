import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BIN, INFO, DaemonProcess, write_image, write_model
from shop import Shop
from sqlite_utils import Database

from pic_daemon.config import Config
from pic_daemon.errors import InputError
from pic_daemon.folders import Mount, stamp_of
from pic_daemon.match_log import MatchLog

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_classify_prints_one_line_per_image(
    run_tool: Run, model_file: Path, tmp_path: Path
) -> None:
    paths = [write_image(tmp_path / f"{level}.png", level) for level in (204, 51)]
    result = run_tool("pic-classify", "--model", model_file, *paths)
    assert result.returncode == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["match", "0.800000"],
        ["no-match", "0.200000"],
    ]


def test_classify_as_json_names_what_it_could_not_read(
    run_tool: Run, model_file: Path, tmp_path: Path
) -> None:
    good = write_image(tmp_path / "good.png", 230)
    os.mkfifo(tmp_path / "pipe.png")
    bad = ("missing.png", tmp_path / "pipe.png")
    result = run_tool("pic-classify", "--model", model_file, "--json", good, *bad)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["match", "failed", "failed"]
    assert [row["error"] for row in rows[1:]] == ["no such file", "no regular file"]
    assert result.returncode == 2
    assert "2 of 3 images could not be classified" in result.stderr


def test_verdicts_that_cannot_be_printed_are_said_to_be(
    model_file: Path, tmp_path: Path
) -> None:
    picture = write_image(tmp_path / "good.png", 230)
    command = [str(BIN / "pic-classify"), "--model", str(model_file), str(picture)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "Error: cannot print: No space left on device" in result.stderr


def test_check_tells_what_the_service_would_run_on(
    run_tool: Run, model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "drop" / "sub").mkdir(parents=True)
    options = [
        "--watch",
        tmp_path / "drop",
        "--model",
        model_file,
        "--database",
        tmp_path / "l.db",
    ]
    result = run_tool("pic-daemon", "check", *options)
    assert result.returncode == 0, result.stderr
    assert "ExecutionProvider (" in result.stdout
    assert f"folder {tmp_path / 'drop'}: file system " in result.stdout
    assert "inotify: 2 watches needed, " in result.stdout
    assert not (tmp_path / "l.db").exists()
    (tmp_path / "pic.toml").write_text(
        f'model = "{model_file}"\ndatabase = "l.db"\n'
        '[[watch]]\npath = "drop"\nmode = "poll"\n'
    )
    polled = run_tool("pic-daemon", "check", "--config", tmp_path / "pic.toml")
    assert "inotify: 0 watches needed, " in polled.stdout


@pytest.mark.parametrize(
    ("kind", "mode", "note"),
    [
        ("nfs4", "events", ', announces nothing: set mode = "poll"'),
        ("fuse.sshfs", "events", ', announces nothing: set mode = "poll"'),
        ("nfs4", "poll", ""),
        ("ext4", "events", ""),
    ],
)
def test_check_says_of_a_folder_whether_its_file_system_announces_nothing(
    kind: str, mode: str, note: str, run_here: Run, model_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pic_daemon.cli.mount_of", lambda _: Mount("/mnt", kind))
    (tmp_path / "drop").mkdir()
    (tmp_path / "pic.toml").write_text(
        f'model = "{model_file}"\ndatabase = "l.db"\n'
        f'[[watch]]\npath = "drop"\nmode = "{mode}"\n'
    )
    result = run_here("pic-daemon", "check", "--config", tmp_path / "pic.toml")
    line = f"folder {tmp_path / 'drop'}: file system {kind}{note}"
    assert line in result.stdout.splitlines()


def test_check_refuses_folders_that_need_more_watches_than_are_left(
    run_here: Run, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drop" / "sub").mkdir(parents=True)
    check = ["check", "--watch", tmp_path / "drop", "--model", model_file]
    check += ["--database", tmp_path / "l.db"]
    for left, code in ((2, 0), (1, 2)):
        monkeypatch.setattr("pic_daemon.cli.watches_left", lambda _, left=left: left)
        result = run_here("pic-daemon", *check)
        assert result.returncode == code
        assert f"inotify: 2 watches needed, {left} left" in result.stdout
    assert "raise fs.inotify.max_user_watches with sysctl" in result.stderr
    monkeypatch.undo()
    for left, code in ((1, 0), (0, 2)):
        monkeypatch.setattr("pic_daemon.cli.instances_left", lambda _, left=left: left)
        result = run_here("pic-daemon", *check)
        assert result.returncode == code
    assert "raise fs.inotify.max_user_instances with sysctl" in result.stderr


def test_wrong_input_ends_with_a_sentence_and_exit_code_2(
    run_tool: Run, run_here: Run, model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "drop").mkdir()
    (tmp_path / "notes.txt").write_text("notes " * 100)
    good = {
        "--watch": tmp_path / "drop",
        "--model": model_file,
        "--database": tmp_path / "l.db",
    }
    cases: list[tuple[dict[str, Path], str]] = [
        ({"--watch": tmp_path / "none"}, "does not exist"),
        ({"--model": tmp_path / "notes.txt"}, "is not an ONNX model"),
        ({"--model": tmp_path / "none.onnx"}, "No such file"),
        ({"--database": tmp_path / "notes.txt"}, "file is not a database"),
        ({"--database": tmp_path / "drop" / "l.db"}, "lies in the watch folder"),
        ({"--database": tmp_path / "none" / "l.db"}, "folder does not exist"),
    ]
    for number, (change, sentence) in enumerate(cases):
        for command in ("check", "run"):
            options = [part for pair in {**good, **change}.items() for part in pair]
            run = run_here if number else run_tool
            result = run("pic-daemon", command, *options)
            assert (result.returncode, result.stdout) == (2, "")
            assert sentence in result.stderr
            assert "Traceback" not in result.stderr
    assert not (tmp_path / "l.db").exists()


def test_matches_come_as_table_json_and_csv_while_the_daemon_runs(
    run_tool: Run, daemon: DaemonProcess
) -> None:
    daemon.start()
    write_image(daemon.drop / "bright.png", 204)
    write_image(daemon.drop / "white\nline.png", 230)
    write_image(daemon.drop / "black.png", 25)
    daemon.wait_for_rows(3)
    log = ("pic-matches", "--database", daemon.database)

    table = run_tool(*log).stdout.splitlines()
    assert table[0].split() == ["TIME", "SCORE", "VERDICT", "PATH"]
    assert {line.split()[1] for line in table[1:]} == {"0.800000", "0.901961"}
    assert len({line.index(str(daemon.drop)) for line in table[1:]}) == 1
    (row,) = (
        json.loads(line)
        for line in run_tool(*log, "--json", "--min-score", 0.85).stdout.splitlines()
    )
    assert row["path"] == str(daemon.drop / "white\nline.png")
    records = list(
        csv.DictReader(run_tool(*log, "--csv", "--since", "1h").stdout.splitlines(True))
    )
    assert sorted(round(float(r["score"]), 3) for r in records) == [0.8, 0.902]
    assert run_tool(*log, "--since", "2999-01-01").stdout == ""

    plain = run_tool("sqlite-utils", daemon.database, "select * from matches")
    assert len(json.loads(plain.stdout)) == 2


def test_matches_refuses_what_is_no_match_log(run_tool: Run, tmp_path: Path) -> None:
    Database(tmp_path / "songs.db")["songs"].insert({"title": "x"})
    for name, sentence in (("none.db", "does not exist"), ("songs.db", "another program")):
        result = run_tool("pic-matches", "--database", tmp_path / name)
        assert result.returncode == 2
        assert sentence in result.stderr
    for since in ("soon", "9999999d", "0001-01-01T00:00+05:00"):
        result = run_tool("pic-matches", "--database", tmp_path / "n.db", "--since", since)
        assert result.returncode == 2 and "neither a span like 2h" in result.stderr


def test_an_archive_is_classified_once_and_what_is_new_later(
    run_tool: Run, model_file: Path, tmp_path: Path
) -> None:
    for number in range(20):
        write_image(tmp_path / "archive" / "deep" / f"{number}.png", 100 + 5 * number)
    (tmp_path / "archive" / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "archive" / "a.heic").touch()
    options = ["--model", model_file, "--recursive", tmp_path / "archive"]
    options += ["--database", tmp_path / "log.db"]
    first = run_tool("pic-classify", *options)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("1 failed, 14 match, 6 no-match;")
    assert "note: 1 files are no images by their names: 1 .heic\n" in first.stderr
    write_image(tmp_path / "archive" / "late.png", 200)
    second = run_tool("pic-classify", *options)
    assert second.stdout.startswith("1 match;")
    asked = run_tool("pic-classify", *options, "--json")
    assert asked.returncode == 2 and "--json goes with IMAGE" in asked.stderr
    options[3], options[5] = tmp_path / "arhive", tmp_path / "other.db"
    mistyped = run_tool("pic-classify", *options)
    assert mistyped.returncode == 2 and "is not a folder" in mistyped.stderr
    assert not (tmp_path / "other.db").exists()
    assert len(list(Database(tmp_path / "log.db").query("SELECT * FROM images"))) == 22


def test_a_retry_counts_failed_attempts_anew(run_here: Run, tmp_path: Path) -> None:
    with closing(MatchLog.open(tmp_path / "log.db")) as log:
        log.take_in_hand(["/drop/a.png"])
        assert [log.strike("/drop/a.png") for _ in range(2)] == [1, 2]
        run_here("pic-daemon", "retry", "--database", log.path)
        assert log.struck() == []
        log.take_in_hand(["/drop/a.png"])
        assert log.strike("/drop/a.png") == 1


def test_failed_images_are_not_scored_again_by_reclassify(
    run_here: Run, tmp_path: Path
) -> None:
    shop = Shop(tmp_path / "shop")
    good, bad = shop.copy_of(1, "a.jpg"), shop.broken("b.jpg", "the file is empty")
    shop.log.beat({"model": "another"})
    result = run_here("pic-daemon", "reclassify", "--database", shop.database)
    assert result.stdout.startswith("1 images will be scored again")
    for path, known in ((good, False), (bad, True)):
        stamp = stamp_of(str(path))
        assert stamp and bool(shop.log.row_of(str(path), stamp)) == known


def test_a_link_to_itself_is_no_file(
    model_file: Path, run_tool: Run, tmp_path: Path
) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    good = write_image(tmp_path / "good.png", 200)
    result = run_tool("pic-classify", "--model", model_file, tmp_path / "loop.jpg", good)
    assert result.returncode == 2
    assert "failed" in result.stdout and "match" in result.stdout
    assert "Traceback" not in result.stderr


FILES = 3_000  # more than are done before a test notices the first


def write_archive(home: Path, count: int, side: int) -> Path:
    """A log, and a folder of so many pictures: one is drawn, the others are links to it."""
    MatchLog.open(home / "log.db").close()
    first = write_image(home / "archive" / "0.png", 200, side)
    for number in range(1, count):
        first.with_name(f"{number}.png").hardlink_to(first)
    return first.parent


def test_an_archive_that_was_stopped_goes_on(model_file: Path, tmp_path: Path) -> None:
    archive = write_archive(tmp_path, FILES, side=400)
    command = [BIN / "pic-classify", "--model", model_file]
    command += ["--recursive", archive, "--database", tmp_path / "log.db"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE)
    rows = Database(tmp_path / "log.db")["images"]
    while not rows.count:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Aborted" in told
    assert 0 < rows.count < FILES
    assert subprocess.run([*map(str, command)], capture_output=True).returncode == 0
    assert len({row["path"] for row in rows.rows}) == rows.count == FILES


def test_an_archive_that_goes_away_is_no_archive_done(
    model_file: Path, tmp_path: Path
) -> None:
    archive = write_archive(tmp_path, FILES, side=400)
    command = [BIN / "pic-classify", "--model", model_file, "--recursive", archive]
    words = [*map(str, command), "--database", str(tmp_path / "log.db")]
    for pause in (False, True):  # before and after the service looks at its folder again
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        rows = Database(tmp_path / "log.db")["images"]
        before = rows.count
        while rows.count == before:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        archive.rename(tmp_path / "away")
        time.sleep(6 if pause else 0)
        process.send_signal(signal.SIGCONT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"{archive} went away" in told and "goes on from here" in told
        assert 0 < rows.count < FILES
        (tmp_path / "away").rename(archive)
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert len({row["path"] for row in rows.rows}) == rows.count == FILES


def test_files_that_go_from_an_archive_meanwhile_are_counted(
    model_file: Path, tmp_path: Path
) -> None:
    # So few that the service knows of all from the beginning, and slow ones.
    archive = write_archive(tmp_path, 900, side=1_200)
    command = [BIN / "pic-classify", "--model", model_file]
    command += ["--recursive", archive, "--database", tmp_path / "log.db"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    rows = Database(tmp_path / "log.db")["images"]
    while not rows.count:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    for file in archive.iterdir():
        file.unlink()
    process.send_signal(signal.SIGCONT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    gone = int(told.split(" gone before they were read")[0].split()[-1])
    assert gone + rows.count == 900


def test_an_archive_does_not_go_into_the_log_of_a_service_that_runs(
    daemon: DaemonProcess, run_tool: Run, tmp_path: Path
) -> None:
    write_image(tmp_path / "archive" / "a.png", 200)
    bulk = ("--recursive", tmp_path / "archive", "--database", daemon.database)
    daemon.start()
    refused = run_tool("pic-classify", "--model", daemon.model, *bulk)
    assert refused.returncode == 1
    assert "another pic-daemon serves it" in refused.stderr
    assert daemon.stop() == 0
    assert run_tool("pic-classify", "--model", daemon.model, *bulk).returncode == 0


def test_a_service_does_not_go_into_the_log_that_an_archive_fills(
    daemon: DaemonProcess, run_tool: Run, tmp_path: Path
) -> None:
    archive = write_archive(tmp_path, 900, side=1_200)
    link = tmp_path / "link.db"  # another name of the same log
    link.symlink_to(tmp_path / "log.db")
    command = [BIN / "pic-classify", "--model", daemon.model, "--recursive", archive]
    command += ["--database", tmp_path / "log.db"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    rows = Database(tmp_path / "log.db")["images"]
    while not rows.count:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    service = ("--watch", daemon.drop, "--model", daemon.model, "--database", link)
    refused = run_tool("pic-daemon", "run", *service)
    assert refused.returncode == 1
    assert "or pic-classify fills it" in refused.stderr
    process.kill()
    process.wait()
    status = run_tool("pic-daemon", "status", "--database", link)
    assert status.returncode == 1
    assert status.stdout.startswith("the service was stopped")
    again = subprocess.run([*map(str, command)], capture_output=True)
    assert (again.returncode, rows.count) == (0, 900)


def test_an_archive_says_what_another_model_decided(
    model_file: Path, run_tool: Run, tmp_path: Path
) -> None:
    write_image(tmp_path / "archive" / "a.png", 200)
    bulk = ("--recursive", tmp_path / "archive", "--database", tmp_path / "log.db")
    first = run_tool("pic-classify", "--model", model_file, *bulk)
    assert first.stdout.startswith("1 match;") and "note" not in first.stderr
    other = write_model(
        tmp_path / "other.onnx", replace(INFO, threshold=0.9999).to_metadata()
    )
    second = run_tool("pic-classify", "--model", other, *bulk)
    assert second.stdout.startswith("nothing new;")
    assert "1 were decided by another model or index" in second.stderr
    run_tool("pic-daemon", "reclassify", "--database", tmp_path / "log.db")
    third = run_tool("pic-classify", "--model", other, *bulk)
    assert third.stdout.startswith("1 no-match;") and "note" not in third.stderr
    elsewhere = ("--recursive", write_image(tmp_path / "b" / "b.png", 200).parent)
    fourth = run_tool("pic-classify", "--model", model_file, *elsewhere, *bulk[2:])
    assert fourth.stdout.startswith("1 match;") and "note" not in fourth.stderr


def test_an_archive_stays_on_the_provider_that_was_asked_for(
    model_file: Path, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config, *_: object, **__: object) -> None:
        raise InputError(f"would load on {config.provider}")

    monkeypatch.setattr("pic_daemon.bulk.Service", refuse)
    (tmp_path / "archive").mkdir()
    result = run_here(
        "pic-classify", "--model", model_file, "--provider", "cpu",
        "--recursive", tmp_path / "archive", "--database", tmp_path / "log.db",
    )  # fmt: skip
    assert "would load on cpu" in result.stderr


def test_an_archive_of_which_a_part_may_not_be_read_is_not_done(
    model_file: Path, tmp_path: Path
) -> None:
    write_image(tmp_path / "archive" / "a.png", 200)
    shut = write_image(tmp_path / "archive" / "shut" / "b.png", 200).parent
    shut.chmod(0)
    # Root may read everything, but for these two rights.
    bounds = "--bounding-set=-dac_override,-dac_read_search"
    under = ["setpriv", bounds, "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [*under, BIN / "pic-classify", "--model", model_file]
    command += ["--recursive", tmp_path / "archive", "--database", tmp_path / "log.db"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    shut.chmod(0o755)
    assert done.returncode == 1
    assert done.stdout.startswith("1 match;")
    assert f"1 folders or files cannot be looked at, first {shut}" in done.stderr


def test_an_archive_without_pictures_is_said_to_be(
    model_file: Path, run_tool: Run, tmp_path: Path
) -> None:
    (tmp_path / "archive").mkdir()
    bulk = ("--recursive", tmp_path / "archive", "--database", tmp_path / "log.db")
    result = run_tool("pic-classify", "--model", model_file, *bulk)
    assert result.stdout.startswith(f"no image files in {tmp_path / 'archive'};")


def test_a_name_breaks_no_line_and_needs_no_encoding(
    model_file: Path, tmp_path: Path
) -> None:
    names = ("\n".join(["a", "match vip.png"]), "写真.png")
    paths = [write_image(tmp_path / name, 200) for name in names]
    command = [str(BIN / "pic-classify"), "--model", str(model_file), *map(str, paths)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize("option", ["--watch", "--failed-folder", "--database"])
def test_an_empty_path_is_not_the_current_folder(
    model_file: Path, run_here: Run, tmp_path: Path, option: str
) -> None:
    options = ("--watch", tmp_path, "--model", model_file, "--database", tmp_path / "l.db")
    result = run_here("pic-daemon", "check", *options, option, "")
    assert result.returncode == 2
    assert "an empty path" in result.stderr


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_log_is_a_file(
    model_file: Path, run_here: Run, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    database = tmp_path / "log.db"
    make(database)
    (tmp_path / "drop").mkdir()
    options = ("--watch", tmp_path / "drop", "--model", model_file, "--database", database)
    result = run_here("pic-daemon", "check", *options)
    assert result.returncode == 2
    assert "is a folder or a device; name a file" in result.stderr


def test_matches_without_a_commands_name_are_the_list(
    run_tool: Run, tmp_path: Path
) -> None:
    database = tmp_path / "log.db"
    MatchLog.open(database).close()
    for words in ((), ("list",)):
        result = run_tool("pic-matches", *words, "--database", database)
        assert (result.returncode, result.stdout) == (0, "")
        assert result.stderr == "no matches\n"
    assert "\n  list " in run_tool("pic-matches", "--help").stdout
    assert run_tool("pic-matches", "--version").returncode == 0
    assert "Missing option '--database'" in run_tool("pic-matches").stderr


def test_without_the_web_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'datasette' else find(name)\n"
        "from pic_daemon.matches_cli import matches; matches()"
    )
    command = [sys.executable, "-c", code, "serve", "--database", str(tmp_path / "log.db")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install '.[web]'" in result.stderr
