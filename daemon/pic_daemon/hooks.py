"""The two ways to tell of a match: a POST to a web address, a program's stdin."""

import http.client
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from pic_daemon.config import Config
from pic_daemon.errors import InputError
from pic_daemon.folders import text_of

_REAP_S = 1.0  # the longest that a killed program is waited for

_left: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}
"""By command the process that was killed last; it may wait for a disk that hangs."""

_HEADER = re.compile(r"([A-Za-z0-9-]+): ?([\x21-\x7e][\x20-\x7e]*)")


class NotDelivered(Exception):
    """The hook did not take it; the message says why, without any secret."""


def post(url: str, header_file: Path | None, timeout: float, message: str) -> None:
    """POST `message` to `url`; any 2xx takes it. Raises NotDelivered.

    The exchange is cut off after `timeout` seconds, to which looking up the name, and each
    further address that does not answer, may add. Redirects are not followed and
    the body of the answer is not read. Over https the certificate must be of an authority
    that OpenSSL knows here: the system's, and those in the file SSL_CERT_FILE names.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"pic-daemon/{version('product-image-classifier')}",
    }
    if header_file:
        try:
            name, value = read_header(header_file)
        except InputError as error:
            raise NotDelivered(error.message) from error
        headers[name] = value
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _connection(url, timeout)
    late = threading.Event()
    limit = threading.Timer(timeout, _cut, [connection, late])
    limit.start()
    try:
        connection.connect()
        if late.is_set():  # while shaking hands, where there was nothing yet to cut
            raise TimeoutError
        connection.request("POST", target, message.encode(), headers)
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        # The socket's own limit is the same, and may be first by a moment.
        if late.is_set() or isinstance(error, TimeoutError):
            raise NotDelivered(f"no answer within {timeout:g} s") from error
        raise NotDelivered(_reason(error)) from error
    finally:
        limit.cancel()
        connection.close()
    if late.is_set():  # a status line came, the rest of the answer did not
        raise NotDelivered(f"no answer within {timeout:g} s")
    if not 200 <= answer.status < 300:
        note = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        raise NotDelivered(f"it answered {answer.status}{note}")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    return f"{type(error).__name__}: {error}"


def _connection(url: str, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = (
        http.client.HTTPSConnection  # verifies the certificate
        if parts.scheme == "https"
        else http.client.HTTPConnection
    )
    return kind(parts.hostname or "", parts.port, timeout=timeout)


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    """End what another thread reads from or writes to this connection."""
    late.set()
    sock = connection.sock
    if sock is not None:
        with suppress(OSError):  # closed meanwhile
            # Not SSLSocket's own shutdown, which is no business of a second thread.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def read_header(file: Path) -> tuple[str, str]:
    """Name and value of the header, ``Name: value``, of the one line that a file holds.

    Raises InputError where there is none or the file is open to everyone.
    """
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not ASCII text"
        raise InputError(f"webhook_header_file {file}: {reason}.") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise InputError(f"webhook_header_file {file}: every user may use it; chmod o= it.")
    found = _HEADER.fullmatch(text)
    if not found:
        raise InputError(
            f"webhook_header_file {file}: it must hold one line such as "
            "'Authorization: Bearer SECRET'."
        )
    return found[1], found[2]


def run_command(command: Sequence[str], timeout: float, message: str) -> None:
    """Run a program with `message` as a line on its stdin; exit code 0 takes it.

    Raises NotDelivered. After `timeout` seconds it is killed with all it started; what
    it writes to stderr goes to the service's log, its stdout nowhere.
    """
    left = _left.get(tuple(command))
    if left and left.poll() is None:
        raise NotDelivered("it was killed for taking too long, and has not ended yet")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    }
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True, env=environment,
        )  # fmt: skip
    except OSError as error:
        raise NotDelivered(f"{command[0]}: {error.strerror or error}") from error
    try:
        process.communicate(message.encode() + b"\n", timeout)
    except subprocess.TimeoutExpired as error:
        # It became another user, or nothing ends it.
        _left[tuple(command)] = process
        with suppress(PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_REAP_S)
        raise NotDelivered(f"it took longer than {timeout:g} s") from error
    if process.returncode:
        raise NotDelivered(f"it ended with exit code {process.returncode}")


def check_hooks(config: Config) -> None:
    """Raise InputError where a header cannot be read or a program cannot be run."""
    if config.webhook_header_file:
        read_header(config.webhook_header_file)
    if config.command:
        program = config.command[0]
        if not os.path.isfile(program) or not os.access(program, os.X_OK):
            raise InputError(f"command {program}: no program that this user may run.")


def describe_hooks(config: Config) -> list[str]:
    """A line about each hook; connects to the webhook and says nothing to it."""
    lines = []
    if config.webhook:
        parts = urlsplit(config.webhook)  # its path may be a secret
        state = _try(config.webhook, config.hook_seconds)
        lines.append(f"webhook {parts.scheme}://{parts.netloc}: {state}")
    if config.command:
        lines.append(f"command {text_of(config.command[0])}: can be run")
    return lines


def _try(url: str, timeout: float) -> str:
    connection = _connection(url, timeout)
    try:
        connection.connect()
    except OSError as error:
        return f"cannot be reached now ({_reason(error)}); matches would wait for it"
    finally:
        connection.close()
    return "can be reached"
