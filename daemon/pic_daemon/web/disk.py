"""Looks at folders, any of which may hang as a mount does that is gone."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

_SILENT_S = 5.0  # after so long without an answer a folder is not asked for the next
_AGAIN_S = 30.0  # until it is tried once more
MOST_LOOKS = 16
"""At one folder at a time: those at a mount that hangs never end."""
_AT_ONCE = 2  # pictures read from each folder

T = TypeVar("T")


@dataclass(frozen=True)
class Disk:
    """What the event loop asks of the disk. Pictures of a folder are read in its `turns`;
    `unanswered`: since when (monotonic, s) a folder owes an answer."""

    turns: defaultdict[Path, asyncio.Semaphore] = field(
        default_factory=lambda: defaultdict(lambda: asyncio.Semaphore(_AT_ONCE))
    )
    unanswered: dict[Path, float] = field(default_factory=dict)

    async def ask(self, folder: Path, work: Callable[[], T]) -> T:
        """What `work`, which looks into `folder`, returns from a thread of its own.

        That thread does not keep the process from ending. Raises TimeoutError where the
        folder has not answered for some seconds: it is not asked again at once.
        """
        name = f"look {folder}"
        if sum(thread.name == name for thread in threading.enumerate()) >= MOST_LOOKS:
            raise TimeoutError
        now = time.monotonic()
        waiting = now - self.unanswered.setdefault(folder, now)
        if _SILENT_S <= waiting < _AGAIN_S:
            raise TimeoutError
        if waiting >= _AGAIN_S:
            self.unanswered[folder] = now
        answer: Future[T] = Future()
        answer.set_running_or_notify_cancel()

        def run() -> None:
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)
            finally:
                self.unanswered.pop(folder, None)

        threading.Thread(target=run, name=name, daemon=True).start()
        return await asyncio.wrap_future(answer)
