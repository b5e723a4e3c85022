"""Who gets in, and what may be changed from where."""

from collections.abc import Callable, Iterator
from http.client import HTTPMessage

import httpx
import pytest
from shop import Shop, serving

from pic_daemon.corrections import read_corrections
from pic_daemon.web.gate import is_loopback

Get = Callable[..., tuple[int, HTTPMessage]]

TOKEN = "correct-horse-battery"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
HTML = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("gate") / "shop")
    shop.copy_of(1, "a.jpg")
    (shop.home / "token").write_text(TOKEN + "\n")
    (shop.home / "token").chmod(0o600)
    return shop


@pytest.fixture(scope="module")
def guarded(shop: Shop) -> Iterator[str]:
    options = "--host", "0.0.0.0", "--token-file", shop.home / "token"
    with serving(shop, *options) as url:
        yield url.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture(scope="module")
def local(shop: Shop) -> Iterator[str]:
    with serving(shop) as url:
        yield url


PATHS = ["/", "/matches", "/failures", "/dashboard", "/record/1",
         "/picture/1/dropped/small", "/log", "/log/images.json", "/-/versions.json",
         "/pic-static/", "/login/",
         "/pic-static/style.css/../../log", "/pic-static%2fstyle.css", "/-/static/app.css",
         "/login%3f/../log", "/loginx"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_shown_without_the_token(
    guarded: str, path: str, get_as_written: Get
) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "ds_actor=x"},
                    {"Authorization": f"Basic {TOKEN}"}):  # fmt: skip
        status, answer = get_as_written(guarded, path, headers)
        assert (status, answer["www-authenticate"]) == (401, "Bearer"), path


def test_a_browser_is_led_to_the_login(guarded: str) -> None:
    reply = httpx.get(guarded + "/matches", headers=HTML)
    assert (reply.status_code, reply.headers["location"]) == (303, "/login")
    late = httpx.post(
        guarded + "/record/1/correction", headers=HTML, data={"label": "ours"}
    )
    assert (late.status_code, late.headers["location"]) == (303, "/login")
    assert httpx.get(guarded + "/pic-static/style.css").status_code == 200


def test_the_token_opens_every_page_to_programs(guarded: str) -> None:
    for path in ("/matches", "/record/1", "/log/images.json", "/picture/1/dropped/small"):
        assert httpx.get(guarded + path, headers=BEARER).status_code == 200


def test_a_login_lasts_in_a_cookie_that_only_this_site_gets(
    guarded: str, shop: Shop
) -> None:
    with httpx.Client(base_url=guarded) as client:
        for data in ({"name": "Ada", "token": "wrong"}, {"name": " ", "token": TOKEN}):
            assert client.post("/login", data=data).status_code == 403
            assert client.get("/matches").status_code == 401
        reply = client.post("/login", data={"name": "  Ada\tL. ", "token": TOKEN})
        cookie = reply.headers["set-cookie"]
        for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
            assert part in cookie
        assert TOKEN not in cookie
        assert client.get("/matches").status_code == 200
        said = client.post("/record/1/correction", data={"label": "ours"})
        assert said.status_code == 303
        assert read_corrections(shop.database)[0].who == "Ada L."
        client.post("/logout")
        assert client.get("/matches").status_code == 401


def test_behind_a_proxy_with_tls_the_cookie_is_marked_secure(guarded: str) -> None:
    data = {"name": "Ada", "token": TOKEN}
    for headers, secure in (({"X-Forwarded-Proto": "https"}, True), ({}, False)):
        reply = httpx.post(guarded + "/login", data=data, headers=headers)
        assert ("Secure" in reply.headers["set-cookie"].split("; ")) is secure


@pytest.mark.parametrize(
    "other", [b"a/b=1", b"a@b=1", b"{a}=1", b'prefs={"a": 1}', b"name=J\xc3\xb6rg B", b"x"]
)
def test_the_cookies_of_other_programs_on_the_host_are_passed_over(
    guarded: str, local: str, other: bytes
) -> None:
    data = {"name": "Ada", "token": TOKEN}
    session = httpx.post(guarded + "/login", data=data).cookies["ds_actor"]
    ours = b"ds_actor=" + session.encode()
    for cookies in (other + b"; " + ours, ours + b";" + other):
        reply = httpx.get(guarded + "/matches", headers={b"Cookie": cookies})
        assert reply.status_code == 200
        assert "Ada" in reply.text
    assert httpx.get(local + "/matches", headers={b"Cookie": other}).status_code == 200
    assert httpx.get(guarded + "/matches", headers={b"Cookie": other}).status_code == 401


def test_a_cookie_signed_for_another_token_counts_for_nothing(
    guarded: str, shop: Shop
) -> None:
    other = shop.home / "other"
    other.write_text("another-good-long-token")
    other.chmod(0o600)
    with serving(shop, "--token-file", other) as url:
        data = {"name": "Eve", "token": "another-good-long-token"}
        cookies = httpx.post(url + "/login", data=data).cookies
        assert httpx.get(url + "/matches", cookies=cookies).status_code == 200
    assert httpx.get(guarded + "/matches", cookies=cookies).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"},
     {"Sec-Fetch-Site": ""}],
)  # fmt: skip
def test_a_page_elsewhere_cannot_correct_anything(
    local: str, guarded: str, shop: Shop, headers: dict[str, str]
) -> None:
    before = shop.log._db["corrections"].count
    for url, more in ((local, {}), (guarded, BEARER)):
        reply = httpx.post(
            url + "/record/1/correction",
            data={"label": "ours"},
            headers={**headers, **more},
        )
        assert reply.status_code == 403
    assert shop.log._db["corrections"].count == before


def test_a_page_of_ours_is_known_by_its_origin_where_a_browser_says_no_more(
    local: str, guarded: str, shop: Shop
) -> None:
    # Browsers send Sec-Fetch-Site over TLS and to loopback alone.
    lan = {**BEARER, "Host": "shop.lan:8001"}
    for url, name, more in ((local, local, {}), (guarded, "http://shop.lan:8001", lan)):
        other_port = name.rsplit(":", 1)[0] + ":1"
        for origin, status in ((name, 303), (other_port, 403)):
            reply = httpx.post(
                url + "/record/1/correction",
                data={"label": "ours"},
                headers={**more, "Origin": origin},
            )
            assert reply.status_code == status, origin


def test_looking_changes_nothing(local: str, shop: Shop) -> None:
    before = shop.log._db["corrections"].count
    assert httpx.get(local + "/record/1/correction?label=ours").status_code == 405
    assert shop.log._db["corrections"].count == before


def test_a_name_that_was_made_to_point_here_gets_nothing(local: str) -> None:
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
        "[",
    ):
        reply = httpx.get(local + "/matches", headers={"Host": host})
        assert reply.status_code in (400, 421)
    port = local.rsplit(":", 1)[1]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert httpx.get(local + "/matches", headers={"Host": host}).status_code == 200


def test_a_long_body_is_refused_unread(local: str) -> None:
    data = {"label": "ours", "back": "x" * 100_000}
    assert httpx.post(local + "/record/1/correction", data=data).status_code == 413
    chunks = httpx.post(local + "/record/1/correction", content=iter([b"label=ours"]))
    assert chunks.status_code == 413


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.7", False), ("example.org", False),
     ("", False)],
)  # fmt: skip
def test_loopback_is_what_no_other_machine_reaches(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer
