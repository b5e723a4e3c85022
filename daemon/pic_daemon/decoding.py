"""Reading files in processes of their own, so that no file can take the service down.

A decoder that crashes in native code, hangs, or asks for too much memory ends its
worker process, which is replaced; the file's Reading says what happened. Files are read
in groups, as a task costs more than a small picture; each file of a group that came to a
bad end is to be read alone, so that the guilty one is found.

A process that waits for a file system may be one that not even SIGKILL ends (FUSE, once
its server has taken the request). pebble waits for such a one with its locks held, and so
all of its workers are left behind and others take their place.
"""

import ctypes
import logging
import math
import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

import click
from pebble import ProcessExpired, ProcessPool

from pic_daemon.reading import Reading, read_images

logger = logging.getLogger("pic_daemon")

MEMORY_LIMIT = 4 << 30
"""Address space in bytes that a worker may add to what it began with: several times the
largest picture allowed."""

_KEPT_BYTES = 64 << 20  # a picture of 20 megapixels in RGB
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h; the last up to 32 MiB

Task = Callable[..., list[Any]]

_GROUP = 8  # files: beyond it a task's own cost is lost beside theirs
_LATE_S = 15.0  # beyond the timeout, in which pebble ends a worker that can be ended
_END_S = 10.0  # the longest that the end of the service waits for workers
_START_S = 10.0  # the longest that its start waits for each of them


class Decoders:
    """Worker processes that read files; `done` is called from another thread.

    `timeout` is the longest that a file, or a group of them, may take, in seconds.
    """

    def __init__(
        self, workers: int, timeout: float, done: Callable[[list[Any]], None]
    ) -> None:
        self._context = worker_context()
        self._workers = workers
        with _saying_who_cannot_start():
            self._started = self._context.Semaphore(0)
            self._pool = self._new_pool()
        self._timeout = timeout
        self._done = done
        self._pending: dict[Future[list[Any]], Sequence[str]] = {}
        self._stirred = time.monotonic()  # when a group last ended, or the first began

    def __enter__(self) -> Self:
        # The first worker takes about a second to start, which no file is to wait for.
        with _saying_who_cannot_start():
            self._schedule(read_images, [[], 1, 1]).result()
        # One that is still starting when the pool ends leaves a traceback.
        for _ in range(self._workers):
            self._started.acquire(timeout=_START_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _shut(self._pool).join(_END_S)

    def look(self) -> None:
        """Leave the workers behind where none comes back long after it should have."""
        late = self._stirred + self._timeout + _LATE_S
        if self._pending and time.monotonic() > late:
            self.leave_behind()

    def leave_behind(self) -> None:
        """Have others read what the workers have in hand now, and do not wait for them.

        What a worker was busy with alone is told as an attempt that failed.
        """
        logger.warning("worker processes do not come back; others take their place")
        left, self._pool = self._pool, self._new_pool()
        _shut(left)
        problem = f"no answer to a read within {self._timeout:g} s"
        for future in list(self._pending):
            if (group := self._pending.pop(future, None)) is not None:
                self._done(_failed(group, problem) if future.running() else _again(group))
        self._stirred = time.monotonic()

    def run(self, task: Task, path: str, *arguments: object) -> None:
        """Begin `task(path, *arguments)`; `done` gets its list, or a Reading if it failed.

        `task` and `arguments` can be pickled.
        """
        self._begin([path], task, path, *arguments)

    def read(self, paths: Sequence[str], size: int, max_pixels: int) -> None:
        """Begin to read files to size x size pixels; their Readings come to `done`."""
        share = min(_GROUP, math.ceil(len(paths) / self._workers))
        for start in range(0, len(paths), share or 1):
            group = paths[start : start + share]
            self._begin(group, read_images, group, size, max_pixels)

    def _begin(self, group: Sequence[str], task: Task, *arguments: object) -> None:
        with _saying_who_cannot_start():
            try:
                future = self._schedule(task, arguments)
            except RuntimeError:  # a worker was killed while idle, which ends the pool
                self._replace_pool()
                future = self._schedule(task, arguments)
        if not self._pending:
            self._stirred = time.monotonic()
        self._pending[future] = group
        future.add_done_callback(self._end)

    def _schedule(self, task: Task, arguments: Sequence[object]) -> "Future[list[Any]]":
        return self._pool.schedule(task, args=arguments, timeout=self._timeout)

    def _replace_pool(self) -> None:
        _shut(self._pool)
        for future in list(self._pending):  # such as the pool lost when it ended
            future.cancel()
        self._pool = self._new_pool()

    def _end(self, ended: "Future[list[Any]]") -> None:
        group = self._pending.pop(ended, None)
        if group is not None:
            self._stirred = time.monotonic()
            self._done(self._readings(group, ended))

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            self._workers,
            initializer=_start_worker,
            initargs=[self._started],
            context=self._context,
        )

    def _readings(self, group: Sequence[str], ended: "Future[list[Any]]") -> list[Any]:
        try:
            return ended.result()
        except TimeoutError:
            problem = f"decoding took longer than {self._timeout:g} s"
        except ProcessExpired:
            problem = "decoding crashed its worker process"
        except (BrokenProcessPool, CancelledError):  # no fault of these
            return _again(group)
        except BaseException as error:  # of the worker, not of this thread
            problem = f"internal error: {type(error).__name__}: {error}"
        return _failed(group, problem)


@contextmanager
def _saying_who_cannot_start() -> Iterator[None]:
    """Raise ClickException where a process cannot be started; of a BrokenPipeError click
    would say nothing."""
    try:
        yield
    except (BrokenPipeError, BlockingIOError, EOFError, BrokenProcessPool) as error:
        raise click.ClickException(
            "a process that reads files has ended or could not be started: may this user "
            f"run {sys.executable}, and as many processes? Else set workers lower."
        ) from error


def worker_context(*preload: str) -> ForkServerContext:
    """What starts processes for looking at pictures, from a server that holds no threads.

    They do not import the program that they belong to, as each would by default: half a
    second and 35 MB of it for the whole service. Their tasks come from other modules; those
    named by `preload` are imported once for all.
    """
    try:
        os.chdir(os.getcwd())  # as each worker does, or ends
    except OSError:  # as where sudo -u was asked below somebody's home
        os.chdir("/")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pic_daemon.single_threaded", "pic_daemon.identification", *preload]
    )
    sys.modules["__main__"].__file__ = None
    return context


def _again(group: Sequence[str]) -> list[Reading]:
    return [Reading(path, None, changed=True) for path in group]


def _failed(group: Sequence[str], problem: str) -> list[Reading]:
    if len(group) > 1:
        return [Reading(path, None, suspect=True) for path in group]
    (path,) = group
    return [Reading(path, None, error=problem, transient=True)]


def _shut(pool: ProcessPool) -> Thread:
    """A thread that ends a pool, or hangs with it."""

    def end() -> None:
        with suppress(RuntimeError):
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()

    thread = Thread(target=end, name="ending workers", daemon=True)
    thread.start()
    return thread


def _start_worker(started: Semaphore) -> None:
    # Ctrl-C goes to the whole process group; only the service heeds it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _mapped() + MEMORY_LIMIT
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_freed_memory()
    started.release()


def _mapped() -> int:
    """Address space of this process in bytes (proc(5), statm)."""
    pages, *_ = Path("/proc/self/statm").read_text().split()
    return int(pages) * resource.getpagesize()


def keep_freed_memory() -> None:
    """Have this process keep up to 64 MiB of what it frees, where malloc is glibc's.

    By default the memory of each picture is given back, and the next one's is cleared page
    by page by the kernel: 1.6 of the 3.9 ms that a WebP of 500 px took
    (bench/results/throughput.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
