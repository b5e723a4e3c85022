"""The pages themselves, as a Datasette plugin: each route reads, and one writes."""

import asyncio
import sqlite3
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlencode

from datasette.actor_auth_cookie import actor_from_request as actor_of_cookie
from datasette.app import Datasette
from datasette.utils import baseconv, sqlite_timelimit
from datasette.utils.asgi import AsgiStream, AsgiWriter, Request, Response
from pluggy import HookimplMarker

from pic_daemon.corrections import LABELS, NotCorrectable, correct, history
from pic_daemon.match_formats import printer
from pic_daemon.match_log import SILENT_S
from pic_daemon.schema import open_read_only
from pic_daemon.web import pictures, queries
from pic_daemon.web.disk import Disk
from pic_daemon.web.gate import STRICT_CSP, headers_of, is_bearer, same_text
from pic_daemon.web.queries import Cursor, FilterError, Filters, Row

LOG = "log"
"""Datasette's name for the match log: its own pages of it are below /log."""

SESSION = "ds_actor"  # Datasette's own signed cookie, so that its pages know the person too
_SESSION_S = 12 * 3600
_QUERY_LIMIT_MS = 3000
_PART_LIMIT_MS = 30_000  # of what nobody waits for in front of a page
_LOOK_S = 1.0  # the longest that a record's page waits to hear what is missing
_PICTURE_S = 10.0  # the longest that a picture is waited for, as of a mount that hangs
_AT_ONCE = 2  # pictures decoded at a time
_TAKEN_S = 60.0  # the longest that a part waits for the other side to take it
_PART = 1000  # rows of a list read and sent at a time
_KINDS = {"csv": "text/csv; charset=utf-8", "json": "application/x-ndjson"}
_LONGEST_NAME = 80

T = TypeVar("T")

hookimpl = HookimplMarker("datasette")  # as datasette.hookimpl, with types


@dataclass(frozen=True)
class Site:
    """What the pages are about. `user` is the account that serves, None where a token
    says who may. `writable`: whether this account may note corrections."""

    database: Path
    catalog: Path | None
    token: str | None
    user: str | None
    writable: bool
    # The service on this machine comes first.
    decoding: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_AT_ONCE, "picture")
    )
    disk: Disk = field(default_factory=Disk)


@hookimpl
def register_routes() -> list[tuple[str, Callable[..., Any]]]:
    """Our pages; everything else is Datasette's."""
    return [
        (r"^/$", front),
        (r"^/matches$", matches),
        (r"^/matches\.(?P<format>csv|json)$", export),
        (r"^/failures$", failures),
        (r"^/dashboard$", dashboard),
        (r"^/record/(?P<number>[0-9]{1,18})$", record),
        (r"^/record/(?P<number>[0-9]{1,18})/correction$", correction),
        (r"^/picture/(?P<number>[0-9]{1,18})/(?P<of>dropped|catalog)/(?P<size>small|large)$",
         picture),
        (r"^/login$", login),
        (r"^/logout$", logout),
    ]  # fmt: skip


@hookimpl
def skip_csrf(scope: dict[str, Any]) -> bool:
    """Ours are refused by the gate unless they come from our pages; it keeps no state."""
    path: str = scope["path"]
    return path in ("/login", "/logout") or path.endswith("/correction")


@hookimpl
def actor_from_request(datasette: Datasette, request: Request) -> dict[str, str] | None:
    """Who asks: the account that serves, or "token"; a cookie is Datasette's to read."""
    site: Site = datasette.pic_site
    if site.token is None:
        return {"id": site.user or "local"}
    return {"id": "token"} if is_bearer(headers_of(request.scope), site.token) else None


def has_session(datasette: Datasette, scope: dict[str, Any]) -> bool:
    """Whether a request carries a cookie that `login` signed and that still counts."""
    return actor_of_cookie(datasette, Request(scope, None)) is not None


async def front() -> Response:
    """The list is where one begins."""
    return Response.redirect("/matches")


async def matches(request: Request, datasette: Datasette) -> Response:
    """Matches, or rows of another status, beside what they were matched to."""
    return await _list(request, datasette, "matches")


async def failures(request: Request, datasette: Datasette) -> Response:
    """Files that could not be judged, and why."""
    return await _list(request, datasette, "failures", status="failed")


async def _list(
    request: Request, datasette: Datasette, page: str, **fixed: str
) -> Response:
    given = {name: request.args.get(name) or "" for name in request.args}
    context: dict[str, Any] = {
        "page": page,
        "given": given,
        "statuses": (*queries.STATUSES, "all"),
    }
    status = 200
    try:
        filters = Filters.of({**given, **fixed})
        cursor = None
        if given.get("after") or given.get("before"):
            newer = bool(given.get("before"))
            cursor = Cursor.of(given["before" if newer else "after"], newer)
        found = await _ask(datasette, partial(_read_list, filters=filters, cursor=cursor))
    except FilterError as error:
        status, context["problem"] = 400, f"{error}."
    except sqlite3.OperationalError as error:
        status, context["problem"] = 503, _trouble(error)
    else:
        query = {k: v for k, v in filters.query().items() if k not in fixed}
        site: Site = datasette.pic_site
        for row in found["rows"]:
            row["missing"] = pictures.unplaced(row, found["folders"], site.catalog)
        own, all_of_it = f"/{page}?", urlencode(filters.query())
        context |= found | {
            "given": query,  # as an input field of a browser takes it
            "narrowed": bool(set(query) - {"status"}),
            "here": own + urlencode(query | _place(cursor)),
            "newer": found["newer"]
            and own + urlencode({**query, "before": found["newer"]}),
            "older": found["older"] and own + urlencode({**query, "after": found["older"]}),
            "top": own + urlencode(query),
            "paged": cursor is not None,
            "csv": f"/matches.csv?{all_of_it}",
            "json": f"/matches.json?{all_of_it}",
        }
    return await _html(datasette, request, f"{page}.html", context, status)


def _place(cursor: Cursor | None) -> dict[str, str]:
    if cursor is None:
        return {}
    return {"before" if cursor.newer else "after": str(cursor)}


def _read_list(
    db: sqlite3.Connection, filters: Filters, cursor: Cursor | None
) -> dict[str, Any]:
    page = queries.page_of(db, filters, cursor)
    if not page.rows and cursor:  # such as beyond the newest
        page = queries.page_of(db, filters)
    return {
        "rows": _shown(db, page.rows),
        "newer": page.newer and str(page.newer),
        "older": page.older and str(page.older),
        "folders": queries.watched(db),
        "products": queries.products(db),
    }


def _shown(db: sqlite3.Connection, rows: list[Row]) -> list[Row]:
    said = queries.said_of(db, rows)
    for row in rows:
        row["name"], row["folder"] = pictures.name_of(row["path"])
        row["said"] = said.get(row["id"])
    return rows


async def export(request: Request, datasette: Datasette) -> Response | AsgiStream:
    """All rows of a list, in the columns of pic-matches: read and sent in parts.

    What goes wrong after the first part breaks the connection off: a list that came to
    its end is whole.
    """
    site: Site = datasette.pic_site
    kind: Literal["csv", "json"] = request.url_vars["format"]
    try:
        given = {name: request.args.get(name) or "" for name in request.args}
        if unknown := given.keys() - set(queries.NAMES):
            known = f"filters are {', '.join(queries.NAMES)}"
            raise FilterError(f"{sorted(unknown)[0]!r} is none; {known}")
        filters = Filters.of(given)
        parts = _parts(site.database, filters)
        first = await asyncio.to_thread(next, parts)
    except FilterError as error:
        return Response.text(f"{error}.\n", 400)
    except sqlite3.OperationalError as error:
        return Response.text(f"{_trouble(error)}\n", 503)

    async def send(writer: AsgiWriter) -> None:
        text, part = StringIO(), first
        put = printer(kind, text)
        left = asyncio.ensure_future(_left(request))
        try:
            while request.method == "GET" and not left.done():
                put(part)
                async with asyncio.timeout(_TAKEN_S):  # else the log's -wal grows for ever
                    await writer.write(text.getvalue())
                text.seek(0)
                text.truncate()
                if not part:
                    break
                part = await asyncio.to_thread(next, parts)
        finally:
            left.cancel()
            with suppress(ValueError):  # cancelled while it reads
                parts.close()

    headers = {"content-disposition": f'attachment; filename="matches.{kind}"'}
    return AsgiStream(send, headers=headers, content_type=_KINDS[kind])


async def _left(request: Request) -> None:
    """Returns when nobody is there any more; sending goes on without a word."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parts(database: Path, filters: Filters) -> Generator[list[Row], None, None]:
    """All rows of a list as they are at one moment; the parts after the last are empty."""
    with closing(open_read_only(database, any_thread=True)) as log:
        db: sqlite3.Connection = log.conn
        db.row_factory = sqlite3.Row
        found = None
        while True:
            with sqlite_timelimit(db, _PART_LIMIT_MS):
                found = found or db.execute(*queries.statement(db, filters, None, -1))
                part = [dict(row) for row in found.fetchmany(_PART)]
            yield part


async def record(request: Request, datasette: Datasette) -> Response:
    """One row with everything that is known of it and was said of it."""
    number = int(request.url_vars["number"])
    try:
        found = await _ask(datasette, partial(_read_record, number=number))
    except sqlite3.OperationalError as error:
        return await _message(datasette, request, 503, _trouble(error))
    if found is None:
        return await _message(datasette, request, 404, f"There is no record {number}.")
    site: Site = datasette.pic_site
    # In words besides, as nobody hears what stands in a picture.
    reasons = [_missing(site, found["row"], of, found["folders"]) for of in pictures.PAIR]
    missing = dict(zip(pictures.PAIR, await asyncio.gather(*reasons), strict=True))
    found |= {"here": f"/record/{number}", "missing": missing}
    return await _html(datasette, request, "record.html", found)


def _read_record(db: sqlite3.Connection, number: int) -> dict[str, Any] | None:
    row = queries.record(db, number)
    if row is None:
        return None
    _shown(db, [row])
    folders = queries.watched(db)
    return {"row": row, "history": history(db, row["sha256"]), "folders": folders}


async def _missing(site: Site, row: Row, of: pictures.Of, folders: list[str]) -> str:
    """Why a picture is not shown, as far as can be told without it and in a moment."""
    try:
        folder, relative = pictures.place(row, of, folders, site.catalog)
        async with asyncio.timeout(_LOOK_S):
            look = partial(pictures.read, row, of, folder, relative, most=0)
            await site.disk.ask(folder, look)
    except TimeoutError:
        return "no answer yet"
    except pictures.NotShown as reason:
        return str(reason)
    return ""


async def dashboard(request: Request, datasette: Datasette) -> Response:
    """How it goes: by day, latency, what waits."""
    try:
        figures = await _ask(datasette, partial(_read_figures, now=datetime.now(UTC)))
    except sqlite3.OperationalError as error:
        return await _message(datasette, request, 503, _trouble(error))
    return await _html(datasette, request, "dashboard.html", figures)


def _read_figures(db: sqlite3.Connection, now: datetime) -> dict[str, Any]:
    days = queries.counts_by_day(db, now)
    beat = queries.heartbeat(db, now)
    state = "never started"
    if beat:
        silent = abs(beat["age_s"]) > SILENT_S
        state = "stopped" if beat.get("stopped") else "silent" if silent else "running"
    return {
        "page": "dashboard",
        "days": days,
        "most": max(1, *(day[k] for day in days for k in ("matches", "failures"))),
        "latency": queries.latency(db),
        "beat": beat,
        "state": state,
    }


async def picture(request: Request, datasette: Datasette) -> Response:
    """A small JPEG of a recorded picture, or an SVG that says why there is none."""
    site: Site = datasette.pic_site
    number, of = int(request.url_vars["number"]), request.url_vars["of"]
    side = pictures.SIDES[request.url_vars["size"]]

    def asked(db: sqlite3.Connection) -> tuple[Row | None, list[str]]:
        return queries.record(db, number), queries.watched(db)

    try:
        row, folders = await _ask(datasette, asked)
        if row is None:
            raise pictures.NotShown("no such record")
        folder, relative = pictures.place(row, of, folders, site.catalog)
        async with site.disk.turns[folder]:
            read = partial(pictures.read, row, of, folder, relative)
            async with asyncio.timeout(_PICTURE_S):
                data = await site.disk.ask(folder, read)
            loop = asyncio.get_running_loop()
            made = loop.run_in_executor(site.decoding, pictures.smaller, data, side)
            return _picture(await made, "image/jpeg", 200)
    except pictures.NotShown as error:
        status, reason = 404, str(error)
    except TimeoutError:
        status, reason = 504, "no answer"
    except sqlite3.OperationalError:
        status, reason = 503, "no answer"
    return _picture(pictures.instead(reason), "image/svg+xml", status)


def _picture(data: bytes, kind: str, status: int) -> Response:
    return Response(data, status, {"content-security-policy": "default-src 'none'"}, kind)


async def correction(request: Request, datasette: Datasette) -> Response:
    """Note "ours" or "not ours"; the only thing that these pages write."""
    site: Site = datasette.pic_site
    if request.method != "POST":
        return await _message(datasette, request, 405, "Corrections are posted.")
    given = await _posted(request)
    label, number = given.get("label"), int(request.url_vars["number"])
    if label not in LABELS:
        return await _message(datasette, request, 400, "Say ours or not-ours.")
    if not site.writable:
        sentence = "The account that serves this page may not write to the database."
        return await _message(datasette, request, 403, sentence)
    try:
        who, seen = request.actor["id"], given.get("sha256")
        await asyncio.to_thread(correct, site.database, number, label, who, seen)
    except NotCorrectable as error:
        return await _message(datasette, request, 404, f"Not noted: {error}")
    except sqlite3.OperationalError as error:
        return await _message(datasette, request, 503, f"Not noted. {_trouble(error)}")
    back = given.get("back", "")
    if not (back.startswith(("/matches?", "/record/")) and back.isprintable()):
        back = f"/record/{number}"
    return Response.redirect(f"{back}#record-{number}", 303)


async def login(request: Request, datasette: Datasette) -> Response:
    """Ask for name and token; the answer is a signed cookie."""
    site: Site = datasette.pic_site
    context: dict[str, Any] = {"page": "login"}
    if site.token is None:
        return Response.redirect("/matches", 303)
    if request.method == "POST":
        given = await _posted(request)
        name = " ".join(given.get("name", "").split())[:_LONGEST_NAME]
        if name and same_text(given.get("token", "").strip(), site.token):
            response = Response.redirect("/matches", 303)
            until = int(datetime.now(UTC).timestamp()) + _SESSION_S
            session = {"a": {"id": name}, "e": baseconv.base62.encode(until)}
            response.set_cookie(
                SESSION, datasette.sign(session, "actor"), max_age=_SESSION_S,
                httponly=True, samesite="strict", secure=request.scheme == "https",
            )  # fmt: skip
            return response
        context["problem"] = "That is not the token." if name else "Give your name."
    status = 403 if "problem" in context else 200
    return await _html(datasette, request, "login.html", context, status)


async def _posted(request: Request) -> dict[str, str]:
    """The fields of a form; none where they are not text."""
    try:
        fields: dict[str, str] = await request.post_vars()
    except UnicodeDecodeError:
        return {}
    return fields


async def logout(request: Request) -> Response:
    """Forget the cookie."""
    response = Response.redirect("/login", 303)
    if request.method == "POST":
        response.set_cookie(SESSION, "", max_age=0, httponly=True, samesite="strict")
    return response


async def _ask(datasette: Datasette, question: Callable[[sqlite3.Connection], T]) -> T:
    """Put a question to the read-only connection of a thread, for a limited time."""

    def limited(db: sqlite3.Connection) -> T:
        with sqlite_timelimit(db, _QUERY_LIMIT_MS):
            return question(db)

    answer: T = await datasette.get_database(LOG).execute_fn(limited)
    return answer


def _trouble(error: sqlite3.OperationalError) -> str:
    if "interrupted" in str(error):
        return "This takes too long: narrow the time or the folder."
    return f"The database does not answer: {error}."


async def _message(
    datasette: Datasette, request: Request, status: int, sentence: str
) -> Response:
    return await _html(datasette, request, "message.html", {"sentence": sentence}, status)


async def _html(
    datasette: Datasette,
    request: Request,
    template: str,
    context: dict[str, Any],
    status: int = 200,
) -> Response:
    site: Site = datasette.pic_site
    body = await datasette.render_template(
        f"pic/{template}", {"site": site, "log": LOG, **context}, request
    )
    headers = {"content-security-policy": STRICT_CSP, "cache-control": "private, no-cache"}
    return Response.html(body, status, headers)
