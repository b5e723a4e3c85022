"""What a process may use, and how it is set up before PyTorch is imported."""

import ctypes
import os
import platform
import signal

from pic_daemon import cores as machine
from pic_daemon.errors import InputError

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEPT_BYTES = 2**31 - 1


def cores() -> int:
    """Cores for this process, of those it may run on: its share where torchrun started
    several on this machine."""
    return max(1, machine.cores() // told_by_torchrun("LOCAL_WORLD_SIZE", 1))


def told_by_torchrun(name: str, least: int) -> int:
    """The number that torchrun put into the environment, `least` where it did not start
    this; raises InputError where it is none, or smaller."""
    given = os.environ.get(name, str(least))
    if not given.isdecimal() or int(given) < least:
        raise InputError(f"the environment says {name}={given}, no such number: unset it.")
    return int(given)


def heed_sigterm() -> None:
    """Make SIGTERM end the program as Ctrl-C does, which leaves no working copies."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def prepare_for_training() -> None:
    """Keep freed memory, and sleep rather than spin while waiting for other threads.

    Each step of the CNN frees and takes 100 MB blocks for the gradient of its first
    linear layer and for its bfloat16 copies. By default every one of them is
    unmapped and then cleared page by page by the kernel, which took half of the step
    (463 -> 870 images/s at batch 64 on two cores). OpenMP threads that spin at a
    barrier take the core from the process that renders the next samples.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TOP_PAD, 100 * 2**20)


def release_memory() -> None:
    """Give memory that is free between two epochs back to the kernel.

    A full run of five epochs without this, and with an array kept for each batch of
    the validation, came to 5.9 GiB, of which there is no page. With both mended such runs
    have stayed at 1.0 to 1.3 (bench/results/published-protocol.md). Which of the two it
    was is not known.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
