"""One log with its pages, served once for all tests that only look."""

from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPMessage
from urllib.parse import urlsplit

import pytest
from shop import DAY_S, Shop, Site, serving


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """40 old matches in `old`, all of one day, and a few of every kind from today."""
    shop = Shop(tmp_path_factory.mktemp("pages") / "shop")
    noon = (shop.now // DAY_S - 3 + 0.5) * DAY_S
    for number in range(40):
        ago = shop.now - noon + 60 * number
        shop.copy_of(number % 12, f"old/{number:02d}.jpg", at=ago, score=0.7)
    shop.copy_of(3, "today/tea.jpg", at=50, score=0.98)
    shop.stranger(5001, "today/stranger.jpg", at=40, score=0.3)
    shop.broken("today/broken.jpg", "the file is empty", at=30)
    shop.copy_of(4, "today/a & <b>.jpg", at=20, score=0.8)
    with serving(shop) as url:
        yield Site(shop, url)


@pytest.fixture(scope="session")
def get_as_written() -> Callable[..., tuple[int, HTTPMessage]]:
    """Ask for a path as it stands; httpx tidies `..` away. Gives status and headers."""

    def get(url: str, path: str, headers: dict[str, str]) -> tuple[int, HTTPMessage]:
        with closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
            connection.putrequest("GET", path)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            reply = connection.getresponse()
            return reply.status, reply.headers

    return get
