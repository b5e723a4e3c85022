"""The second stage: what the classifier lets through is named and confirmed.

A file that passes is read again, larger, by the worker processes; the descriptor
proposes catalog items, and worker processes confirm them. Belongs to the service's loop,
which alone calls it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from pic_daemon.catalog_index import CatalogIndex, check_belongs, load_index
from pic_daemon.config import Config
from pic_daemon.descriptor import Descriptor, load_descriptor
from pic_daemon.identification import (
    UNDESCRIBED,
    Candidate,
    CloserReading,
    Closeup,
    Confirmation,
    Identification,
    agreements,
    confirm,
    identify,
    look_closer,
    worth_confirming,
)
from pic_daemon.match_log import Outcome
from pic_daemon.model import Model
from pic_daemon.onnx_session import Provider
from pic_daemon.served_files import Loaded, ServedFiles, State

logger = logging.getLogger("pic_daemon")

_WAIT_S = 0.02  # the longest a picture waits for others to be described with it


@dataclass(frozen=True)
class Identifier:
    """A descriptor and an index that belong together."""

    descriptor: Descriptor
    index: CatalogIndex

    def candidates(self, closeups: Sequence[Closeup]) -> list[list[Candidate]]:
        """What each picture may be a copy of; empty where it has no finite vector."""
        vectors = self.descriptor.describe(np.stack([c.pixels for c in closeups]))
        found = iter(self.index.look_up(vectors[np.isfinite(vectors).all(axis=1)]))
        return [next(found) if np.isfinite(v).all() else [] for v in vectors]

    def identify(self, closeup: Closeup) -> Identification | None:
        """Describe, look up and confirm in this process; None: no finite vector."""
        (found,) = self.candidates([closeup])
        if not found:
            return None
        items = [c.landmarks for c in worth_confirming(found, self.threshold)]
        values = agreements(closeup.landmarks, items)
        return identify(found, values, self.threshold)

    @property
    def threshold(self) -> float:
        """What the joint score must reach, in [0, 1]."""
        return self.index.about.promise.threshold


def load_identifier(describe: Path, index: Path, provider: Provider) -> Identifier:
    """Load both; raises InputError where one is bad or they do not belong together."""
    descriptor = load_descriptor(describe, provider)
    catalog = load_index(index)
    check_belongs(catalog, descriptor)
    return Identifier(descriptor, catalog)


def _say_changes(index: CatalogIndex) -> None:
    """Log how the catalog folder differs from the index by now, if it can be reached."""
    if changes := index.changes():
        logger.warning(
            "catalog %s changed since it was indexed: %s; bring the index up to date with "
            "pic-index", index.about.catalog, changes,
        )  # fmt: skip


@dataclass(frozen=True)
class Passed:
    """A file that the classifier let through: the row so far, and who scored it."""

    outcome: Outcome
    model: Model


@dataclass
class _Asked:
    """Candidates of a file that worker processes are confirming."""

    identifier: Identifier
    candidates: list[Candidate]


@dataclass
class Cascade:
    """Files between passing the classifier and being decided; to be `start`ed first."""

    identifier: Identifier
    config: Config
    _run: Callable[..., None] = field(init=False)
    _passed: dict[str, Passed] = field(default_factory=dict)
    _seen: dict[str, Closeup] = field(default_factory=dict)
    _seen_since: float = 0.0
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _decided: list[Passed] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """How many files wait here, those with the worker processes not counted."""
        return len(self._seen) + len(self._decided)

    def start(self, run: Callable[..., None]) -> None:
        """Note how worker processes are given a task: (task, path, *arguments)."""
        self._run = run
        self._compare_catalog()

    def files(
        self, send: Callable[[Loaded], None], before: Mapping[Path, State | None]
    ) -> ServedFiles[Identifier]:
        """Descriptor and index, which are loaded again when one of them changes."""
        paths = self.identifier.descriptor.path, self.identifier.index.path
        load = partial(load_identifier, *paths, self.config.provider)
        return ServedFiles("index", paths, load, self._use, send, before)

    def gate(self, model: Model) -> float:
        """The score of `model` from which on the second stage decides."""
        own = self.config.gate_threshold
        return model.info.gate_threshold if own is None else own

    def take(self, passed: Passed) -> None:
        """Look closer at a file that passed."""
        self._passed[passed.outcome.path] = passed
        self._look(passed.outcome)

    def forget(self, path: str) -> None:
        """Give a file up: it changed, or a worker process came to grief over it."""
        self._passed.pop(path, None)
        self._asked.pop(path, None)

    def handle(self, message: CloserReading | Confirmation) -> None:
        """Go on with what the worker processes bring."""
        match message:
            case CloserReading(path, closeup) if path in self._passed:
                if not self._seen:
                    self._seen_since = time.monotonic()
                self._seen[path] = closeup
            case Confirmation(path, agreements) if path in self._asked:
                asked = self._asked.pop(path)
                self._decide(path, asked.identifier, asked.candidates, agreements)

    def due(self) -> float | None:
        """When the pictures that wait are to be described, monotonic; None: none wait."""
        if not self._seen:
            return None
        under_way = len(self._passed) - len(self._seen) - len(self._asked)
        full = len(self._seen) >= self.config.batch_size
        return 0.0 if full or not under_way else self._seen_since + _WAIT_S

    def describe(self) -> None:
        """Describe the pictures that wait, and have their candidates confirmed."""
        size = self.identifier.descriptor.info.input_size
        seen, self._seen = self._seen, {}
        for path in [p for p, c in seen.items() if len(c.pixels) != size]:
            del seen[path]  # was read for the descriptor before this one
            self._look(self._passed[path].outcome)
        for start in range(0, len(seen), self.config.batch_size):
            part = dict(list(seen.items())[start : start + self.config.batch_size])
            found = self.identifier.candidates(list(part.values()))
            for (path, closeup), candidates in zip(part.items(), found, strict=True):
                worth = worth_confirming(candidates, self.identifier.threshold)
                if worth:
                    self._asked[path] = _Asked(self.identifier, candidates)
                    items = [candidate.landmarks for candidate in worth]
                    self._run(confirm, path, closeup.landmarks, items)
                else:
                    self._decide(path, self.identifier, candidates, ())

    def take_decided(self) -> list[Passed]:
        """What is decided by now, the rows complete."""
        decided, self._decided = self._decided, []
        return decided

    def _use(self, identifier: Identifier) -> None:
        index, before = identifier.index, self.identifier.index
        self.identifier = identifier
        if index.sha256 == before.sha256:
            return
        logger.info(
            "now serving index %s, sha256 %s, %d items",
            index.path, index.sha256[:12], len(index.items),
        )  # fmt: skip
        self._compare_catalog()

    def _compare_catalog(self) -> None:
        # In a thread of its own: a large catalog takes a while.
        comparing = threading.Thread(
            target=_say_changes, args=[self.identifier.index], name="catalog", daemon=True
        )
        comparing.start()

    def _look(self, file: Outcome) -> None:
        size = self.identifier.descriptor.info.input_size
        self._run(look_closer, file.path, file.sha256, size, self.config.max_pixels)

    def _decide(self, path: str, identifier: Identifier, candidates: Sequence[Candidate],
                agreements: Sequence[float]) -> None:  # fmt: skip
        passed, threshold = self._passed.pop(path), identifier.threshold
        found = identify(candidates, agreements, threshold) if candidates else None
        outcome = replace(
            passed.outcome,
            classified_at=time.time(),
            catalog_index=identifier.index.sha256,
            **(found.columns() if found else UNDESCRIBED),
        )
        self._decided.append(replace(passed, outcome=outcome))
