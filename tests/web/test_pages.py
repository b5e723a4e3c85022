"""The pages as a program asks for them, of a real process."""

import asyncio
import csv
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from html import unescape
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import BIN, DaemonProcess, hung_mount, mounted, write_image
from PIL import Image
from shop import Shop, Site, serving

from pic_daemon.corrections import read_corrections
from pic_daemon.errors import InputError
from pic_daemon.folders import FileStamp
from pic_daemon.match_log import Outcome
from pic_daemon.web import disk, pages, server
from pic_daemon.web.server import make_app, prepare

Run = Callable[..., subprocess.CompletedProcess[str]]


def names(page: httpx.Response) -> list[str]:
    assert page.status_code == 200, page.text
    return [
        unescape(name)
        for name in re.findall(r'<h2 id="name-\d+"><a[^>]*>(.*?)</a>', page.text)
    ]


def test_matches_come_newest_first_with_their_pictures_and_figures(site: Site) -> None:
    page = site.get("/matches")
    assert names(page)[:3] == ["a & <b>.jpg", "tea.jpg", "00.jpg"]
    assert len(names(page)) == 30
    number = site.row("today/tea.jpg")
    for part in (
        f'src="/picture/{number}/dropped/small?', f'src="/picture/{number}/catalog/small?',
        "product-00003.jpg", "0.980", str(site.shop.drop / "today"),
        f"/log/images/{number}.json", f"/log/images.csv?id={number}",
    ):  # fmt: skip
        assert part in page.text
    assert "<b>" not in page.text


def test_filters_narrow_the_list_and_say_what_they_do_not_understand(site: Site) -> None:
    today = str(site.shop.drop / "today")
    for query, wanted in (
        (f"folder={today}", ["a & <b>.jpg", "tea.jpg"]),
        (f"folder={today}&status=all",
         ["a & <b>.jpg", "broken.jpg", "stranger.jpg", "tea.jpg"]),
        ("status=no-match", ["stranger.jpg"]),
        ("min=0.9", ["tea.jpg"]),
        ("product=product-00004.jpg", ["a & <b>.jpg", "04.jpg", "16.jpg", "28.jpg"]),
        ("from=2999-01-01T00:00", []),
    ):  # fmt: skip
        assert names(site.get(f"/matches?{query}")) == wanted, query
    shown = site.get("/matches?from=2026-11-24").text
    assert 'type="datetime-local" name="from" value="2026-11-24T00:00"' in shown
    beyond = site.get("/matches?to=9999-12-31T23:59:59.999999")
    assert beyond.status_code == 400
    refused = site.get("/matches?min=much")
    assert refused.status_code == 400
    assert "lowest score: &#39;much&#39; is no number from 0 to 1" in refused.text


def test_older_and_newer_lead_through_all_matches_and_back(site: Site) -> None:
    first = site.get("/matches")
    older = unescape(re.findall(r'href="(\S+)" rel="next"', first.text)[0])
    second = site.get(older)
    assert names(second) == [f"{number:02d}.jpg" for number in range(28, 40)]
    newer = unescape(re.findall(r'href="(\S+)" rel="prev"', second.text)[0])
    assert names(site.get(newer)) == names(first)
    assert 'rel="next"' not in second.text


def test_failures_have_a_page_with_their_reasons(site: Site) -> None:
    page = site.get("/failures")
    assert names(page) == ["broken.jpg"]
    assert "the file is empty" in page.text


def test_the_dashboard_counts_by_day_and_says_how_the_service_does(site: Site) -> None:
    site.shop.log.beat({"backlog": 7, "oldest_waiting_s": 2.5})  # now, however late it is
    text = re.sub(r"<[^>]+>|\s+", " ", site.get("/dashboard").text)
    assert re.search(r"Waiting +7 +the oldest for 2 s", text)
    assert "running" in text
    site.shop.log.beat({"backlog": 7, "oldest_waiting_s": 2.5, "offline": ["/srv/x"]})
    assert "offline: /srv/x" in site.get("/dashboard").text
    with site.shop.log._transaction():
        ahead = "UPDATE heartbeat SET at = '2999-01-01T00:00:00.000Z'"
        site.shop.log._db.execute(ahead)
    set_back = site.get("/dashboard").text
    assert "silent" in set_back and "the clock was set back" in set_back
    site.shop.log.beat({"backlog": 7, "oldest_waiting_s": 2.5})
    assert re.search(r"95% within \d+ ms; latest 44 images", text)
    assert sum(map(int, re.findall(r"\d{4}-\d\d-\d\d +(\d+) +\d+", text))) == 42


def test_a_record_and_a_list_are_given_as_json_and_csv(site: Site) -> None:
    number = site.row("today/tea.jpg")
    page = site.get(f"/record/{number}").text
    as_json, as_csv = (unescape(link) for link in re.findall(r'href="(/log/\S+)"', page))
    (record,) = site.get(as_json).json()["rows"]
    assert (record["id"], record["catalog_item"]) == (number, "product-00003.jpg")
    (line,) = csv.DictReader(io.StringIO(site.get(as_csv).text))
    assert line["path"] == record["path"]

    as_csv, as_json = exports(site, f"/matches?min=0.75&folder={site.shop.drop}")
    listed = [Path(row["path"]).name for row in csv_rows(as_csv)]
    assert listed == ["a & <b>.jpg", "tea.jpg"]
    assert as_csv.headers["content-disposition"].startswith("attachment")
    assert [Path(row["path"]).name for row in json_rows(as_json)] == listed
    for name, count in {"today": 2, "toda_": 0, "TODAY": 0}.items():
        found = csv_rows(site.get(f"/matches.csv?folder={site.shop.drop / name}"))
        assert len(found) == count
    refused = site.get("/matches.csv?min_score=0.9")
    assert refused.status_code == 400
    assert refused.text.startswith("'min_score' is none; filters are status, from, to,")


def test_a_list_of_many_parts_is_given_whole_or_broken_off(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    stamp = FileStamp(1, 2, 3)
    rows = [
        Outcome(f"{shop.drop}/{n:05d}.jpg", f"{n:064d}", stamp, "failed", n, n, error="x")
        for n in range(60_000)
    ]
    shop.log.record(rows, shop.model)
    shop.copy_of(1, "latest.jpg")
    with serving(shop) as url:
        site = Site(shop, url)
        as_csv, as_json = exports(site, "/matches?status=all")
        paths = [row["path"] for row in csv_rows(as_csv)]
        assert len(paths) == 60_001
        assert paths[:2] == [str(shop.drop / "latest.jpg"), str(shop.drop / "59999.jpg")]
        assert paths[1:] == sorted(paths[1:], reverse=True)
        assert [row["path"] for row in json_rows(as_json)] == paths
        assert len(csv_rows(exports(site, "/failures")[0])) == 60_000

        with httpx.stream("GET", f"{url}/matches.json?status=all", timeout=60) as answer:
            lines = answer.iter_lines()
            begun = [next(lines)]
            # As `pic-daemon reclassify` does: the row moves above those already sent.
            again = replace(rows[0], classified_at=time.time())
            shop.log.record([again], shop.model)
            listed = [json.loads(line)["path"] for line in [*begun, *lines]]
        assert listed == paths

        with httpx.stream("GET", f"{url}/matches.csv?status=all", timeout=60) as answer:
            parts = answer.iter_bytes(1000)
            next(parts)
            os.truncate(shop.database, 1 << 16)
            with pytest.raises(httpx.RemoteProtocolError):
                list(parts)


def test_a_list_that_nobody_takes_does_not_keep_the_log_from_being_tidied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(tmp_path)
    shop.copy_of(1, "a.jpg")
    app = make_app(shop.database, None, None)
    monkeypatch.setattr(pages, "_TAKEN_S", 0.1)
    scope = {"type": "http", "method": "GET", "path": "/matches.csv", "query_string": b"",
             "raw_path": b"/matches.csv", "headers": [(b"host", b"localhost")]}  # fmt: skip
    begun: list[bytes] = []

    async def never() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Future()  # as where the other side reads no more
        assert not begun, "an answer is begun once"
        begun.append(message["type"])

    with pytest.raises(AssertionError, match="begun once"):
        asyncio.run(asyncio.wait_for(app(scope, never, send), 60))
    (busy, *_) = next(shop.log._db.execute("PRAGMA wal_checkpoint(TRUNCATE)"))
    assert not busy


def exports(site: Site, page: str) -> list[httpx.Response]:
    """What the links above a list give, CSV and JSON."""
    links = re.findall(r'href="(/matches\.(?:csv|json)\?\S*)"', site.get(page).text)
    return [site.get(unescape(link)) for link in links]


def csv_rows(answer: httpx.Response) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(answer.text)))


def json_rows(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_pictures_are_small_jpegs_of_what_was_recorded(site: Site) -> None:
    number = site.row("today/tea.jpg")
    for of in ("dropped", "catalog"):
        reply = site.get(f"/picture/{number}/{of}/small")
        assert reply.headers["content-type"] == "image/jpeg"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["content-security-policy"] == "default-src 'none'"
        assert reply.headers.get_list("cache-control") == ["private, max-age=600"]
        image = Image.open(io.BytesIO(reply.content))
        assert max(image.size) <= 256 and len(reply.content) < 20_000
    for path in (f"/picture/{site.row('today/broken.jpg')}/dropped/small", "/matches"):
        assert site.get(path).headers.get_list("cache-control") == ["private, no-store"]


def test_a_picture_that_a_browser_keeps_is_not_shown_for_another(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    with serving(shop) as url:
        addresses = []
        for seed in (1, 2):
            shop.copy_of(seed, f"{seed}.jpg")
            page = httpx.get(f"{url}/matches").text
            addresses.append(re.findall(r'src="(/picture/1/\S+)"', page))
            with shop.log._db.conn:
                shop.log._db.execute("DELETE FROM images")  # so that the id is used again
    assert len(addresses[0]) == len(addresses[1]) == 2
    assert set(addresses[0]).isdisjoint(addresses[1])


@pytest.mark.parametrize(
    "path",
    ["/picture/999999/dropped/small", "/picture/1/dropped/huge",
     "/picture/1/elsewhere/small", "/picture/-1/dropped/small",
     "/picture/..%2f..%2fetc%2fpasswd/dropped/small",
     "/pic-static/..%2fqueries.py", "/pic-static/../queries.py", "/record/0",
     "/record/99999999999999999999", "/matches/1", "/nothing"],
)  # fmt: skip
def test_what_is_no_record_is_not_found(
    site: Site, path: str, get_as_written: Callable[..., tuple[int, HTTPMessage]]
) -> None:
    status, answer = get_as_written(site.url, path, {})
    if status == 302:  # Datasette's own, which writes % as ~
        status, _ = get_as_written(site.url, answer["location"], {})
    assert status == 404


def test_pages_take_no_script_and_nothing_from_elsewhere(site: Site) -> None:
    for path in ("/matches", "/failures", "/dashboard", "/record/1", "/record/0"):
        reply = site.get(path)
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; img-src 'self'; style-src 'self'")
        assert "frame-ancestors 'none'" in policy
        assert not re.search(r"<script|\son\w+=|\sstyle=|https?://", reply.text)


def test_datasettes_own_pages_cannot_write(site: Site) -> None:
    for sql in ("delete from images", "pragma journal_mode=delete", "attach 'x' as y"):
        assert site.get(f"/log.json?sql={sql}").status_code == 400
    assert httpx.get(site.url + "/log.db").status_code in (403, 404)


def test_a_correction_is_kept_with_name_and_time_and_shown(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(1, "a.jpg")
    with serving(shop) as url:
        for label in ("ours", "not-ours"):
            reply = httpx.post(
                f"{url}/record/1/correction",
                data={"label": label, "back": "/matches?min=0.5"},
            )
            assert reply.status_code == 303
            assert reply.headers["location"] == "/matches?min=0.5#record-1"
        (latest,) = read_corrections(shop.database)
        assert (latest.label, latest.path) == ("not-ours", str(shop.drop / "a.jpg"))
        assert latest.who
        page = httpx.get(f"{url}/matches").text
        assert 'value="not-ours" aria-pressed="true"' in page
        assert 'value="ours" aria-pressed="false"' in page
        assert httpx.get(f"{url}/record/1").text.count("<li>Not ours: ") == 1
        for data, status in (({"label": "mine"}, 400), ({}, 400)):
            assert httpx.post(f"{url}/record/1/correction", data=data).status_code == status
        assert (
            httpx.post(f"{url}/record/7/correction", data={"label": "ours"}).status_code
            == 404
        )
        elsewhere = httpx.post(
            f"{url}/record/1/correction", data={"label": "ours", "back": "//evil.example/"}
        )
        assert elsewhere.headers["location"] == "/record/1#record-1"
        odd = httpx.post(f"{url}/record/1/correction", content=b"label=\xff")
        assert odd.status_code == 400
        for data in ("label=ours&back=/record/1%0d%0aX-Evil:1", "label=ours&back=/log"):
            reply = httpx.post(
                f"{url}/record/1/correction",
                content=data,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
            )
            assert reply.headers["location"] == "/record/1#record-1"
    assert shop.log._db["corrections"].count == 3


def test_a_correction_from_a_page_of_another_picture_is_not_noted(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(1, "a.jpg")
    with serving(shop) as url:
        page = httpx.get(f"{url}/matches").text
        form = dict(re.findall(r'<input type="hidden" name="(\w+)" value="(.*?)">', page))
        with shop.log._db.conn:
            shop.log._db.execute("DELETE FROM images")
        shop.copy_of(2, "b.jpg")
        said = {**form, "label": "not-ours"}
        reply = httpx.post(f"{url}/record/1/correction", data=said)
        assert reply.status_code == 404
        assert "Not noted: record 1 is of another picture now" in reply.text
        assert read_corrections(shop.database) == []


def test_every_landmark_has_one_element_and_no_list_has_one_a_row(site: Site) -> None:
    page = site.get("/matches").text
    assert page.count("<search") == page.count('<search aria-label="Filters">') == 1
    assert 'role="search"' not in page
    named = re.findall(r"<form[^>]*(?:aria-label|role)=[^>]*>", page)
    assert named == []  # a form with a name is a landmark
    assert page.count('role="group" aria-label="Is ') == 30


def test_a_record_tells_what_decided_and_what_cannot_be_shown(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    joint = {"joint_score": 0.31, "joint_threshold": 0.42}
    shop.copy_of(1, "a.jpg", threshold=0.04, **joint).unlink()
    with serving(shop) as url:
        text = httpx.get(f"{url}/record/1").text
        assert 'alt="Dropped picture a.jpg: no longer there"' in text
        assert 'alt="Catalog picture product-00001.jpg"' in text
        plain = re.sub(r"<[^>]+>|\s+", " ", text)
        assert re.search(r"Joint score +0\.3100 +\(threshold 0\.4200\)", plain)
        assert re.search(r"Score +0\.9700 +\(looked at closely from 0\.0400\)", plain)
        shop.log.watch({})
        text = httpx.get(f"{url}/matches").text
        assert 'alt="Dropped picture a.jpg: not in a watched folder"' in text


def test_what_the_service_records_meanwhile_is_there_at_once(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    daemon.start()
    write_image(daemon.drop / "bright.png", 230)
    daemon.wait_for_rows(1)
    shop = Shop.__new__(Shop)
    shop.database, shop.catalog = daemon.database, tmp_path
    with serving(shop) as url:
        assert names(httpx.get(f"{url}/matches")) == ["bright.png"]
        assert httpx.get(f"{url}/picture/1/dropped/small").status_code == 200
        write_image(daemon.drop / "brighter.png", 240)
        daemon.wait_for_rows(2)
        assert names(httpx.get(f"{url}/matches")) == ["brighter.png", "bright.png"]
        for number in (1, 2):
            httpx.post(f"{url}/record/{number}/correction", data={"label": "ours"})
    assert len(read_corrections(daemon.database)) == 2
    assert daemon.stop() == 0


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_a_mount_that_hangs_holds_up_neither_pages_nor_pictures_nor_the_end(
    tmp_path: Path, ended_by: signal.Signals
) -> None:
    shop = Shop(tmp_path / "shop")
    fine, hung = shop.drop, shop.drop / "nas"  # watched by itself, as it is a mount
    shop.drop = hung
    shop.copy_of(3, "tea.jpg", at=50, score=0.98)
    shop.drop = fine
    shop.copy_of(4, "cup.jpg")
    shop.log.watch({hung: "", fine: ""})
    command = [BIN / "pic-matches", "serve", "--database", shop.database, "--port", "0",
               "--catalog", hung]  # fmt: skip
    with hung_mount(hung), ExitStack() as stack, ThreadPoolExecutor(4) as browsers:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.callback(server.kill)
        assert server.stdout
        url = server.stdout.readline().split()[1].rstrip("/")
        pictures = [
            browsers.submit(httpx.get, f"{url}/picture/1/dropped/small", timeout=60)
            for _ in range(4)  # more than are decoded at a time
        ]
        for page in ("/matches", "/record/1", "/picture/2/dropped/small"):
            assert httpx.get(url + page).status_code == 200
        assert [picture.result().status_code for picture in pictures] == [504] * 4
        assert "no answer" in pictures[0].result().text
        assert "tea.jpg: no answer yet" in httpx.get(f"{url}/record/1").text
        assert httpx.get(f"{url}/picture/2/dropped/large").status_code == 200
        server.send_signal(ended_by)
        server.communicate(timeout=60)


def test_a_log_that_does_not_answer_is_said_not_to(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(1, "a.jpg")
    with serving(shop) as url:
        shop.log._db.execute("DROP TABLE images")
        for page in ("/matches", "/dashboard", "/record/1", "/matches.csv"):
            reply = httpx.get(url + page)
            assert reply.status_code == 503
            assert "The database does not answer: no such table: images." in reply.text
        picture = httpx.get(f"{url}/picture/1/dropped/small")
        assert picture.status_code == 503
        assert "no answer" in picture.text


def test_wrong_input_is_refused_with_a_sentence(run_tool: Run, tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    short = tmp_path / "short"
    short.write_text("secret\n")
    long = tmp_path / "long"
    long.write_text("a-secret-of-many-letters\n")
    for file in (short, long):
        file.chmod(0o600)
    with serving(shop) as url:
        port = url.rsplit(":", 1)[1]
        for options, sentence in (
            (("--database", tmp_path / "none.db"), "does not exist"),
            (("--database", shop.database, "--port", port), "Address already in use"),
            (("--database", shop.database, "--host", "0.0.0.0"), "give --token-file"),
            (("--database", shop.database, "--host", "a..b", "--token-file", long),
             "cannot listen at a..b"),
            (("--database", shop.database, "--token-file", short), "at least 16 ASCII"),
            (("--database", shop.database, "--token-file", shop.database), "chmod o="),
        ):  # fmt: skip
            result = run_tool("pic-matches", "serve", *options)
            passes = "already in use" in sentence
            assert result.returncode == (1 if passes else 2)
            assert sentence in result.stderr
            assert "Traceback" not in result.stderr


def test_an_account_that_may_not_write_can_look_but_note_nothing(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    shop = Shop(tmp_path / "shop")
    for folder in (shop.home, *shop.home.parents):
        if not folder.stat().st_mode & 0o001:  # pytest's own are root's alone
            folder.chmod(0o755)

    def prepared_by_another() -> int:
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.setuid(65534)  # the child must not come back into pytest
        try:
            os._exit(0 if prepare(shop.database) is False else 1)
        except InputError as error:
            os._exit(3 if "start the service" in str(error) else 4)
        finally:
            os._exit(2)

    assert prepared_by_another() == 0
    shop.copy_of(1, "a.jpg")
    looking = Shop.__new__(Shop)
    looking.database, looking.catalog = tmp_path / "ro" / "matches.db", shop.catalog
    looking.database.parent.mkdir()
    # Root may write everywhere but here; the log's -shm is shared through it all the same.
    with mounted(shop.home, tmp_path / "ro", "--bind", "-o", "ro"), serving(looking) as url:
        page = httpx.get(f"{url}/matches")
        assert names(page) == ["a.jpg"]
        assert len(re.findall(r'<button name="label"[^>]* disabled>', page.text)) == 2
        assert "This page may not note corrections" in page.text
        reply = httpx.post(f"{url}/record/1/correction", data={"label": "ours"})
        assert reply.status_code == 403
        assert "may not write to the database" in reply.text
    assert read_corrections(shop.database) == []

    assert prepare(shop.database) is True
    shop.log.close()
    assert prepared_by_another() == 3  # with nobody else there, SQLite would write


def test_an_account_without_a_name_goes_by_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container
    assert server._account() == "uid 54321"


def test_looks_at_a_folder_that_hangs_do_not_pile_up(tmp_path: Path) -> None:
    asked, back = disk.Disk(), threading.Event()

    async def look() -> None:
        looks = [asked.ask(tmp_path, back.wait) for _ in range(disk.MOST_LOOKS)]
        waiting = [asyncio.ensure_future(one) for one in looks]
        await asyncio.sleep(0)  # so that each has begun
        with pytest.raises(TimeoutError):
            await asked.ask(tmp_path, back.wait)
        back.set()
        assert all(await asyncio.gather(*waiting))

    asyncio.run(look())
