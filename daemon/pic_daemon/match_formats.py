"""Rows of the match log as a table, as CSV or as a JSON object a line, on stdout."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Literal, TextIO

import click

from pic_daemon.match_queries import COLUMNS, Row

Format = Literal["table", "json", "csv"]

_PRODUCT_WIDTH = 32  # characters; longer names are printed whole, out of line


def printer(kind: Format, stream: TextIO) -> Callable[[Sequence[Row]], None]:
    """A function that prints rows at once; a header comes before the first of them."""
    if kind == "json":
        return lambda rows: _put(stream, [json.dumps(_told(row)) for row in rows])
    if kind == "csv":
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()

        def print_csv(rows: Sequence[Row]) -> None:
            writer.writerows(rows)
            stream.flush()

        return print_csv
    table = _Table()
    return lambda rows: _put(stream, table.lines(rows))


def _told(row: Row) -> Row:
    return {name: row.get(name) for name in COLUMNS}


def _put(stream: TextIO, lines: Sequence[str]) -> None:
    stream.writelines(f"{line}\n" for line in lines)
    stream.flush()


class _Table:
    """Aligned columns, kept for the rows that follow, until the first product is named."""

    def __init__(self) -> None:
        self._product: int | None = None

    def lines(self, rows: Sequence[Row]) -> list[str]:
        """Rows as lines, below a header where the columns are new."""
        if not rows:
            return []
        head = []
        longest = max(len(row.get("catalog_item") or "") for row in rows)
        if self._product is None or (longest and not self._product):
            self._product = min(longest, _PRODUCT_WIDTH)
            head = [self._line("TIME", "SCORE", "VERDICT", "PRODUCT", "PATH")]
        return head + [
            self._line(
                row["classified_at"],
                "-" if row["score"] is None else f"{row['score']:.6f}",
                row["status"],
                one_line(row.get("catalog_item") or "-"),
                one_line(row["path"])
                + (f"  ({one_line(row['error'])})" if row["error"] else ""),
            )
            for row in rows
        ]

    def _line(self, time: str, score: str, verdict: str, product: str, path: str) -> str:
        # Without any product's name, as where there is no index, the column is left out.
        width = max(self._product or 0, len("PRODUCT"))
        named = f"{product:<{width}}  " if self._product else ""
        return f"{time:<24}  {score:>8}  {verdict:<8}  {named}{path}"


@contextmanager
def printing() -> Iterator[None]:
    """Have names that stdout's encoding lacks printed all the same; raise ClickException
    where it takes no more, such as a full disk."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # click ends it quietly
    except OSError as error:
        let_go()
        raise click.ClickException(f"cannot print: {error.strerror}") from error


def let_go() -> None:
    """What Python still holds for stdout has nowhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: str) -> str:
    """Text with line breaks or control characters must not break the table."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
