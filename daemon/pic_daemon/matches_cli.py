"""What people ask of the match log: pic-matches and its commands."""

import csv
import json
import re
import sqlite3
import sys
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import click

from pic_daemon.errors import InputError
from pic_daemon.match_queries import MATCH_COLUMNS, read_matches

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


def _one_line(path: str) -> str:
    """A name with line breaks or control characters must not break the table."""
    return path if path.isprintable() else path.encode("unicode_escape").decode()


def _moment(_: click.Context, __: click.Parameter, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        if span := re.fullmatch(r"(\d+)([smhdw])", text):
            return datetime.now(UTC) - int(span[1]) * _SPANS[span[2]]
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter("neither a span like 2h nor an ISO 8601 time") from error


@matches.command("list")
@click.option(
    "--database", required=True, type=click.Path(path_type=Path), help="The match log."
)
@click.option(
    "--since",
    callback=_moment,
    metavar="TIME",
    help="A span back from now (30m, 2h, 7d) or an ISO 8601 time, UTC.",
)
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0)
@click.option("--limit", type=click.IntRange(1, 2**31), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV with a header line.")
def list_matches(database: Path, since: datetime | None, min_score: float, limit: int,
                 as_json: bool, as_csv: bool) -> None:  # fmt: skip
    """Print recorded matches, newest first.

    Example: pic-matches --database log.db --since 1d --min-score 0.9
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    rows = read_matches(database, since, min_score, limit)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, fieldnames=MATCH_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    else:
        for row in rows:
            click.echo(
                f"{row['classified_at']}  {row['score']:.6f}  {_one_line(row['path'])}"
            )
        if not rows:
            click.echo("no matches", err=True)


@matches.command()
@click.option(
    "--database", required=True, type=click.Path(path_type=Path), help="The match log."
)
@click.option(
    "--catalog",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Your product images, shown beside what was matched to them.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to answer at."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
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
            "pip install 'product-image-classifier[web]'."
        )
    from pic_daemon.web.server import serve as serve_pages

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
