"""The loop: hint or scan -> settled? -> read -> batch -> score -> one transaction.

With a descriptor and an index, what the score lets through goes through `cascade` first.

One thread owns all state and the database, and never looks at a drop folder itself.
Decoders and scanners only put messages into its inbox, so that nothing here needs a
lock. A crash anywhere is answered by the scan at the next start: what has no row yet
is done then.
"""

import logging
import queue
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pic_daemon.backlog import Backlog
from pic_daemon.cascade import Cascade, Passed
from pic_daemon.config import Config
from pic_daemon.decoding import Decoders
from pic_daemon.folders import text_of
from pic_daemon.health import Figures, Health
from pic_daemon.identification import CloserReading, Confirmation
from pic_daemon.match_log import UNREAD, MatchLog, Outcome
from pic_daemon.model import Model, Verdict, load_model
from pic_daemon.reading import Reading
from pic_daemon.recording import Recorder
from pic_daemon.retention import Retention
from pic_daemon.scanning import Sight, scanning
from pic_daemon.schema import Status
from pic_daemon.scoring import Scored, Scorer
from pic_daemon.served_files import Loaded, ServedFiles, State
from pic_daemon.setting_aside import Mover, SetAside
from pic_daemon.systemd import notify
from pic_daemon.watch import FileHint, HintsLost

logger = logging.getLogger("pic_daemon")

_BATCH_WAIT_S = 0.02  # the longest a decoded image waits for others to fill a batch
_BACKLOG_WAIT_S = 0.25  # the same while more files wait than are read: nobody is kept
_LONGEST_WAIT_S = 60.0
_MOST_MESSAGES = 100_000  # in the inbox: some 40 MB of hints
_MESSAGES = 1000  # heeded before the loop looks at its other duties
_STRIKES = 2  # attempts at a file that ends its worker
_UNREAD_STRIKES = 3  # attempts at one that cannot be read
_STRIKE_WAIT_S = 5.0  # before the second attempt, twice as long before the next
_LOOK_S = 5.0  # between two looks at the model file and at how the folders are
_BEAT_S = 30.0  # between two heartbeats in the database
_NEVER_STILL = "was written to whenever it was read"
_STUCK_S = 60.0  # beyond the time that decoding may take
_READ_AHEAD = 2  # batches being read or waiting to be scored
_SCORED_AHEAD = 2  # batches being scored or waiting in the scorer


@dataclass(frozen=True)
class Stop:
    """Finish what is in hand, then leave the loop."""


@dataclass(frozen=True)
class Reload:
    """Load model, descriptor and index anew, and compare folders and log."""


_Read = Reading | CloserReading | Confirmation

Message = Sight | list[_Read] | Scored | Stop | Reload | Loaded | SetAside


@dataclass
class Service:
    """The running service: `run` returns after a Stop message.

    With `until_done` it also returns once every file of its folders has been dealt
    with, or a folder is offline: nobody waits with a single pass for a disk to come
    back. `passed` is called with the number of files that were, as they are. `before`:
    how the files that are served looked before they were loaded.
    """

    config: Config
    model: Model
    log: MatchLog
    cascade: Cascade | None = None
    until_done: bool = False
    passed: Callable[[int], None] = lambda _: None
    before: Mapping[Path, State | None] = field(default_factory=dict)
    health: Health = field(init=False)
    inbox: "queue.SimpleQueue[Message]" = field(default_factory=queue.SimpleQueue)
    _mover: Mover = field(init=False)
    _backlog: Backlog = field(init=False)
    _reading: int = 0
    _batch: list[Reading] = field(default_factory=list)
    _batch_since: float = 0.0
    _scoring: int = 0
    _next_rescan: float = 0.0
    offline: list[str] = field(default_factory=list)
    _mount_points: dict[Path, str] = field(default_factory=dict)
    _files: list[ServedFiles[Any]] = field(init=False)
    _next_look: float = 0.0
    _next_beat: float = 0.0
    _retention: Retention = field(init=False)
    _recorder: Recorder = field(init=False)
    _missed: bool = False  # hints that found no room
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._retention = Retention(self.config.keep_no_match_days)
        self.health = Health(stuck_after=3 * self.config.decode_seconds + _STUCK_S)
        self._recorder = Recorder(self.log, self.config, self.health)
        config, send = self.config, self.inbox.put
        self._mover = Mover(config.failed_folder, send)
        self._backlog = Backlog(
            self._recorder, config.settle_seconds, self.passed, self._mover.meet
        )
        load = partial(load_model, config.model, config.provider)
        model = ServedFiles("model", [config.model], load, self._swap, send, self.before)
        self._files = [model]
        if self.cascade:
            self._files.append(self.cascade.files(send, self.before))

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler and from any thread."""
        self._recorder.stop_asked = True
        self.inbox.put(Stop())

    @property
    def stop_asked(self) -> bool:
        """Whether `stop` was called."""
        return self._recorder.stop_asked

    @property
    def gone(self) -> int:
        """How many files were gone when they were to be read."""
        return self._backlog.gone

    def reload(self) -> None:
        """Ask the loop to load model, descriptor and index anew and to compare folders and
        log, which heeds what retry and reclassify have marked; as safe as `stop`."""
        self.inbox.put(Reload())

    def run(self) -> None:
        """Watch, classify and record until stopped."""
        self._take_over()
        decoding = self.config.readers, self.config.decode_seconds
        with (
            Decoders(*decoding, self.inbox.put) as decoders,
            Scorer(self.inbox.put) as scorer,
            scanning(
                self.config.folders,
                self._hear,
                # Where a single pass found it is where it is.
                {} if self.until_done else self._recorder.write(self.log.mount_points),
                lambda: self.stop_asked,
            ) as scanners,
        ):
            # The first scan comes after the watches: what arrives between is seen twice
            # rather than never.
            self._backlog.watch(scanners, besides=self.until_done)
            self._note_folders()
            if self.cascade:
                self.cascade.start(partial(self._run, decoders))
            notify("READY=1")
            logger.info("ready, watching %d folders", len(self.config.folders))
            while self._busy() or not self._stopping:
                with self.health.timed("choose"):
                    more = not self._stopping and self._choose(decoders)
                if self._stopping:
                    decoders.look()  # what never comes back is not waited for
                # In this order: what the backlog says is past may lie in the inbox.
                if self.until_done and self._backlog.done() and self.inbox.empty():
                    break
                self._receive(0.0 if more else self._patience())
                if self._batch_is_due():
                    self._begin_scoring(scorer)
                if self.cascade:
                    self._go_on(self.cascade)
                self.health.feed_watchdog(self._busy())
            notify("STOPPING=1")
            self._mover.end()
            with suppress(sqlite3.OperationalError):  # every row is recorded already
                self._note_moves()
                self.log.put_all_down()
                self.log.beat({**self._figures(), "stopped": 1})

    def _hear(self, sight: Sight) -> None:
        """Called from the scanners' threads. Of hints that are not heeded, as while the
        database takes nothing, those beyond some number are made good by a scan."""
        if isinstance(sight, FileHint) and self.inbox.qsize() >= _MOST_MESSAGES:
            self._missed = True
        else:
            self.inbox.put(sight)

    def _take_over(self) -> None:
        """Tell the log who serves, and what the service before left undone."""
        self._recorder.write(lambda: self.log.use_model(self.model))
        silent = self._recorder.write(self.log.silent_for)
        self._retention.begin(silent, time.monotonic())
        if not self.until_done:  # a single pass is not the service whose log it may be
            lost = self._recorder.write(lambda: self.log.deliver_only_to(self.config.hooks))
            if lost:
                message = "gave up %d deliveries of a hook that is not set any more"
                logger.warning(message, lost)
        self.health.serving(self.model)
        if self.config.metrics:
            self.health.serve(self.config.metrics)
        for path in self._recorder.write(self.log.left_in_hand):
            logger.info("was in hand when the service last ended: path=%r", path)

    def _note_moves(self) -> None:
        """Note what was still moved at the end."""
        while not self.inbox.empty():
            if isinstance(message := self.inbox.get(), SetAside):
                self._handle(message)

    def _busy(self) -> bool:
        """Whether files are with the worker processes, or wait for what comes after."""
        waiting = self.cascade.waiting if self.cascade else 0
        return bool(self._reading or self._batch or self._scoring or waiting)

    # What to read next

    def _choose(self, decoders: Decoders) -> bool:
        """Hand files to the decoders; returns whether there is more to look at now."""
        self._look_around(time.monotonic(), decoders)
        room = _READ_AHEAD * self.config.batch_size - self._reading - len(self._batch)
        room -= self.cascade.waiting if self.cascade else 0
        chosen, more = self._backlog.choose(room)
        if chosen:
            self._read(chosen, decoders)
        return more

    def _read(self, chosen: list[str], decoders: Decoders) -> None:
        with self.health.timed("commit"):
            self._recorder.write(lambda: self.log.take_in_hand(chosen))
        self._reading += len(chosen)
        in_hand = self._backlog.in_hand
        alone = [path for path in chosen if in_hand[path].alone]
        others = [path for path in chosen if not in_hand[path].alone]
        for group in (*([path] for path in alone), others):
            decoders.read(group, self.model.info.input_size, self.config.max_pixels)

    def _run(self, decoders: Decoders, *task: Any) -> None:
        self._reading += 1
        decoders.run(*task)

    def _look_around(self, now: float, decoders: Decoders) -> None:
        """Do what is due by the clock."""
        self._backlog.end_waits(now)
        if self._missed and self.inbox.qsize() < _MOST_MESSAGES:
            self._missed = False
            self._scan_all(again=True)
        elif now >= self._next_rescan:
            self._scan_all()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            for files in self._files:
                files.look()
            decoders.look()
            self._mover.look()
            if self._backlog.look_at_folders():
                decoders.leave_behind()
            self._note_folders()
            if (offline := self._backlog.folders_offline()) != self.offline:
                self.offline = offline
                self._next_beat = now
            self._stopping |= self.until_done and bool(self.offline)
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_S
            self._beat()
        if now >= self._retention.next_due and self._backlog.quiet():
            folders = self._backlog.online, self._backlog.there
            self._recorder.write(
                lambda: self._retention.step(self.log, *folders, time.monotonic())
            )

    def _note_folders(self) -> None:
        points = self._backlog.mount_points()
        if points != self._mount_points:
            self._mount_points = points
            # A single pass does not take the place of the service whose log it is.
            self._recorder.write(lambda: self.log.watch(points, besides=self.until_done))

    def _beat(self) -> None:
        figures = self._figures()
        self._recorder.write(lambda: self.log.beat(figures))

    def _figures(self) -> Figures:
        oldest = self._backlog.oldest()
        waited = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        waiting = self.health.waiting(len(self._backlog), waited, self.offline)
        waiting["scanning"] = self._backlog.scanning()
        waiting["model"] = self.model.sha256
        if self.until_done:  # what is not there afterwards is no service that is down
            waiting["stopped"] = 1
        if not self.cascade:
            return waiting
        index = self.cascade.identifier.index.sha256
        gate = self._threshold(self.model)
        return {**waiting, "catalog_index": index, "gate_threshold": gate}

    def _scan_all(self, again: bool = False) -> None:
        self._next_rescan = time.monotonic() + self.config.rescan_seconds
        self.health.rescanned()
        self._backlog.scan(again)

    # What came in

    def _receive(self, timeout: float) -> None:
        try:
            with self.health.timed("wait"):
                message = self.inbox.get(timeout > 0, timeout or None)
            for _ in range(_MESSAGES):
                self._handle(message)
                if self._batch_is_full():
                    return
                message = self.inbox.get(False)
            self._handle(message)
        except queue.Empty:
            return

    def _handle(self, message: Message) -> None:
        match message:
            case list():
                self._reading -= len(message)
                self.health.moved()
                for read in message:
                    self._take_in(read)
            case Scored():
                self._scoring -= 1
                self.health.spent("inference", message.seconds)
                self.health.moved()
                self._pass_on(message)
            case Loaded():
                message.hand_over()
                self._beat()  # by which reclassify tells what is out of date
            case Reload():
                for served in self._files:
                    served.load()
                self._scan_all(again=True)
            case Stop():
                self._stopping = True
            case SetAside():
                self._mover.note(message)
                self._recorder.set_aside(message)
            case _:
                self._heed(message)

    def _heed(self, sight: Sight) -> None:
        match sight:
            case HintsLost():
                self.health.overflowed()
                logger.warning("the kernel dropped file events; scanning every folder")
                self._scan_all(again=True)
            case Exception():
                raise sight
            case _:
                self._backlog.heed(sight)

    def _take_in(self, read: _Read) -> None:
        if isinstance(read, Reading):
            self.health.spent("decode", read.seconds)
            if self.cascade:
                self.cascade.forget(read.path)
            self._sort(read)
        elif self.cascade:
            self.cascade.handle(read)

    def _sort(self, reading: Reading) -> None:
        """Score it, wait for it to be completed, or let it go."""
        path, in_hand = reading.path, self._backlog.in_hand[reading.path]
        # A single pass does not wait again for a file that never stood still.
        last = self.until_done and not in_hand.settled
        if reading.changed and reading.stamp and last:
            reading = replace(reading, changed=False, error=_NEVER_STILL)
        unfinished = reading.changed or reading.suspect or reading.transient
        stamp = reading.stamp or (in_hand.stamp if unfinished else None)
        # What was found still when it was chosen may be written on since.
        settled = last or (in_hand.settled and stamp == in_hand.stamp)
        if stamp is None or (unfinished and not self._backlog.online(path)):
            # Gone before it was read, or with its folder, where it is found again.
            self._backlog.drop(path)
        elif reading.suspect:
            in_hand.alone = True
            self._backlog.read_again(path)
        elif reading.transient and (wait := self._next_attempt(reading)):
            problem = "path=%r: %s; trying again in %g s"
            logger.warning(problem, text_of(path), reading.error, wait)
            self._backlog.wait_again(path, stamp, wait)
        elif reading.changed or (reading.error and not reading.transient and not settled):
            self._backlog.wait_again(path, stamp)
        elif reading.image and len(reading.image.pixels) != self.model.info.input_size:
            self._backlog.read_again(path)  # was read for the model before this one
        elif reading.sha256 and self._recorder.write(
            lambda: self.log.recognise(path, reading.sha256, stamp)
        ):
            self._backlog.let_go(path)
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

    def _swap(self, model: Model) -> None:
        if model.sha256 == self.model.sha256:
            return
        if model.info.input_size != self.model.info.input_size:
            for reading in self._batch:
                self._backlog.read_again(reading.path)
            self._batch.clear()
        self.model = model
        self._recorder.write(lambda: self.log.use_model(model))
        self.health.serving(model)
        logger.info("now serving model %s, sha256 %s", model.path, model.sha256[:12])

    # What becomes of it

    def _batch_is_full(self) -> bool:
        return len(self._batch) >= self.config.batch_size

    def _batch_is_due(self) -> bool:
        """Full, or nothing else is coming, or the oldest has waited long enough.

        While one is scored another waits if it is full: the network is not to idle while
        the rows of the one before are written.
        """
        if self._scoring:
            return self._scoring < _SCORED_AHEAD and self._batch_is_full()
        if not self._batch:
            return False
        waited = time.monotonic() >= self._batch_ends()
        return self._batch_is_full() or not self._reading or waited

    def _batch_ends(self) -> float:
        """When a batch that is not full is scored all the same."""
        more = self._backlog.more()
        return self._batch_since + (_BACKLOG_WAIT_S if more else _BATCH_WAIT_S)

    def _begin_scoring(self, scorer: Scorer) -> None:
        size = self.config.batch_size
        batch, self._batch = self._batch[:size], self._batch[size:]
        self._batch_since = time.monotonic()
        self._scoring += 1
        gate = self.cascade.gate(self.model) if self.cascade else None
        scorer.begin(self.model, batch, gate)

    def _pass_on(self, scored: Scored) -> None:
        """Record a batch, but for what the cascade is to look at."""
        model, now = scored.model, time.time()
        threshold = self._threshold(model)
        outcomes = []
        for reading, verdict in zip(scored.readings, scored.verdicts, strict=True):
            outcome = self._outcome(reading, verdict, threshold, now)
            score = verdict.score if verdict and not verdict.reason else -1.0
            if self.cascade and score >= threshold:
                self.cascade.take(Passed(outcome, model))
            else:
                outcomes.append(outcome)
        if outcomes:
            self._record(outcomes, model)

    def _threshold(self, model: Model) -> float:
        """What a model's score must reach, to match or to be looked at again."""
        gate = self.cascade.gate(model) if self.cascade else None
        return model.info.threshold if gate is None else gate

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
            self._mover.heed(outcome)
            self._backlog.let_go(outcome.path)

    def _outcome(
        self, reading: Reading, verdict: Verdict | None, threshold: float, now: float
    ) -> Outcome:
        image, in_hand = reading.image, self._backlog.in_hand[reading.path]
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
            threshold=threshold if image else None,
            error=verdict.reason if verdict else reading.error,
        )

    def _patience(self) -> float:
        """Seconds the loop may sleep if no message comes."""
        now = time.monotonic()
        if self._stopping:
            waits = self._batch or (self.cascade and self.cascade.waiting)
            return _BATCH_WAIT_S if waits else _LOOK_S
        moments = [self._next_rescan, self._next_look, self._next_beat]
        if (due := self._backlog.next_due()) is not None:
            moments.append(due)
        if self._backlog.quiet():
            moments.append(self._retention.next_due)
        if self._batch and not self._scoring:  # else a message comes
            moments.append(self._batch_ends())
        if self.cascade and (due := self.cascade.due()) is not None:
            moments.append(due)
        wait = min(moments) - now
        return min(_LONGEST_WAIT_S, max(0.001, wait))
