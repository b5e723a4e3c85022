"""Who gets in: an ASGI layer in front of every page, Datasette's own included."""

import hmac
import ipaddress
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pic_daemon.errors import InputError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

OPEN_PATHS = ("/login", "/pic-static/style.css", "/favicon.ico")
"""What is answered without a token: the way in, and how it looks."""

SHORTEST_TOKEN = 16
"""Characters; what is longer is not found by trying."""

STRICT_CSP = (
    "default-src 'none'; img-src 'self'; style-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
"""Of our pages: no script at all, nothing from elsewhere."""

_DATASETTE_CSP = (  # its pages hold scripts and styles in their text
    "default-src 'self' 'unsafe-inline' data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": _DATASETTE_CSP.encode(),
}
_KEPT = b"private, max-age=600"  # of pictures, whose addresses change with their rows
_SAFE = ("GET", "HEAD", "OPTIONS")
_COOKIES = (b"ds_actor", b"ds_csrftoken", b"ds_messages")  # those that Datasette sets
_LONGEST_BODY = 64 << 10


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path) -> str:
    """The one word that a file holds.

    Raises InputError where it is too short or the file is open to everyone.
    """
    try:
        mode = file.stat().st_mode
        text = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"token file {file}: {reason}.") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise InputError(f"token file {file}: every user may use it; chmod o= it.")
    if len(text) < SHORTEST_TOKEN or not text.isascii() or len(text.split()) != 1:
        raise InputError(
            f"token file {file}: it must hold one word of at least {SHORTEST_TOKEN} ASCII "
            "characters, such as `openssl rand -hex 24` prints."
        )
    return text


@dataclass(frozen=True)
class Gate:
    """Lets a request through to `app`, or answers it.

    With a `token`, every page needs it (a header, or `session`, which says whether the
    request carries a signed cookie). Without one the server is on loopback, and the
    names in `hosts` are the only ones it answers to: a page elsewhere whose name was
    made to point here gets nothing. What changes something must come from a page of
    ours, which browsers say.
    """

    app: App
    token: str | None
    hosts: frozenset[str]
    session: Callable[[Scope], bool]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            return
        scope = {**scope, "headers": _with_own_cookies(scope["headers"])}
        headers = headers_of(scope)
        send = _with_headers(send, scope["path"].startswith("/picture/"))
        if refusal := self._refusal(scope, headers):
            await _answer(send, *refusal)
        elif not self._may_enter(scope, headers):
            if "text/html" in headers.get("accept", ""):
                await _answer(send, 303, "log in first", {"location": "/login"})
            else:
                asked = {"www-authenticate": "Bearer"}
                await _answer(send, 401, "this needs the token", asked)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        name = _host_of(headers.get("host", ""))
        if self.token is None and name not in self.hosts:
            return 421, "this server does not go by that name"
        if scope["method"] in _SAFE:
            return None
        if not same_origin(headers):
            return 403, "this did not come from a page of this server"
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > _LONGEST_BODY:
            return 413, "too long"
        return None

    def _may_enter(self, scope: Scope, headers: dict[str, str]) -> bool:
        # The raw path, as Datasette's router reads it, so that both mean the same page.
        path = scope["raw_path"].partition(b"?")[0].decode("latin-1")
        if self.token is None or path in OPEN_PATHS:
            return True
        return is_bearer(headers, self.token) or self.session(scope)


def headers_of(scope: Scope) -> dict[str, str]:
    """Header names in lower case -> values."""
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}


def _with_own_cookies(headers: RawHeaders) -> RawHeaders:
    """Without the cookies of other programs on this host, which come to every port.

    Datasette's parser fails over some of their names and ends at some of their values.
    """
    kept = []
    for name, value in headers:
        if name == b"cookie":
            pairs = [pair.strip() for pair in value.split(b";")]
            value = b"; ".join(p for p in pairs if p.partition(b"=")[0] in _COOKIES)
        kept.append((name, value))
    return kept


def is_bearer(headers: dict[str, str], token: str) -> bool:
    """Whether the request brings the token in its header."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and same_text(value.strip(), token)


def same_text(one: str, other: str) -> bool:
    """Compare without telling by the time taken how much was right."""
    return hmac.compare_digest(one.encode(), other.encode())


def same_origin(headers: dict[str, str]) -> bool:
    """Whether a request to change something came from our own page, or from no page.

    Browsers send Sec-Fetch-Site, older ones Origin; programs send neither.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _host_of(header: str) -> str:
    """The name in a Host header, without its port; '' where there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _with_headers(send: Send, picture: bool) -> Send:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", [])}
            added = [[k, v] for k, v in _HEADERS.items() if k not in given]
            headers = [*message.get("headers", []), *added]
            if picture and message["status"] == 200:  # Datasette lets nothing be kept
                headers = [[k, v] for k, v in headers if k.lower() != b"cache-control"]
                headers.append([b"cache-control", _KEPT])
            message = {**message, "headers": headers}
        await send(message)

    return sending


async def _answer(
    send: Send, status: int, text: str, headers: dict[str, str] | None = None
) -> None:
    lines = {"content-type": "text/plain; charset=utf-8", **(headers or {})}
    raw = [[name.encode(), value.encode()] for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
