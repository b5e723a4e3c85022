"""A whole archive through the service's own engine, once, with a progress bar."""

import math
import os
import signal
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from pic_daemon.cascade import Cascade, Identifier
from pic_daemon.config import Config
from pic_daemon.folders import Folder, mount_of, text_of
from pic_daemon.match_log import MatchLog
from pic_daemon.model import Model
from pic_daemon.onnx_session import Provider
from pic_daemon.service import Service


@dataclass(frozen=True)
class Done:
    """How many of the `files` of an archive got which status, or were gone before they were
    read, what could not be looked at, and what its names passed over (`Folder.walk`)."""

    files: int
    outcomes: Counter[str]
    refused: list[str]
    passed_over: Counter[str]


def classify_folder(
    folder: Path, model: Model, log: MatchLog, identifier: Identifier | None = None,
    gate: float | None = None, provider: Provider = "auto",
) -> Done:  # fmt: skip
    """Record every image below `folder` that the log does not hold yet; `gate` is the
    score from which on descriptor and index decide, None for the model's. A model or index
    that is replaced meanwhile is loaded on `provider`. Ctrl-C or SIGTERM finishes what is
    in hand and raises click.Abort, a folder that goes away click.ClickException; the same
    call goes on from there.
    """
    # Nobody announces anything here: a poll that never comes again is one scan.
    place = Folder(folder.resolve(), mode="poll", poll_seconds=math.inf)
    config = Config(
        (place,), model.path, log.path, provider, gate_threshold=gate,
        rescan_seconds=math.inf,
    )  # fmt: skip
    refused: dict[str, OSError] = {}
    passed_over: Counter[str] = Counter()
    found = place.walk(str(place.path), refused.__setitem__, passed_over)
    total = sum(1 for file in found if file)
    mount = mount_of(place.path)  # which a first look into it may have mounted
    with click.progressbar(length=total, file=sys.stderr, label=str(folder)) as bar:
        cascade = Cascade(identifier, config) if identifier else None
        service = Service(config, model, log, cascade, until_done=True, passed=bar.update)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        try:
            service.run()
        except sqlite3.Error as error:
            raise click.ClickException(f"database {log.path}: {error}") from error
    if service.stop_asked:
        raise click.Abort
    # The service may have ended before it saw that: what is gone is no work.
    if service.offline or mount_of(place.path) != mount or not os.path.isdir(place.path):
        raise click.ClickException(
            f"{text_of(str(folder))} went away, or does not answer. When it is back, the "
            "same command goes on from here."
        )
    outcomes = Counter(service.health.outcomes)
    outcomes += Counter({"gone before they were read": service.gone})
    # On each disk of its own, and root's alone.
    shut = [path for path in refused if os.path.basename(path) != "lost+found"]
    return Done(total, outcomes, shut, passed_over)
