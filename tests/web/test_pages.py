"""The pages as a program asks for them, of a real process."""

import csv
import io
import os
import re
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import httpx
import pytest
from conftest import DaemonProcess, write_image
from PIL import Image
from shop import Shop, Site, serving

from pic_daemon.corrections import read_corrections
from pic_daemon.web.queries import Filters
from pic_daemon.web.server import prepare

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
        f'src="/picture/{number}/dropped/small"', f'src="/picture/{number}/catalog/small"',
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

    page = site.get(f"/matches?min=0.75&folder={site.shop.drop}").text
    as_csv, as_json = (
        unescape(link) for link in re.findall(r'href="(/log/\S+)"', page)
        if "status__exact" in link
    )  # fmt: skip
    listed = [
        Path(row["path"]).name for row in csv.DictReader(io.StringIO(site.get(as_csv).text))
    ]
    assert listed == ["a & <b>.jpg", "tea.jpg"]
    assert site.get(as_csv).headers["content-disposition"].startswith("attachment")
    assert [Path(row["path"]).name for row in site.get(as_json).json()["rows"]] == listed
    for name, count in {"today": 2, "toda_": 0, "TODAY": 0}.items():
        asked = Filters(folder=str(site.shop.drop / name)).for_datasette()
        found = csv.DictReader(io.StringIO(site.get(f"/log/images.csv?{asked}").text))
        assert len(list(found)) == count


def test_a_list_longer_than_a_page_is_given_whole(site: Site) -> None:
    page = site.get("/matches").text
    as_csv, as_json = (
        unescape(link) for link in re.findall(r'href="(/log/\S+)"', page)
        if "status__exact" in link
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(site.get(as_csv).text)))
    assert len({row["id"] for row in rows}) == len(rows) == 42
    assert as_json.endswith("&_size=max")  # a thousand rows
    found, link = [], site.url + as_json.replace("&_size=max", "&_size=30")
    while link:
        answer = httpx.get(link).json()
        found += [str(row["id"]) for row in answer["rows"]]
        link = answer["next_url"]
    assert found == [row["id"] for row in rows]


def test_pictures_are_small_jpegs_of_what_was_recorded(site: Site) -> None:
    number = site.row("today/tea.jpg")
    for of in ("dropped", "catalog"):
        reply = site.get(f"/picture/{number}/{of}/small")
        assert reply.headers["content-type"] == "image/jpeg"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["content-security-policy"] == "default-src 'none'"
        image = Image.open(io.BytesIO(reply.content))
        assert max(image.size) <= 256 and len(reply.content) < 20_000


@pytest.mark.parametrize(
    "path",
    ["/picture/999999/dropped/small", "/picture/1/dropped/huge",
     "/picture/1/elsewhere/small", "/picture/-1/dropped/small",
     "/picture/..%2f..%2fetc%2fpasswd/dropped/small",
     "/pic-static/..%2fqueries.py", "/pic-static/../queries.py", "/record/0",
     "/record/99999999999999999999", "/matches/1", "/nothing"],
)  # fmt: skip
def test_what_is_no_record_is_not_found(site: Site, path: str) -> None:
    reply = httpx.get(site.url + path, follow_redirects=True)
    assert reply.status_code == 404


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
    assert shop.log._db["corrections"].count == 3


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


def test_wrong_input_is_refused_with_a_sentence(run_tool: Run, tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    short = tmp_path / "short"
    short.write_text("secret\n")
    short.chmod(0o600)
    with serving(shop) as url:
        port = url.rsplit(":", 1)[1]
        for options, sentence in (
            (("--database", tmp_path / "none.db"), "does not exist"),
            (("--database", shop.database, "--port", port), "Address already in use"),
            (("--database", shop.database, "--host", "0.0.0.0"), "give --token-file"),
            (("--database", shop.database, "--token-file", short), "at least 16 ASCII"),
            (("--database", shop.database, "--token-file", shop.database), "chmod o="),
        ):  # fmt: skip
            result = run_tool("pic-matches", "serve", *options)
            assert result.returncode == 2
            assert sentence in result.stderr
            assert "Traceback" not in result.stderr


def test_an_account_that_may_not_write_can_look_but_note_nothing(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    shop = Shop(tmp_path / "shop")
    for folder in (shop.home, *shop.home.parents):
        if not folder.stat().st_mode & 0o001:  # pytest's own are root's alone
            folder.chmod(0o755)
    child = os.fork()
    if child == 0:  # must not come back into pytest
        os.setuid(65534)
        try:
            os._exit(0 if prepare(shop.database) is False else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert prepare(shop.database) is True
