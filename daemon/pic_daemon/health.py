"""How the service is doing: figures for Prometheus, systemd and the match log."""

import os
import time
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import start_http_server

from pic_daemon.errors import not_listening
from pic_daemon.match_log import Outcome
from pic_daemon.model import Model
from pic_daemon.schema import Status
from pic_daemon.systemd import notify, watchdog_seconds

Figures = dict[str, float | int | str | list[str]]

_LATENCIES_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)


@dataclass
class Health:
    """Counts what the service does. Times are monotonic, in seconds.

    systemd's watchdog is fed only while the pipeline moves or has nothing to do:
    files in hand must come to an end within `stuck_after` seconds.
    """

    stuck_after: float
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    outcomes: Tally[str] = field(default_factory=Tally)
    _moved_at: float = field(default_factory=time.monotonic)
    _fed_at: float = 0.0

    def __post_init__(self) -> None:
        registry = self.registry
        images = Counter("pic_images", "Images recorded", ["status"], registry=registry)
        self._images = cache(images.labels)  # its own look-up takes 2 us, of every image
        for status in get_args(Status):  # a rate is not told of what begins above zero
            self._images(status)
        self._latency = Histogram(
            "pic_latency_seconds", "From first notice to recorded row",
            buckets=_LATENCIES_S, registry=registry,
        )  # fmt: skip
        self._backlog = Gauge("pic_backlog", "Files noticed, no row yet", registry=registry)
        self._oldest = Gauge(
            "pic_oldest_waiting_seconds", "Age of the oldest of them", registry=registry
        )
        self._offline = Gauge(
            "pic_folders_offline", "Folders that are gone or do not answer",
            registry=registry,
        )  # fmt: skip
        self._database = Gauge(
            "pic_database_waiting_seconds", "How long the database has taken nothing",
            registry=registry,
        )  # fmt: skip
        self._overflows = Counter(
            "pic_overflows", "Times the kernel dropped file events", registry=registry
        )
        self._rescans = Counter(
            "pic_rescans", "Times all folders were compared with the log", registry=registry
        )
        stages = Counter(
            "pic_stage_seconds", "Time spent by stage; decoding is summed over workers",
            ["stage"], registry=registry,
        )  # fmt: skip
        self._stages = cache(stages.labels)
        self._deliveries = Gauge(
            "pic_deliveries", "Matches that hooks have not been told of, by state",
            ["hook", "state"], registry=registry,
        )  # fmt: skip
        self._attempts = Counter(
            "pic_delivery_attempts", "Attempts to tell a hook of a match",
            ["hook", "result"], registry=registry,
        )  # fmt: skip
        self._model = Info("pic_model", "The model that serves", registry=registry)

    def serve(self, address: str) -> None:
        """Answer Prometheus at ``host:port``. Raises what `not_listening` makes of it."""
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), host.strip("[]") or "127.0.0.1", self.registry)
        except (OSError, ValueError, OverflowError) as error:
            raise not_listening(f"metrics at {address!r}", error) from error

    def serving(self, model: Model) -> None:
        """Note the model in use."""
        self._model.info(
            {
                "sha256": model.sha256,
                "provider": model.provider,
                "architecture": model.info.architecture,
            }
        )

    def recorded(self, outcomes: list[Outcome]) -> None:
        """Count rows that are on the disk now."""
        self.moved()
        now = time.time()
        for outcome in outcomes:
            self.outcomes[outcome.status] += 1
            self._images(outcome.status).inc()
            self._latency.observe(max(0.0, now - outcome.seen_at))

    def spent(self, stage: str, seconds: float) -> None:
        """Count time that went into a stage of the work."""
        self._stages(stage).inc(seconds)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time that the block takes as spent in `stage`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent(stage, time.perf_counter() - begun)

    def overflowed(self) -> None:
        """Count a queue overflow."""
        self._overflows.inc()

    def rescanned(self) -> None:
        """Count a comparison of all folders with the log."""
        self._rescans.inc()

    def delivering(self, hook: str, pending: int, given_up: int) -> None:
        """Note what a hook has still to be told; from its own thread."""
        for result in ("taken", "failed"):
            self._attempts.labels(hook, result)
        self._deliveries.labels(hook, "pending").set(pending)
        self._deliveries.labels(hook, "given-up").set(given_up)

    def delivered(self, hook: str, taken: bool) -> None:
        """Count an attempt to tell a hook; from its own thread."""
        self._attempts.labels(hook, "taken" if taken else "failed").inc()

    def database_waits(self, seconds: float) -> None:
        """Note for how long the database has taken nothing, 0 where it does."""
        self._database.set(seconds)

    def moved(self) -> None:
        """Note that the pipeline moves."""
        self._moved_at = time.monotonic()

    def waiting(self, backlog: int, oldest_s: float, offline: Sequence[str]) -> Figures:
        """Note what waits and who is offline; returns figures for the match log."""
        self._backlog.set(backlog)
        self._oldest.set(oldest_s)
        counts = ", ".join(f"{count} {status}" for status, count in self.outcomes.items())
        self._offline.set(len(offline))
        gone = f"; offline: {', '.join(offline)}" if offline else ""
        notify(f"STATUS={backlog} waiting; {counts or 'nothing recorded yet'}{gone}")
        return {
            "pid": os.getpid(),
            "backlog": backlog,
            "oldest_waiting_s": round(oldest_s, 1),
            "offline": list(offline),
            **{f"recorded_{status}": n for status, n in self.outcomes.items()},
        }

    def feed_watchdog(self, busy: bool) -> None:
        """Tell systemd that all is well, unless files in hand do not move."""
        now = time.monotonic()
        if not busy:
            self._moved_at = now
        every = watchdog_seconds() / 4
        if (
            every
            and now - self._fed_at >= every
            and now - self._moved_at < self.stuck_after
        ):
            self._fed_at = now
            notify("WATCHDOG=1")
