"""A lock file: what it lies beside is one program's at a time."""

import fcntl
import os


def lock(name: str) -> int:
    """Make the file if it is missing, and lock it; returns its descriptor, to be closed.

    The lock ends with this process alone. Raises BlockingIOError where another process
    holds it, and OSError where the file cannot be opened or locked.
    """
    handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
