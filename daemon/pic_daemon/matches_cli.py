"""What people ask of the match log: pic-matches and its commands."""

import os
import re
import select
import signal
import sqlite3
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pic_daemon.backup import back_up
from pic_daemon.errors import InputError
from pic_daemon.folders import answer_within, text_of
from pic_daemon.match_formats import let_go, printer, printing
from pic_daemon.match_queries import Row, follow_images, read_images
from pic_daemon.options import DATABASE, FiniteRange, Place
from pic_daemon.web.queries import STATUSES, Filters, moment_of

_LOOK_MS = 500  # between two looks for new rows
_ANSWER_S = 5.0  # the longest that a folder is waited for, which may hang
_PATH = Place()

_SPANS = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}


class _ListByDefault(click.Group):
    """Without the name of a command, the options are those of `list`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "--help", "--version"}:
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ListByDefault)
@click.version_option(package_name="product-image-classifier")
def matches() -> None:
    """Ask the match log; works while the daemon writes.

    Without a command's name, `pic-matches OPTIONS` is `pic-matches list OPTIONS`.

    Example: pic-matches --database log.db --since 1d
    """


def _moment(_: click.Context, __: click.Parameter, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        if span := re.fullmatch(r"(\d+)([smhdw])", text):
            return datetime.now(UTC) - int(span[1]) * _SPANS[span[2]]
        return moment_of(text)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter("neither a span like 2h nor an ISO 8601 time") from error


@matches.command("list")
@DATABASE
@click.option(
    "--since",
    callback=_moment,
    metavar="TIME",
    help="A span back from now (30m, 2h, 7d) or an ISO 8601 time, UTC.",
)
@click.option("--until", callback=_moment, metavar="TIME", help="Before then, likewise.")
@click.option("--min-score", type=FiniteRange(0, 1), help="Of the classifier.")
@click.option("--max-score", type=FiniteRange(0, 1), help="The same.")
@click.option("--folder", type=_PATH, metavar="DIR", help="In it or anywhere below it.")
@click.option(
    "--product",
    metavar="NAME",
    help="Nearest to this catalog item, whatever the verdict (--status).",
)
@click.option(
    "--status",
    type=click.Choice([*STATUSES, "all"]),
    default="match",
    show_default=True,
)
@click.option("--limit", type=click.IntRange(0, 2**31), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV with a header line.")
@click.option(
    "--follow",
    is_flag=True,
    help="Then print what is recorded, until Ctrl-C; oldest first.",
)
def list_matches(database: Path, limit: int, as_json: bool, as_csv: bool, follow: bool,
                 **narrowed: Any) -> None:  # fmt: skip
    """Print recorded matches, newest first.

    Example: pic-matches --database log.db --since 1d --min-score 0.9

    Example: pic-matches --database log.db --follow --limit 0 --json
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    if follow and narrowed["until"]:
        raise click.UsageError("--follow and --until exclude each other.")
    folder = narrowed["folder"]
    filters = Filters(
        narrowed["status"],
        narrowed["since"],
        narrowed["until"],
        narrowed["min_score"],
        narrowed["max_score"],
        text_of(_known_as(folder)) if folder else "",
        text_of(narrowed["product"] or ""),
    )
    with printing():
        show = printer("json" if as_json else "csv" if as_csv else "table", sys.stdout)
        if follow:
            _follow(database, filters, limit, show)
            return
        count = 0
        for rows in read_images(database, filters, limit):
            show(rows)
            count += len(rows)
    if (
        limit
        and count == limit
        and click.get_current_context().get_parameter_source("limit")
        == ParameterSource.DEFAULT
    ):
        click.echo(f"note: at most {limit} are shown; --limit says how many", err=True)
    if limit and not count and not as_json and not as_csv:
        click.echo(
            "no matches" if filters.status == "match" else "no such images", err=True
        )


def _follow(
    database: Path, filters: Filters, limit: int, show: Callable[[list[Row]], None]
) -> None:
    """Print until Ctrl-C (exit code 130) or until nobody reads any more."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)  # told of errors alone: a closed pipe
    try:
        for rows in follow_images(
            database, filters, limit, lambda: not reader.poll(_LOOK_MS)
        ):
            show(rows)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        pass
    if reader.poll(0):
        let_go()


@matches.command()
@DATABASE
@click.option("--output", required=True, type=_PATH, help="The copy; replaced if there.")
def backup(database: Path, output: Path) -> None:
    """Copy the log, whole and checked, while the service goes on.

    Example: pic-matches backup --database log.db --output /backup/log.db
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no half copy
    try:
        rows = back_up(database, output)
    except (sqlite3.Error, OSError) as error:
        raise click.ClickException(f"no copy was made of {database}: {error}") from error
    click.echo(f"{text_of(str(output))}: {rows:,} images, integrity_check ok")


def _known_as(folder: Path) -> str:
    """The path that a service knows a folder by."""
    found = answer_within(_ANSWER_S, lambda: os.path.realpath(folder))
    return found or os.path.abspath(folder)


@matches.command()
@DATABASE
@click.option(
    "--catalog",
    type=_PATH,
    metavar="DIR",
    help="Your product images, shown beside what was matched to them.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to answer at."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True)
@click.option(
    "--token-file",
    type=_PATH,
    metavar="FILE",
    help="Holds the word that people must know; needed unless --host is loopback.",
)
def serve(
    database: Path, catalog: Path | None, host: str, port: int, token_file: Path | None
) -> None:
    """Show the log as web pages with pictures, filters, figures and corrections.

    Example: pic-matches serve --database log.db --catalog products
    """
    if find_spec("datasette") is None:
        raise InputError(
            "the pages need Datasette, which the base install leaves out: "
            "pip install '.[web]' in this project's folder."
        )
    from pic_daemon.web.server import serve as serve_pages

    # Such as one that is mounted later, or hangs.
    if catalog and answer_within(_ANSWER_S, lambda: os.path.isdir(catalog)) is not True:
        problem = "is no folder, or does not answer; pictures are shown once it does"
        click.echo(f"note: catalog {catalog} {problem}", err=True)
    try:
        serve_pages(
            database,
            catalog,
            host,
            port,
            token_file,
            lambda url: click.echo(f"serving {url} (Ctrl-C ends it)"),
        )
    except sqlite3.OperationalError as error:
        raise click.ClickException(f"database {database}: {error}") from error
