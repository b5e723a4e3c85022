"""Command-line options that several commands have, and types that click lacks."""

import math
from pathlib import Path
from typing import Any

import click


class Place(click.ParamType):  # type: ignore[type-arg]  # before click 8.4 it has none
    """A path that the disk is not asked about, which may be a mount that hangs."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        """The path; fails where it is empty, which would mean the current folder."""
        if not str(value) or "\0" in str(value):
            self.fail("an empty path, or one with a NUL, names nothing.", param, ctx)
        return Path(value)


class FiniteRange(click.FloatRange):
    """A FloatRange without nan, which is below no limit and above none, and infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; fails with a sentence where it is none or out of range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


PROVIDERS = click.Choice(["auto", "cpu", "cuda"])
"""Execution providers, as `open_session` takes them."""

DATABASE = click.option("--database", required=True, type=Place(), help="The match log.")
