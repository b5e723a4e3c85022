"""The one error a user can put right, and how to tell it from one that passes."""

import errno
import socket

import click


class InputError(click.ClickException):
    """Something the user gave is wrong: the message says what, where and what to do.

    Raised anywhere in the library; click prints it as one sentence and ends the
    command with exit code 2.
    """

    exit_code = 2


def not_listening(where: str, error: Exception) -> click.ClickException:
    """Why an address cannot be had: exit code 1 where that may pass, so that systemd tries
    again, as before the network is up or while another program still has the port.
    """
    passing = isinstance(error, socket.gaierror) or (
        isinstance(error, OSError)
        and error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
    )
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    kind = click.ClickException if passing else InputError
    return kind(f"{where}: {reason}.")
