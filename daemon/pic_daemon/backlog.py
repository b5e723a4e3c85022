"""Files that were noticed and have no row yet, and which of them are to be read next.

A file comes from a scan or a hint, waits until it is complete, and is in hand from then
on until it has its row. What lies in a folder that is offline is let go: the scan at the
folder's return finds it again.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pic_daemon.folders import FileStamp, mount_of, text_of
from pic_daemon.match_log import Outcome
from pic_daemon.recording import Recorder
from pic_daemon.scanning import Found, Scanner, SeenAgain
from pic_daemon.settle import SettleTracker
from pic_daemon.watch import FileHint

_MOST_HELD = 100_000  # files of a folder; those beyond wait for a scan, not in memory
_SCAN_STEP = 1000  # files compared between two looks into the inbox
_SCAN_SHARE = 100  # the same while others are ready to be read
_SKEW_S = 60.0  # by which the clock of a file server may differ, and what it says be late


@dataclass
class InHand:
    """A file between being chosen and being recorded; `seen_at` is a POSIX time."""

    seen_at: float
    stamp: FileStamp  # when it was chosen
    settled: bool
    hinted_again: FileStamp | None = None
    closed_again: bool = False  # it was closed once more since
    alone: bool = False  # to be read in a group of its own


class Backlog:
    """Belongs to the service's loop; `passed` is told how many files need no more work.

    `failed_before` gets what became of a file that failed and is met again as it was.
    """

    def __init__(
        self,
        recorder: Recorder,
        settle_seconds: float,
        passed: Callable[[int], None],
        failed_before: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self.in_hand: dict[str, InHand] = {}
        self.gone = 0  # files that were dropped when their turn had come
        self._recorder = recorder
        self._passed = passed
        self._failed_before = failed_before
        self._settling = SettleTracker(settle_seconds)
        self._ready: dict[Scanner, deque[str]] = {}  # in the order of their turns
        self._found: list[Found] = []
        self._held: Counter[Scanner] = Counter()  # files in memory
        self._scanners: list[Scanner] = []  # deepest folder first
        self._passed_over: set[Scanner] = set()  # whose hints were, since the last scan

    def __len__(self) -> int:
        return len(self.in_hand) + len(self._settling)

    def watch(self, scanners: Iterable[Scanner], besides: bool = False) -> None:
        """Take files from these; such as have a strike and are gone are forgotten.

        `besides` leaves those that lie in none of their folders.
        """
        self._scanners = sorted(scanners, key=lambda s: -len(s.within))
        self._ready = {scanner: deque() for scanner in self._scanners}
        for path in self._recorder.write(self._recorder.log.struck):
            if self._scanner_of(path):
                self._see_again(path, None)
            elif not besides:  # its folder is not watched any more
                self.drop(path)

    def scan(self, again: bool = False) -> None:
        """Compare folders and log; for those being scanned not, or once more after it."""
        for scanner in self._scanners:
            scanner.scan(again)

    def look_at_folders(self) -> bool:
        """Find out which folders answer; whether one ceased to that has files in hand."""
        ceased = [scanner for scanner in self._scanners if scanner.judge()]
        return bool(ceased) and any(self._scanner_of(p) in ceased for p in self.in_hand)

    def folders_offline(self) -> list[str]:
        """The names of the folders that are gone or do not answer."""
        return [text_of(str(s.folder.path)) for s in self._scanners if not s.online]

    def online(self, path: str) -> bool:
        """Whether the deepest folder that this file is in is there and answers."""
        scanner = self._scanner_of(path)
        return scanner is not None and scanner.online

    def there(self, path: str) -> bool:
        """The same, and its file system is mounted at this moment where it was."""
        scanner = self._scanner_of(path)
        if scanner is None or not scanner.online:
            return False
        return mount_of(scanner.folder.path).point == scanner.mount_point

    def quiet(self) -> bool:
        """Whether nothing is to be read or compared just now."""
        return not (self.in_hand or self._found)

    def more(self) -> bool:
        """Whether files wait for their turn to be read."""
        return bool(self._any_ready() or self._found)

    def scanning(self) -> bool:
        """Whether files wait while a scan is not over, which may bring more of them."""
        under_way = any(s.online and s.busy for s in self._scanners)
        return bool(len(self)) and (under_way or bool(self._found))

    def mount_points(self) -> dict[Path, str]:
        """The innermost mount point on which each folder has been seen."""
        return {s.folder.path: s.mount_point for s in self._scanners}

    def done(self) -> bool:
        """Whether all is dealt with, but for what may still lie in the inbox."""
        scanned = all(s.online and not s.busy for s in self._scanners)
        return scanned and not (len(self) or self._found or self._passed_over)

    def oldest(self) -> float | None:
        """POSIX time at which the file that waits longest was noticed."""
        times = [file.seen_at for file in self.in_hand.values()]
        if (settling := self._settling.oldest()) is not None:
            times.append(settling)
        return min(times, default=None)

    def next_due(self) -> float | None:
        """When `end_waits` has something to do, in monotonic seconds."""
        return self._settling.next_due()

    def end_waits(self, now: float) -> None:
        """Have files looked at that should be complete by now."""
        for path, stamp in self._settling.due(now):
            self._see_again(path, stamp)

    def choose(self, room: int) -> tuple[list[str], bool]:
        """At most `room` files to read now, and whether there is more to look at.

        Folders take turns, and scans of those with nothing ready go on meanwhile, so that
        none waits until another, however busy, is done.
        """
        for scanner in [s for s in self._passed_over if not self._ready[s]]:
            self._passed_over.discard(scanner)
            scanner.scan(again=True)
        chosen: list[str] = []
        steps = _SCAN_SHARE if self._any_ready() else _SCAN_STEP
        while len(chosen) < room:
            if steps and (found := self._to_compare()):
                steps -= 1
                self._compare(found)
            elif path := self._next_ready():
                if self.online(path):
                    chosen.append(path)
                else:
                    self.drop(path)
            else:
                return chosen, self._to_compare() is not None
        return chosen, False

    def _any_ready(self) -> bool:
        return any(self._ready.values())

    def _next_ready(self) -> str | None:
        for scanner, paths in self._ready.items():
            if paths:
                self._ready[scanner] = self._ready.pop(scanner)  # to the end
                return paths.popleft()
        return None

    def _to_compare(self) -> Found | None:
        """A scan of a folder that has nothing ready and does not keep too much in memory;
        of one that is offline it is let go."""
        for found in self._found:
            scanner = found.scanner
            idle = not self._ready[scanner] and self._held[scanner] < _MOST_HELD
            if idle or not scanner.online:
                return found
        return None

    def heed(self, sight: Found | SeenAgain | FileHint) -> None:
        """Take note of what a scanner saw."""
        match sight:
            case Found(files=files):
                if files:
                    self._found.append(sight)
            case SeenAgain(seen):
                for path, expected, stamp in seen:
                    self._seen(path, expected, stamp)
            case FileHint(path, stamp, complete, heard_in):
                scanner = self._scanner_of(path)
                held = path in self.in_hand or path in self._settling
                if scanner and (held or self._held[scanner] < _MOST_HELD):
                    closed = complete and scanner.folder.path == heard_in
                    self._consider(path, stamp, complete, scanner, closed)
                elif scanner:
                    self._passed_over.add(scanner)

    def read_again(self, path: str) -> None:
        """Have a file in hand read once more at once."""
        if scanner := self._scanner_of(path):
            self._ready[scanner].append(path)

    def wait_again(self, path: str, stamp: FileStamp, longer: float = 0.0) -> None:
        """Have a file in hand stand still once more, `longer` seconds beyond the usual."""
        file = self.in_hand.pop(path)
        self._settling.wait(path, stamp, time.monotonic(), file.seen_at, longer)
        self._heed_again(path, file)

    def drop(self, path: str) -> None:
        """Forget a file that needs no row now; a scan finds it if it is there later."""
        self._recorder.write(lambda: self._recorder.log.put_down(path))
        if path in self.in_hand:
            self.gone += 1
            self.let_go(path)

    def let_go(self, path: str) -> None:
        """Be done with a file in hand, unless something happened to it meanwhile."""
        self._passed(1)
        file = self.in_hand.pop(path)
        self._hold(path, -1)
        self._heed_again(path, file)

    def _heed_again(self, path: str, file: InHand) -> None:
        """What happened to a file while it was in hand."""
        if file.hinted_again and (scanner := self._scanner_of(path)):
            closed = file.closed_again
            self._consider(path, file.hinted_again, closed, scanner, closed)

    def _compare(self, found: Found) -> None:
        """Compare the next file that a scan met with the log."""
        if found.files and found.scanner.online:
            self._consider(*found.files.popleft(), False, found.scanner)
        else:
            self._found.remove(found)
            found.scanner.go_on()

    def _consider(
        self,
        path: str,
        stamp: FileStamp,
        complete: bool,
        scanner: Scanner,
        closed: bool = False,
    ) -> None:
        # Closed once more within a tick of the file system's clock it looks as it did, so
        # that a file is read whatever is known of it.
        if in_hand := self.in_hand.get(path):
            if closed or stamp != in_hand.stamp:
                in_hand.closed_again |= closed
                in_hand.hinted_again = stamp
            return
        if not closed and (row := self._recorder.log.row_of(path, stamp)):
            self._passed(1)
            status, sha256 = row
            if status == "failed":
                self._failed_before(Outcome(path, sha256, stamp, status, 0.0, 0.0))
            return
        age = time.time() - stamp.mtime_ns / 1e9
        own = self._scanner_of(path) or scanner  # which may be of a folder within
        skew = _SKEW_S if own.folder.mode == "poll" else 0.0
        still = age >= self._settling.settle_seconds + skew
        if complete or still:
            self._take(path, stamp, still, scanner)
        else:
            if path not in self._settling:
                self._hold(path)
            self._settling.wait(path, stamp, time.monotonic(), time.time())

    def _hold(self, path: str, files: int = 1) -> None:
        if scanner := self._scanner_of(path):
            self._held[scanner] += files

    def _take(self, path: str, stamp: FileStamp, settled: bool, scanner: Scanner) -> None:
        if path not in self._settling:
            self._hold(path)
        seen_at = self._settling.release(path) or time.time()
        self.in_hand[path] = InHand(seen_at, stamp, settled)
        self._ready[scanner].append(path)

    def _see_again(self, path: str, expected: FileStamp | None) -> None:
        if scanner := self._scanner_of(path):
            scanner.see_again(path, expected)

    def _seen(self, path: str, expected: FileStamp | None, stamp: FileStamp | None) -> None:
        if path in self.in_hand:
            return  # a hint was faster
        if stamp is None:
            as_expected = expected and self._settling.awaits(path, expected)
            if path in self._settling and not as_expected:
                return  # it came anew while it was looked for
            if self._settling.release(path) is not None:
                self._hold(path, -1)
            if self.online(path):
                self.drop(path)
        elif expected and self._settling.awaits(path, expected):
            now, scanner = time.monotonic(), self._scanner_of(path)
            still = stamp == expected
            if scanner and (still or self._settling.overdue(path, now)):
                self._take(path, stamp, still, scanner)
            else:
                self._settling.wait(path, stamp, now, time.time())

    def _scanner_of(self, path: str) -> Scanner | None:
        return next((s for s in self._scanners if path.startswith(s.within)), None)
