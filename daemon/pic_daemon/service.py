"""The loop: hint or scan -> settled? -> read -> batch -> score -> one transaction.

With a descriptor and an index, what the score lets through goes through `cascade` first.

One thread owns all state and the database, and never looks at a drop folder itself.
Decoders and scanners only put messages into its inbox, so that nothing here needs a
lock. A crash anywhere is answered by the scan at the next start: what has no row yet
is done then. So is an offline folder: what lies in it is let go, and found again by
the scan at its return.
"""

import logging
import queue
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pic_daemon.cascade import Cascade, Passed
from pic_daemon.config import Config
from pic_daemon.decoding import Decoders
from pic_daemon.folders import FileStamp, text_of
from pic_daemon.health import Figures, Health
from pic_daemon.identification import CloserReading, Confirmation
from pic_daemon.match_log import UNREAD, MatchLog, Outcome
from pic_daemon.model import Model, Verdict, load_model
from pic_daemon.reading import Reading
from pic_daemon.recording import Recorder
from pic_daemon.retention import Retention
from pic_daemon.scanning import Found, Scanner, SeenAgain, Sight, scanning
from pic_daemon.schema import Status
from pic_daemon.served_files import Loaded, ServedFiles
from pic_daemon.settle import SettleTracker
from pic_daemon.systemd import notify
from pic_daemon.watch import FileHint, HintsLost

logger = logging.getLogger("pic_daemon")

_BATCH_WAIT_S = 0.02  # the longest a decoded image waits for others to fill a batch
_LONGEST_WAIT_S = 60.0
_SCAN_STEP = 1000  # files compared between two looks into the inbox
_STRIKES = 2  # attempts at a file that ends its worker
_UNREAD_STRIKES = 3  # attempts at one that cannot be read
_STRIKE_WAIT_S = 5.0  # before the second attempt, twice as long before the next
_LOOK_S = 5.0  # between two looks at the model file and at how the folders are
_BEAT_S = 30.0  # between two heartbeats in the database
_STUCK_S = 60.0  # beyond the time that decoding may take
_READ_AHEAD = 2  # batches being read or waiting to be scored


@dataclass(frozen=True)
class Stop:
    """Finish what is in hand, then leave the loop."""


@dataclass(frozen=True)
class Reload:
    """Load the model file anew and compare folders and log."""


_Read = Reading | CloserReading | Confirmation

Message = Sight | list[_Read] | Stop | Reload | Loaded


@dataclass
class _InHand:
    """A file between being chosen and being recorded."""

    seen_at: float
    stamp: FileStamp  # when it was chosen
    settled: bool
    hinted_again: FileStamp | None = None
    alone: bool = False  # to be read in a group of its own


@dataclass
class Service:
    """The running service: `run` returns after a Stop message.

    With `until_done` it also returns once every file of its folders has been dealt
    with. `passed` is called with the number of files that were, as they are.
    """

    config: Config
    model: Model
    log: MatchLog
    cascade: Cascade | None = None
    until_done: bool = False
    passed: Callable[[int], None] = lambda _: None
    health: Health = field(init=False)
    inbox: "queue.SimpleQueue[Message]" = field(default_factory=queue.SimpleQueue)
    _settling: SettleTracker = field(init=False)
    _ready: deque[str] = field(default_factory=deque)
    _in_hand: dict[str, _InHand] = field(default_factory=dict)
    _reading: int = 0
    _batch: list[Reading] = field(default_factory=list)
    _batch_since: float = 0.0
    _found: deque[Found] = field(default_factory=deque)
    _scanners: list[Scanner] = field(default_factory=list)  # deepest folder first
    _next_rescan: float = 0.0
    _offline: list[str] = field(default_factory=list)
    _files: list[ServedFiles[Any]] = field(init=False)
    _next_look: float = 0.0
    _next_beat: float = 0.0
    _retention: Retention = field(init=False)
    _recorder: Recorder = field(init=False)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._settling = SettleTracker(self.config.settle_seconds)
        self._retention = Retention(self.config.keep_no_match_days)
        self.health = Health(stuck_after=3 * self.config.decode_seconds + _STUCK_S)
        self._recorder = Recorder(self.log, self.config, self.health)
        config, send = self.config, self.inbox.put
        load = partial(load_model, config.model, config.provider)
        self._files = [ServedFiles("model", [config.model], load, self._swap, send)]
        if self.cascade:
            self._files.append(self.cascade.files(send))

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler and from any thread."""
        self._recorder.stop_asked.set()
        self.inbox.put(Stop())

    @property
    def stop_asked(self) -> bool:
        """Whether `stop` was called."""
        return self._recorder.stop_asked.is_set()

    def reload(self) -> None:
        """Ask the loop to load the model file anew; as safe as `stop`."""
        self.inbox.put(Reload())

    def run(self) -> None:
        """Watch, classify and record until stopped."""
        self._recorder.write(lambda: self.log.use_model(self.model))
        self._recorder.write(lambda: self.log.watch([f.path for f in self.config.folders]))
        self.health.serving(self.model)
        if self.config.metrics:
            self.health.serve(self.config.metrics)
        for path in self._recorder.write(self.log.left_in_hand):
            logger.info("was in hand when the service last ended: path=%r", path)
        decoding = self.config.readers, self.config.decode_seconds
        with (
            Decoders(*decoding, self.inbox.put) as decoders,
            scanning(self.config.folders, self.inbox.put) as scanners,
        ):
            # The first scan comes after the watches: what arrives between is seen twice
            # rather than never.
            self._scanners = sorted(scanners, key=lambda s: -len(str(s.folder.path)))
            for path in self.log.struck():
                self._see_again(path, None)
            if self.cascade:
                self.cascade.start(partial(self._run, decoders))
            notify("READY=1")
            logger.info("ready, watching %d folders", len(self.config.folders))
            while self._busy() or not self._stopping:
                with self.health.timed("choose"):
                    more = not self._stopping and self._choose(decoders)
                if self.until_done and not more and self._all_done():
                    break
                self._receive(0.0 if more else self._patience())
                if self._batch_is_due():
                    self._finish_batch()
                if self.cascade:
                    self._go_on(self.cascade)
                self.health.feed_watchdog(self._busy())
            notify("STOPPING=1")
            with suppress(sqlite3.OperationalError):  # every row is recorded already
                self.log.beat({**self._figures(), "stopped": 1})

    def _busy(self) -> bool:
        """Whether files are with the worker processes, or wait for what comes after."""
        waiting = self.cascade.waiting if self.cascade else 0
        return bool(self._reading or self._batch or waiting)

    def _all_done(self) -> bool:
        """Whether every file of the folders has been dealt with."""
        scanned = not any(scanner.busy for scanner in self._scanners)  # before the inbox
        waiting = self._in_hand or len(self._settling) or not self.inbox.empty()
        return scanned and not waiting

    # What to read next

    def _choose(self, decoders: Decoders) -> bool:
        """Hand files to the decoders; returns whether there is more to look at now."""
        self._look_around(time.monotonic())
        room = _READ_AHEAD * self.config.batch_size - self._reading - len(self._batch)
        room -= self.cascade.waiting if self.cascade else 0
        steps = _SCAN_STEP
        chosen: list[str] = []
        more = False
        while len(chosen) < room:
            if self._ready:
                path = self._ready.popleft()
                if self._online(path):
                    chosen.append(path)
                else:
                    del self._in_hand[path]
            elif self._found and steps:
                steps -= 1
                self._compare(self._found[0])
            else:
                more = bool(self._found)
                break
        if chosen:
            self._read(chosen, decoders)
        return more

    def _compare(self, found: Found) -> None:
        """Compare the next file that a scan met with the log."""
        if found.files and found.scanner.online:
            self._consider(*found.files.popleft(), complete=False)
        else:
            self._found.popleft()
            found.scanner.go_on()

    def _read(self, chosen: list[str], decoders: Decoders) -> None:
        with self.health.timed("commit"):
            self._recorder.write(lambda: self.log.take_in_hand(chosen))
        self._reading += len(chosen)
        alone = [path for path in chosen if self._in_hand[path].alone]
        others = [path for path in chosen if not self._in_hand[path].alone]
        for group in (*([path] for path in alone), others):
            decoders.read(group, self.model.info.input_size, self.config.max_pixels)

    def _run(self, decoders: Decoders, *task: Any) -> None:
        self._reading += 1
        decoders.run(*task)

    def _look_around(self, now: float) -> None:
        """Do what is due by the clock."""
        for path, stamp in self._settling.due(now):
            self._see_again(path, stamp)
        if now >= self._next_rescan:
            self._scan_all()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            for files in self._files:
                files.look()
            self._look_at_folders()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_S
            self._beat()
        if now >= self._retention.next_due and self._idle():
            online = [scanner.folder for scanner in self._scanners if scanner.online]
            self._recorder.write(lambda: self._retention.step(self.log, online, now))

    def _idle(self) -> bool:
        """Whether there is nothing to classify just now."""
        return not (self._in_hand or self._found)

    def _beat(self) -> None:
        figures = self._figures()
        self._recorder.write(lambda: self.log.beat(figures))

    def _figures(self) -> Figures:
        times = [file.seen_at for file in self._in_hand.values()]
        if (settling := self._settling.oldest()) is not None:
            times.append(settling)
        oldest = max(0.0, time.time() - min(times)) if times else 0.0
        backlog = len(self._in_hand) + len(self._settling)
        waiting = self.health.waiting(backlog, oldest, self._offline)
        if not self.cascade:
            return {**waiting}
        index = self.cascade.identifier.index.sha256
        return {**waiting, "catalog_index": index, "gate_threshold": self._threshold()}

    def _consider(self, path: str, stamp: FileStamp, complete: bool) -> None:
        if path in self._in_hand:
            return
        if self.log.knows(path, stamp):
            self.passed(1)
            return
        age = time.time() - stamp.mtime_ns / 1e9
        still = age >= self.config.settle_seconds
        if complete or still:
            self._take(path, stamp, settled=still)
        else:
            self._settling.wait(path, stamp, time.monotonic(), time.time())

    def _take(self, path: str, stamp: FileStamp, settled: bool) -> None:
        seen_at = self._settling.release(path) or time.time()
        self._in_hand[path] = _InHand(seen_at, stamp, settled)
        self._ready.append(path)

    def _see_again(self, path: str, expected: FileStamp | None) -> None:
        """Have a file that waits, or has a strike, looked at; `_seen` is told."""
        if scanner := self._scanner_of(path):
            scanner.see_again(path, expected)

    def _seen(self, path: str, expected: FileStamp | None, stamp: FileStamp | None) -> None:
        if path in self._in_hand:
            return  # a hint was faster
        if stamp is None:
            self._settling.release(path)
            if self._online(path):
                self._recorder.write(lambda: self.log.put_down(path))
        elif expected and self._settling.awaits(path, expected):
            if stamp == expected:
                self._take(path, stamp, settled=True)
            else:
                self._settling.wait(path, stamp, time.monotonic(), time.time())

    def _scan_all(self, again: bool = False) -> None:
        """Compare folders and log; for those being scanned not, or once more after it."""
        self._next_rescan = time.monotonic() + self.config.rescan_seconds
        self.health.rescanned()
        for scanner in self._scanners:
            scanner.scan(again)

    def _scanner_of(self, path: str) -> Scanner | None:
        return next((s for s in self._scanners if path.startswith(s.within)), None)

    def _online(self, path: str) -> bool:
        scanner = self._scanner_of(path)
        return scanner is not None and scanner.online

    def _look_at_folders(self) -> None:
        for scanner in self._scanners:
            scanner.judge()
        offline = [text_of(str(s.folder.path)) for s in self._scanners if not s.online]
        if offline != self._offline:
            self._offline = offline
            self._next_beat = 0.0

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
                for read in message:
                    self._take_in(read)
            case Loaded():
                message.hand_over()
            case Reload():
                for served in self._files:
                    served.load()
                self._scan_all(again=True)
            case Stop():
                self._stopping = True
            case _:
                self._heed(message)

    def _heed(self, sight: Sight) -> None:
        match sight:
            case Found(files=files):
                if files:
                    self._found.append(sight)
            case SeenAgain(seen):
                for path, expected, stamp in seen:
                    self._seen(path, expected, stamp)
            case FileHint(path, stamp, complete):
                self._follow(path, stamp, complete)
            case HintsLost():
                self.health.overflowed()
                logger.warning("the kernel dropped file events; scanning every folder")
                self._scan_all(again=True)
            case Exception():
                raise sight

    def _take_in(self, read: _Read) -> None:
        if isinstance(read, Reading):
            self.health.spent("decode", read.seconds)
            if self.cascade:
                self.cascade.forget(read.path)
            self._sort(read)
        elif self.cascade:
            self.cascade.handle(read)

    def _follow(self, path: str, stamp: FileStamp, complete: bool) -> None:
        if path in self._in_hand:
            self._in_hand[path].hinted_again = stamp
        else:
            self._consider(path, stamp, complete)

    def _sort(self, reading: Reading) -> None:
        """Score it, wait for it to be completed, or let it go."""
        path = reading.path
        unfinished = reading.changed or reading.suspect or reading.transient
        stamp = reading.stamp or (self._in_hand[path].stamp if unfinished else None)
        if stamp is None or (reading.transient and not self._online(path)):
            # Gone before it was read, or with its folder, where it is found again.
            self._recorder.write(lambda: self.log.put_down(path))
            self._let_go(path)
        elif reading.suspect:
            self._in_hand[path].alone = True
            self._ready.append(path)
        elif reading.transient and (wait := self._next_attempt(reading)):
            problem = "path=%r: %s; trying again in %g s"
            logger.warning(problem, text_of(path), reading.error, wait)
            self._wait_again(path, stamp, wait)
        elif reading.changed or (
            reading.error and not reading.transient and not self._in_hand[path].settled
        ):
            self._wait_again(path, stamp)
        elif reading.image and len(reading.image.pixels) != self.model.info.input_size:
            self._ready.append(path)  # was read for the model before this one
        elif reading.sha256 and self._recorder.write(
            lambda: self.log.recognise(path, reading.sha256, stamp)
        ):
            self._let_go(path)
        else:
            if not self._batch:
                self._batch_since = time.monotonic()
            self._batch.append(reading)

    def _next_attempt(self, reading: Reading) -> float | None:
        """Count an attempt that failed on its own; seconds to the next, None: no more."""
        strikes = self._recorder.write(lambda: self.log.strike(reading.path))
        unread = reading.error and reading.error.startswith(UNREAD)
        most = _UNREAD_STRIKES if unread else _STRIKES
        return _STRIKE_WAIT_S * 2 ** (strikes - 1) if strikes < most else None

    def _wait_again(self, path: str, stamp: FileStamp, longer: float = 0.0) -> None:
        seen_at = self._in_hand.pop(path).seen_at
        self._settling.wait(path, stamp, time.monotonic(), seen_at, longer)

    def _let_go(self, path: str) -> None:
        self.passed(1)
        if stamp := self._in_hand.pop(path).hinted_again:
            self._consider(path, stamp, complete=True)

    def _swap(self, model: Model) -> None:
        if model.sha256 == self.model.sha256:
            return
        if self._batch:
            self._finish_batch()
        self.model = model
        self._recorder.write(lambda: self.log.use_model(model))
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
        outcomes = []
        for reading in readings:
            verdict = next(verdicts) if reading.image else None
            outcome = self._outcome(reading, verdict, now)
            score = verdict.score if verdict and not verdict.reason else -1.0
            if self.cascade and score >= self._threshold():
                self.cascade.take(Passed(outcome, self.model))
            else:
                outcomes.append(outcome)
        if outcomes:
            self._record(outcomes, self.model)

    def _threshold(self) -> float:
        """What the model's score must reach, to match or to be looked at again."""
        gate = self.cascade.gate(self.model) if self.cascade else None
        return self.model.info.threshold if gate is None else gate

    def _go_on(self, cascade: Cascade) -> None:
        """Describe what waits, if it is due, and record what is decided."""
        due = cascade.due()
        if due is not None and due <= time.monotonic():
            with self.health.timed("describe"):
                cascade.describe()
        decided = cascade.take_decided()
        for model in {id(one.model): one.model for one in decided}.values():
            self._record([one.outcome for one in decided if one.model is model], model)

    def _record(self, outcomes: list[Outcome], model: Model) -> None:
        self._recorder.record(outcomes, model)
        for outcome in outcomes:
            self._let_go(outcome.path)

    def _outcome(self, reading: Reading, verdict: Verdict | None, now: float) -> Outcome:
        image, in_hand = reading.image, self._in_hand[reading.path]
        status: Status = verdict.status if verdict else "failed"
        return Outcome(
            path=reading.path,
            sha256=reading.sha256,
            stamp=reading.stamp or in_hand.stamp,
            status="no-match" if verdict and self.cascade else status,
            seen_at=in_hand.seen_at,
            classified_at=now,
            width=image.width if image else None,
            height=image.height if image else None,
            format=image.format if image else None,
            score=verdict.score if verdict else None,
            threshold=self._threshold() if image else None,
            error=verdict.reason if verdict else reading.error,
        )

    def _patience(self) -> float:
        """Seconds the loop may sleep if no message comes."""
        now = time.monotonic()
        if self._stopping:
            waits = self._batch or (self.cascade and self.cascade.waiting)
            return _BATCH_WAIT_S if waits else _LONGEST_WAIT_S
        moments = [self._next_rescan, self._next_look, self._next_beat]
        if (due := self._settling.next_due()) is not None:
            moments.append(due)
        if self._idle():
            moments.append(self._retention.next_due)
        if self._batch:
            moments.append(self._batch_since + _BATCH_WAIT_S)
        if self.cascade and (due := self.cascade.due()) is not None:
            moments.append(due)
        wait = min(moments) - now
        return min(_LONGEST_WAIT_S, max(0.001, wait))
