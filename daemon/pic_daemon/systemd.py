"""Tell systemd how the service is doing (sd_notify(3)); silent elsewhere."""

import os
import socket


def notify(state: str) -> None:
    """Send `state`, such as ``READY=1``, to the service manager if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(state.encode())


def watchdog_seconds() -> float:
    """How long systemd waits for a sign of life (sd_watchdog_enabled(3)); 0: for ever."""
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
