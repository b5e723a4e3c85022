"""Tell systemd how the service is doing (sd_notify(3)); silent elsewhere."""

import logging
import os
import socket
import sys
from contextlib import suppress

STILL_STARTING = "EXTEND_TIMEOUT_USEC=30000000"
"""Asks systemd for 30 s more, where its TimeoutStartSec is over (sd_notify(3))."""


def notify(state: str) -> None:
    """Send `state`, such as ``READY=1``, to the service manager if there is one.

    One that does not listen costs nothing but the news.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(address)
        sock.sendall(state.encode())


def watchdog_seconds() -> float:
    """How long systemd waits for a sign of life (sd_watchdog_enabled(3)); 0: for ever."""
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6


def log_format() -> logging.Formatter:
    """Lines that begin with their level: in journald's form where it reads stderr.

    sd-daemon(3): ``<4>`` is a warning, which ``journalctl -p warning`` finds.
    """
    journal = os.environ.get("JOURNAL_STREAM")  # systemd.exec(5)
    if journal and sys.stderr:
        stderr = os.fstat(sys.stderr.fileno())
        if journal == f"{stderr.st_dev}:{stderr.st_ino}":
            return _JournalFormatter("%(message)s")
    return logging.Formatter("%(levelname)s %(message)s")


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = next(p for least, p in _PRIORITIES if record.levelno >= least)
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"<{level}>{line}" for line in lines)


_PRIORITIES = (
    (logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6),
    (logging.NOTSET, 7),
)  # fmt: skip
