"""How far the work is: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

_LINE_EVERY_S = 60


@contextmanager
def progress_bar(
    label: str, count: int, done: int, silent: bool
) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with every number of images that is done.

    `done` of `count` were done before. `silent`: another process shows it.
    """
    started = said = time.monotonic()
    shown = 0

    def rate() -> float:
        return shown / max(time.monotonic() - started, 1e-9)

    def speed(_: Any) -> str:
        return f"{rate():.0f} images/s"

    on_terminal = sys.stdout.isatty() and not silent
    with click.progressbar(
        length=count, label=label, item_show_func=speed, hidden=not on_terminal
    ) as bar:
        bar.update(done)

        def show(images: int) -> None:
            nonlocal shown, said
            shown += images
            bar.update(images)
            now = time.monotonic()
            if not on_terminal and not silent and now - said >= _LINE_EVERY_S:
                said = now
                left = (count - done - shown) / rate() / 60
                click.echo(
                    f"{label}: {done + shown:,} of {count:,}, {rate():.0f} images/s, "
                    f"{left:.0f} min left"
                )

        yield show
