"""When is a file complete? A tracker that knows nothing of events or disks.

Cases it handles:
- a writer closed the file, or renamed it into place: read it at once;
- nothing told of the end (a scan found it): read it once its stamp has stood
  still for `settle_seconds`;
- it changes meanwhile: the wait begins anew;
- it never stands still, and does more than grow, as an upload does: what a camera writes
  anew every second is read as it is then;
- it was read at once and proved incomplete: `wait` puts it back to stand still.
"""

import heapq
import math
from dataclasses import dataclass, field

from pic_daemon.folders import FileStamp

_PATIENCE = 30  # waits of `settle_seconds`, for a file that never stands still


@dataclass
class _Waiting:
    stamp: FileStamp
    due: float
    latest: float
    seen_at: float
    grows: bool = True  # and nothing else has happened to it


@dataclass
class SettleTracker:
    """Files that are not complete yet. Times `now` are monotonic, in seconds."""

    settle_seconds: float
    _waiting: dict[str, _Waiting] = field(default_factory=dict)
    _queue: list[tuple[float, str]] = field(default_factory=list)  # heap, may be stale

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, path: str) -> bool:
        return path in self._waiting

    def wait(
        self, path: str, stamp: FileStamp, now: float, seen_at: float, longer: float = 0.0
    ) -> None:
        """Watch `path`, first noticed at wall time `seen_at`, until it stands still.

        `longer` seconds are added to the usual wait, where something went wrong.
        """
        waiting = self._waiting.get(path)
        if waiting and waiting.stamp == stamp:
            return
        due = now + self.settle_seconds + longer
        latest, grows = due + (_PATIENCE - 1) * self.settle_seconds, True
        if waiting:
            before, latest, seen_at = waiting.stamp, waiting.latest, waiting.seen_at
            larger = stamp.inode == before.inode and stamp.bytes > before.bytes
            grows = waiting.grows and larger
            due = due if grows else min(due, latest)
        self._waiting[path] = _Waiting(stamp, due, latest, seen_at, grows)
        heapq.heappush(self._queue, (due, path))

    def awaits(self, path: str, stamp: FileStamp) -> bool:
        """Whether `path` is still watched, and was last seen with this stamp."""
        waiting = self._waiting.get(path)
        return waiting is not None and waiting.stamp == stamp

    def overdue(self, path: str, now: float) -> bool:
        """Whether `path` has been waiting for so long that it may never stand still."""
        waiting = self._waiting.get(path)
        return waiting is not None and now >= waiting.latest and not waiting.grows

    def release(self, path: str) -> float | None:
        """Stop waiting for `path`; returns when it was first noticed, if it was here."""
        waiting = self._waiting.pop(path, None)
        return waiting.seen_at if waiting else None

    def due(self, now: float) -> list[tuple[str, FileStamp]]:
        """Files whose wait is over, each told once, with the stamp they must still have."""
        over = []
        while (moment := self.next_due()) is not None and moment <= now:
            _, path = heapq.heappop(self._queue)
            waiting = self._waiting[path]
            waiting.due = math.inf  # it may be in the queue once more for this moment
            over.append((path, waiting.stamp))
        return over

    def oldest(self) -> float | None:
        """Wall time at which the longest waiting file was noticed, or None."""
        return min((w.seen_at for w in self._waiting.values()), default=None)

    def next_due(self) -> float | None:
        """When the first wait ends, or None where nothing waits."""
        while self._queue:
            due, path = self._queue[0]
            waiting = self._waiting.get(path)
            if waiting and waiting.due == due:
                return due
            heapq.heappop(self._queue)
        return None
