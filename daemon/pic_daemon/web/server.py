"""Start the pages: open the log read-only, put the gate in front, answer until stopped."""

import getpass
import hashlib
import os
import socket
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn
from datasette.app import Datasette
from datasette.database import Database
from datasette.plugins import pm

from pic_daemon.errors import InputError, not_listening
from pic_daemon.match_log import MatchLog
from pic_daemon.schema import check, migrations, must_be_there, open_read_only
from pic_daemon.web import pages
from pic_daemon.web.gate import App, Gate, is_loopback, read_token

_HERE = Path(__file__).parent
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_KEEP_IDLE_S = 60  # a connection silent for so long is asked whether it is still there
_SETTINGS = {
    "allow_download": False,
    "max_csv_mb": 0,  # the whole table
    "suggest_facets": False,  # would look through every row
    "default_cache_ttl": 0,
}


class _Log(Database):  # type: ignore[misc]
    """The match log as Datasette sees it: live, and nothing can be written to it."""

    def connect(self, write: bool = False) -> sqlite3.Connection:
        if write:
            raise sqlite3.OperationalError("the match log is read-only here")
        db: sqlite3.Connection = open_read_only(Path(self.path), any_thread=True).conn
        self._all_file_connections.append(db)
        return db


def serve(
    database: Path,
    catalog: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    announce: Callable[[str], None],
) -> None:
    """Answer at ``host:port`` (0: any that is free) until SIGTERM or Ctrl-C.

    Raises InputError where the log cannot be shown, or `host` can be reached from
    elsewhere and there is no token; `not_listening` where the address cannot be had.
    """
    if token_file is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines: give --token-file, "
            "a file with the word that people must know."
        )
    token = read_token(token_file) if token_file else None
    app = make_app(database, catalog, token, host)
    listening = _listen(host, port)
    name = f"[{host}]" if ":" in host else host
    announce(f"http://{name}:{listening.getsockname()[1]}/")
    config = uvicorn.Config(
        app, lifespan="on", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=5, limit_concurrency=200,
    )  # fmt: skip
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def make_app(
    database: Path, catalog: Path | None, token: str | None, host: str = "127.0.0.1"
) -> App:
    """The ASGI application: the gate, Datasette behind it, our pages in that."""
    writable = prepare(database)
    # Where rich happens to be installed, Datasette prints every local variable of an
    # error with it, the token too, and then fails over a page that is not there.
    pm.get_plugin("datasette.handle_exception").rich = None
    if not pm.is_registered(pages):
        pm.register(pages, "pic-pages")
    datasette = Datasette(
        settings=_SETTINGS,
        # A restart does not log people out, another token does.
        secret=hashlib.sha256(f"session {token}".encode()).hexdigest() if token else None,
        template_dir=str(_HERE / "templates"),
        static_mounts=[("pic-static", str(_HERE / "static"))],
        metadata={"title": "Match log"},
        memory=False,
    )
    datasette.add_database(_Log(datasette, path=str(database)), name=pages.LOG)
    datasette.pic_site = pages.Site(
        database=database,
        catalog=catalog.absolute() if catalog else None,
        token=token,
        user=None if token else _account(),
        writable=writable,
    )
    hosts = _LOOPBACK | {host}
    return Gate(datasette.app(), token, hosts, partial(pages.has_session, datasette))


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container that knows no names
        return f"uid {os.getuid()}"


def prepare(database: Path) -> bool:
    """Bring the log's tables up to date where this account may; returns whether it may."""
    must_be_there(database)
    if os.access(database, os.W_OK) and os.access(database.parent, os.W_OK):
        MatchLog.open(database).close()
        return True
    check(database, for_writing=False)
    try:
        db = open_read_only(database)
        behind = migrations.pending(db)
        db.close()
    except sqlite3.DatabaseError as error:
        raise InputError(f"database {database}: {error}.") from error
    if behind:
        raise InputError(
            f"database {database} is of an older version and this account may not change "
            "it: start the service of this version once."
        )
    return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: those of machines that went to sleep would add up.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_IDLE_S)
        listening.bind(address)
        listening.listen()  # from here on who comes too early waits
    except (OSError, UnicodeError) as error:
        raise not_listening(f"cannot listen at {host}:{port}", error) from error
    return listening
