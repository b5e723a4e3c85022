"""Types of command-line options that click lacks."""

import math
from typing import Any

import click


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
