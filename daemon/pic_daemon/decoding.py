"""Reading files in processes of their own, so that no file can take the service down.

A decoder that crashes in native code, hangs, or asks for too much memory ends its
worker process, which is replaced; the file's Reading says what happened. Files are read
in groups, as a task costs more than a small picture; each file of a group that came to a
bad end is to be read alone, so that the guilty one is found.
"""

import math
import multiprocessing
import resource
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool

from pic_daemon.reading import Reading, read_images

MEMORY_LIMIT = 4 << 30
"""Address space of a worker in bytes: several times the largest picture allowed."""


Task = Callable[..., list[Any]]

_GROUP = 8  # files: beyond it a task's own cost is lost beside theirs


class Decoders:
    """Worker processes that read files; `done` is called from another thread.

    `timeout` is the longest that a file, or a group of them, may take, in seconds.
    """

    def __init__(
        self, workers: int, timeout: float, done: Callable[[list[Any]], None]
    ) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pic_daemon.reading"])
        self._workers = workers
        self._pool = self._new_pool()
        self._timeout = timeout
        self._done = done
        self._pending: dict[Future[list[Any]], Sequence[str]] = {}

    def __enter__(self) -> Self:
        # The first worker takes about a second to start, which no file is to wait for.
        self._pool.schedule(read_images, args=[[], 1, 1]).result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

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
        try:
            future = self._schedule(task, arguments)
        except RuntimeError:  # a worker was killed while idle, which ends the pool
            self._replace_pool()
            future = self._schedule(task, arguments)
        self._pending[future] = group
        future.add_done_callback(self._end)

    def _schedule(self, task: Task, arguments: Sequence[object]) -> "Future[list[Any]]":
        return self._pool.schedule(task, args=arguments, timeout=self._timeout)

    def _replace_pool(self) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()
        for future in list(self._pending):  # such as the pool lost when it ended
            future.cancel()
        self._pool = self._new_pool()

    def _end(self, ended: "Future[list[Any]]") -> None:
        group = self._pending.pop(ended, None)
        if group is not None:
            self._done(self._readings(group, ended))

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(self._workers, initializer=_start_worker, context=self._context)

    def _readings(self, group: Sequence[str], ended: "Future[list[Any]]") -> list[Any]:
        try:
            return ended.result()
        except TimeoutError:
            problem = f"decoding took longer than {self._timeout:g} s"
        except ProcessExpired:
            problem = "decoding crashed its worker process"
        except (BrokenProcessPool, CancelledError):  # no fault of these: read them again
            return [Reading(path, None, changed=True) for path in group]
        except BaseException as error:  # of the worker, not of this thread
            problem = f"internal error: {type(error).__name__}: {error}"
        if len(group) > 1:
            return [Reading(path, None, suspect=True) for path in group]
        (path,) = group
        return [Reading(path, None, error=problem, transient=True)]


def _start_worker() -> None:
    # Ctrl-C goes to the whole process group; only the service heeds it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
