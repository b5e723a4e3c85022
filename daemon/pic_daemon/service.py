"""The loop: hint or scan -> settled? -> read -> batch -> score -> one transaction.

One thread owns all state and the database. Decoders and watchdog only put messages
into its inbox, so that nothing here needs a lock. A crash anywhere is answered by
the scan at the next start: what has no row yet is done then.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pic_daemon.config import Config
from pic_daemon.decoding import Decoders
from pic_daemon.folders import FileStamp, Folder, set_aside, stamp_of, text_of
from pic_daemon.health import Health
from pic_daemon.match_log import MatchLog, Outcome
from pic_daemon.model import Model, Verdict
from pic_daemon.model_file import ModelFile, NewModel
from pic_daemon.reading import Reading
from pic_daemon.retention import Retention
from pic_daemon.settle import SettleTracker
from pic_daemon.systemd import notify
from pic_daemon.watch import FileHint, FolderHint, Hint, HintsLost, Watches

logger = logging.getLogger("pic_daemon")

_BATCH_WAIT_S = 0.02  # the longest a decoded image waits for others to fill a batch
_LONGEST_WAIT_S = 60.0
_SCAN_STEP = 1000  # files compared between two looks into the inbox
_DATABASE_RETRY_S = 2.0  # between two attempts while the database takes nothing
_STRIKES = 2  # attempts at a file that may crash, hang or end in an I/O error
_STRIKE_WAIT_S = 5.0  # between them
_LOOK_S = 5.0  # between two looks at the model file and at the folders themselves
_BEAT_S = 30.0  # between two heartbeats in the database
_STUCK_S = 60.0  # beyond the time that decoding may take
_READ_AHEAD = 2  # batches being read or waiting to be scored


@dataclass(frozen=True)
class Stop:
    """Finish what is in hand, then leave the loop."""


@dataclass(frozen=True)
class Reload:
    """Load the model file anew and compare folders and log."""


Message = Hint | list[Reading] | Stop | Reload | NewModel

T = TypeVar("T")


@dataclass
class _InHand:
    """A file between being chosen and being recorded."""

    seen_at: float
    settled: bool
    hinted_again: bool = False
    alone: bool = False  # to be read in a group of its own


@dataclass
class Service:
    """The running service: `run` returns after a Stop message."""

    config: Config
    model: Model
    log: MatchLog
    health: Health = field(init=False)
    inbox: "queue.SimpleQueue[Message]" = field(default_factory=queue.SimpleQueue)
    _settling: SettleTracker = field(init=False)
    _ready: deque[str] = field(default_factory=deque)
    _in_hand: dict[str, _InHand] = field(default_factory=dict)
    _reading: int = 0
    _batch: list[Reading] = field(default_factory=list)
    _batch_since: float = 0.0
    # Each with the folder that it covers as a whole, if it does.
    _scans: deque[tuple[Folder | None, Iterator[tuple[str, FileStamp]]]] = field(
        default_factory=deque
    )
    _watches: Watches = field(init=False)
    _next_rescan: float = 0.0
    _next_poll: dict[Folder, float] = field(default_factory=dict)
    _model_file: ModelFile = field(init=False)
    _next_look: float = 0.0
    _next_beat: float = 0.0
    _retention: Retention = field(init=False)
    _stopping: bool = False
    _stop_asked: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._settling = SettleTracker(self.config.settle_seconds)
        self._retention = Retention(self.config.keep_no_match_days)
        self.health = Health(stuck_after=3 * self.config.decode_seconds + _STUCK_S)
        self._model_file = ModelFile(
            self.config.model, self.config.provider, self.inbox.put
        )

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler and from any thread."""
        self._stop_asked.set()
        self.inbox.put(Stop())

    def reload(self) -> None:
        """Ask the loop to load the model file anew; as safe as `stop`."""
        self.inbox.put(Reload())

    def run(self) -> None:
        """Watch, classify and record until stopped."""
        self._recorded(lambda: self.log.use_model(self.model))
        self._recorded(lambda: self.log.watch([f.path for f in self.config.folders]))
        self.health.serving(self.model)
        if self.config.metrics:
            self.health.serve(self.config.metrics)
        for path in self._recorded(self.log.left_in_hand):
            logger.info("was in hand when the service last ended: path=%r", path)
        decoding = self.config.readers, self.config.decode_seconds
        with (
            Decoders(*decoding, self.inbox.put) as decoders,
            Watches(self.config.folders, self.inbox.put) as self._watches,
        ):
            # The scan comes after the watches: what arrives between is seen twice
            # rather than never.
            self._look_at_folders(time.monotonic())
            self._scan_all()
            notify("READY=1")
            logger.info("ready, watching %d folders", len(self.config.folders))
            while not (self._stopping and not self._reading and not self._batch):
                with self.health.timed("choose"):
                    more = not self._stopping and self._choose(decoders)
                self._receive(0.0 if more else self._patience())
                if self._batch_is_due():
                    self._finish_batch()
                self.health.feed_watchdog(busy=bool(self._reading or self._batch))
            notify("STOPPING=1")
            with suppress(sqlite3.OperationalError):  # every row is recorded already
                self.log.beat({**self._figures(), "stopped": 1})

    # What to read next

    def _choose(self, decoders: Decoders) -> bool:
        """Hand files to the decoders; returns whether there is more to look at now."""
        self._look_around(time.monotonic())
        room = _READ_AHEAD * self.config.batch_size - self._reading - len(self._batch)
        steps = _SCAN_STEP
        chosen: list[str] = []
        more = False
        while len(chosen) < room:
            if self._ready:
                chosen.append(self._ready.popleft())
            elif self._scans and steps:
                steps -= 1
                found = next(self._scans[0][1], None)
                if found:
                    self._consider(*found, complete=False)
                else:
                    self._scans.popleft()
            else:
                more = bool(self._scans)
                break
        if chosen:
            self._read(chosen, decoders)
        return more

    def _read(self, chosen: list[str], decoders: Decoders) -> None:
        with self.health.timed("commit"):
            self._recorded(lambda: self.log.take_in_hand(chosen))
        self._reading += len(chosen)
        alone = [path for path in chosen if self._in_hand[path].alone]
        others = [path for path in chosen if not self._in_hand[path].alone]
        for group in (*([path] for path in alone), others):
            decoders.read(group, self.model.info.input_size, self.config.max_pixels)

    def _look_around(self, now: float) -> None:
        """Do what is due by the clock."""
        for path, stamp in self._settling.due(now):
            self._end_wait(path, stamp, now)
        if now >= self._next_rescan:
            self._scan_all()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._model_file.look()
            self._look_at_folders(now)
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_S
            self._beat()
        for folder, due in self._next_poll.items():
            if now >= due:
                self._next_poll[folder] = now + folder.poll_seconds
                self._scan(folder)
        if now >= self._retention.next_due and self._idle():
            online = [f for f in self.config.folders if self._watches.online(f)]
            self._recorded(lambda: self._retention.step(self.log, online, now))

    def _idle(self) -> bool:
        """Whether there is nothing to classify just now."""
        return not (self._ready or self._scans or self._reading or self._batch)

    def _beat(self) -> None:
        figures = self._figures()
        self._recorded(lambda: self.log.beat(figures))

    def _figures(self) -> dict[str, float | int]:
        times = [file.seen_at for file in self._in_hand.values()]
        if (settling := self._settling.oldest()) is not None:
            times.append(settling)
        oldest = max(0.0, time.time() - min(times)) if times else 0.0
        return self.health.waiting(len(self._in_hand) + len(self._settling), oldest)

    def _consider(self, path: str, stamp: FileStamp, complete: bool) -> None:
        if path in self._in_hand or self.log.knows(path, stamp):
            return
        age = time.time() - stamp.mtime_ns / 1e9
        still = age >= self.config.settle_seconds
        if complete or still:
            self._take(path, settled=still)
        else:
            self._settling.wait(path, stamp, time.monotonic(), time.time())

    def _take(self, path: str, settled: bool) -> None:
        seen_at = self._settling.release(path) or time.time()
        self._in_hand[path] = _InHand(seen_at, settled)
        self._ready.append(path)

    def _end_wait(self, path: str, expected: FileStamp, now: float) -> None:
        stamp = stamp_of(path)
        if stamp is None:
            self._settling.release(path)
            self._recorded(lambda: self.log.put_down(path))
        elif stamp == expected:
            self._take(path, settled=True)
        else:
            self._settling.wait(path, stamp, now, time.time())

    def _scan_all(self) -> None:
        self._next_rescan = time.monotonic() + self.config.rescan_seconds
        self.health.rescanned()
        for folder in self.config.folders:
            self._scan(folder)

    def _scan(self, folder: Folder) -> None:
        """Compare a folder with the log, unless that is under way or it is offline."""
        under_way = any(covered == folder for covered, _ in self._scans)
        if self._watches.online(folder) and not under_way:
            self._scans.append((folder, folder.scan()))

    def _look_at_folders(self, now: float) -> None:
        """Scan folders that came back, and see which must be polled."""
        for folder in self._watches.look():
            self._scan(folder)
        for folder in self.config.folders:
            if self._watches.polled(folder):
                self._next_poll.setdefault(folder, now + folder.poll_seconds)

    # What came in

    def _receive(self, timeout: float) -> None:
        try:
            with self.health.timed("wait"):
                message = self.inbox.get(timeout > 0, timeout or None)
            while True:
                self._handle(message)
                if self._batch_is_full():
                    return
                message = self.inbox.get(False)
        except queue.Empty:
            return

    def _handle(self, message: Message) -> None:
        match message:
            case list():
                self._reading -= len(message)
                self.health.moved()
                for reading in message:
                    self.health.spent("decode", reading.seconds)
                    self._sort(reading)
            case FileHint(path, complete):
                self._follow(path, complete)
            case FolderHint(path):
                self._scan_below(path)
            case HintsLost():
                self.health.overflowed()
                logger.warning("the kernel dropped file events; scanning every folder")
                self._scans.clear()
                self._scan_all()
            case Reload():
                self._model_file.load()
                self._scans.clear()
                self._scan_all()
            case NewModel(model):
                self._model_file.loaded()
                if model:
                    self._swap(model)
            case Stop():
                self._stopping = True

    def _scan_below(self, path: str) -> None:
        for folder in self.config.folders:
            if folder.recursive and path.startswith(f"{folder.path}/"):
                self._scans.append((None, folder.scan(path)))

    def _follow(self, path: str, complete: bool) -> None:
        if path in self._in_hand:
            self._in_hand[path].hinted_again = True
        elif any(folder.wants(path) for folder in self.config.folders):
            stamp = stamp_of(path)
            if stamp:
                self._consider(path, stamp, complete)

    def _sort(self, reading: Reading) -> None:
        """Score it, wait for it to be completed, or let it go."""
        path, stamp = reading.path, reading.stamp
        if stamp is None:  # gone before it was read
            self._recorded(lambda: self.log.put_down(path))
            self._let_go(path)
        elif reading.suspect:
            self._in_hand[path].alone = True
            self._ready.append(path)
        elif reading.transient and self._may_try_again(path):
            logger.warning("path=%r: %s; trying once more", text_of(path), reading.error)
            self._wait_again(path, stamp, _STRIKE_WAIT_S)
        elif reading.changed or (
            reading.error and not reading.transient and not self._in_hand[path].settled
        ):
            self._wait_again(path, stamp)
        elif reading.image and len(reading.image.pixels) != self.model.info.input_size:
            self._ready.append(path)  # was read for the model before this one
        elif reading.sha256 and self._recorded(
            lambda: self.log.recognise(path, reading.sha256, stamp)
        ):
            self._let_go(path)
        else:
            if not self._batch:
                self._batch_since = time.monotonic()
            self._batch.append(reading)

    def _may_try_again(self, path: str) -> bool:
        """Count an attempt that failed on its own; whether another is due."""
        return self._recorded(lambda: self.log.strike(path)) < _STRIKES

    def _wait_again(self, path: str, stamp: FileStamp, longer: float = 0.0) -> None:
        seen_at = self._in_hand.pop(path).seen_at
        self._settling.wait(path, stamp, time.monotonic(), seen_at, longer)

    def _let_go(self, path: str) -> None:
        if self._in_hand.pop(path).hinted_again:
            self._follow(path, complete=True)

    def _swap(self, model: Model) -> None:
        if model.sha256 == self.model.sha256:
            return
        if self._batch:
            self._finish_batch()
        self.model = model
        self._recorded(lambda: self.log.use_model(model))
        self.health.serving(model)
        logger.info("now serving model %s, sha256 %s", model.path, model.sha256[:12])

    # What becomes of it

    def _batch_is_full(self) -> bool:
        return len(self._batch) >= self.config.batch_size

    def _batch_is_due(self) -> bool:
        """Full, or nothing else is coming, or the oldest has waited long enough."""
        if not self._batch:
            return False
        waited = time.monotonic() - self._batch_since
        return self._batch_is_full() or not self._reading or waited >= _BATCH_WAIT_S

    def _finish_batch(self) -> None:
        readings, self._batch = self._batch, []
        with self.health.timed("inference"):
            verdicts = iter(self.model.judge([r.image for r in readings if r.image]))
        now = time.time()
        outcomes = [
            self._outcome(reading, next(verdicts) if reading.image else None, now)
            for reading in readings
        ]
        with self.health.timed("commit"):
            self._recorded(lambda: self.log.record(outcomes, self.model, self.config.hooks))
        self.health.recorded(outcomes)
        for outcome in outcomes:
            _report(outcome)
            if outcome.status == "failed" and self.config.failed_folder:
                self._move_failed(outcome, self.config.failed_folder)
            self._let_go(outcome.path)

    def _move_failed(self, outcome: Outcome, folder: Path) -> None:
        path = text_of(outcome.path)
        try:
            moved = set_aside(outcome.path, outcome.stamp, folder)
        except OSError as error:
            problem = error.strerror or error
            logger.warning("path=%r cannot be moved to %s: %s", path, folder, problem)
            return
        if moved:
            self._recorded(lambda: self.log.mark_moved(outcome.path, outcome.sha256))
            logger.info("moved path=%r to %s", path, text_of(str(moved)))

    def _recorded(self, write: Callable[[], T]) -> T:
        """What `write` returns, once the database takes it.

        A locked database or a full disk passes: nothing is read meanwhile, so that
        nothing is lost, and what waits in the folders is found later. Raises
        sqlite3.OperationalError where the service is asked to stop meanwhile.
        """
        waiting_since = None
        while True:
            try:
                result = write()
            except sqlite3.OperationalError as error:
                if self._stop_asked.is_set():
                    raise
                if waiting_since is None:
                    waiting_since = time.monotonic()
                    logger.warning(
                        "database %s: %s; waiting until it can be written",
                        self.log.path, error,
                    )  # fmt: skip
                self.health.feed_watchdog(busy=False)  # a restart would not help
                self._stop_asked.wait(_DATABASE_RETRY_S)
                continue
            if waiting_since is not None:
                waited = time.monotonic() - waiting_since
                logger.info("database %s: goes on after %.0f s", self.log.path, waited)
            return result

    def _outcome(self, reading: Reading, verdict: Verdict | None, now: float) -> Outcome:
        assert reading.stamp
        image = reading.image
        return Outcome(
            path=reading.path,
            sha256=reading.sha256,
            stamp=reading.stamp,
            status=verdict.status if verdict else "failed",
            seen_at=self._in_hand[reading.path].seen_at,
            classified_at=now,
            width=image.width if image else None,
            height=image.height if image else None,
            format=image.format if image else None,
            score=verdict.score if verdict else None,
            threshold=self.model.info.threshold if image else None,
            error=verdict.reason if verdict else reading.error,
        )

    def _patience(self) -> float:
        """Seconds the loop may sleep if no message comes."""
        now = time.monotonic()
        if self._stopping:
            return _LONGEST_WAIT_S if not self._batch else _BATCH_WAIT_S
        moments = [self._next_rescan, self._next_look, self._next_beat]
        if (due := self._settling.next_due()) is not None:
            moments.append(due)
        moments += self._next_poll.values()
        if self._idle():
            moments.append(self._retention.next_due)
        if self._batch:
            moments.append(self._batch_since + _BATCH_WAIT_S)
        wait = min(moments) - now
        return min(_LONGEST_WAIT_S, max(0.001, wait))


def _report(outcome: Outcome) -> None:
    path = text_of(outcome.path)
    if outcome.status == "failed":
        logger.warning("failed path=%r reason=%r", path, outcome.error)
    else:
        level = logging.INFO if outcome.status == "match" else logging.DEBUG
        logger.log(level, "%s path=%r score=%.6f", outcome.status, path, outcome.score)
