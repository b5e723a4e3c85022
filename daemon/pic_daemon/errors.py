"""The one error a user can put right."""

import click


class InputError(click.ClickException):
    """Something the user gave is wrong: the message says what, where and what to do.

    Raised anywhere in the library; click prints it as one sentence and ends the
    command with exit code 2.
    """

    exit_code = 2
