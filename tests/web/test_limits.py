"""How long a session, a query and the wait for the log last, without waiting for it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from shop import Shop

from pic_daemon import corrections
from pic_daemon.corrections import read_corrections
from pic_daemon.web import pages, pictures
from pic_daemon.web.gate import App
from pic_daemon.web.server import make_app

TOKEN = "correct-horse-battery"
TWELVE_HOURS_S = 12 * 3600


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(1, "a.jpg")
    return shop


def ask(app: App, method: str, path: str, **more: Any) -> httpx.Response:
    """What the pages in this process answer."""

    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost"
        ) as client:
            return await client.request(method, path, **more)

    return asyncio.run(asking())


def test_a_session_ends_after_twelve_hours_though_its_cookie_is_kept(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(shop.database, None, TOKEN)
    reply = ask(app, "POST", "/login", data={"name": "Ada", "token": TOKEN})
    kept = {"Cookie": reply.headers["set-cookie"].partition(";")[0]}
    now = time.time()
    for later, status in ((TWELVE_HOURS_S - 600, 200), (TWELVE_HOURS_S + 600, 401)):
        monkeypatch.setattr(time, "time", lambda moment=now + later: moment)
        for path in ("/matches", "/log/images.json"):
            assert ask(app, "GET", path, headers=kept).status_code == status


def test_a_query_that_takes_too_long_is_ended_and_the_next_is_not(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(shop.database, None, None)
    paths = ("/matches", "/failures", "/dashboard", "/record/1", "/matches.csv")
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_QUERY_LIMIT_MS", 0)
        patch.setattr(pages, "_PART_LIMIT_MS", 0)
        for path in paths:
            reply = ask(app, "GET", path)
            assert reply.status_code == 503, path
            assert "This takes too long: narrow the time or the folder." in reply.text
    assert [ask(app, "GET", path).status_code for path in paths] == [200] * len(paths)


def test_what_could_not_be_noted_as_the_log_stayed_locked_is_said_not_to_be(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(shop.database, None, None)
    monkeypatch.setattr(corrections, "_WRITE_TIMEOUT_S", 0.05)
    ours = {"data": {"label": "ours"}}
    with shop.log._transaction():  # the service's
        reply = ask(app, "POST", "/record/1/correction", **ours)
        assert reply.status_code == 503
        assert "Not noted. The database does not answer: database is locked." in reply.text
    assert read_corrections(shop.database) == []
    assert ask(app, "POST", "/record/1/correction", **ours).status_code == 303
    assert [one.label for one in read_corrections(shop.database)] == ["ours"]


def test_a_picture_may_wait_for_its_turn_longer_than_the_disk_may_take(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(shop.database, None, None)
    smaller = pictures.smaller

    def slowly(data: bytes, side: int) -> bytes:
        time.sleep(0.6)
        return smaller(data, side)

    monkeypatch.setattr(pages, "_PICTURE_S", 2.0)
    monkeypatch.setattr(pictures, "smaller", slowly)

    async def asking() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost"
        ) as client:
            path = "/picture/1/dropped/small"
            return await asyncio.gather(*(client.get(path) for _ in range(8)))

    assert [reply.status_code for reply in asyncio.run(asking())] == [200] * 8
