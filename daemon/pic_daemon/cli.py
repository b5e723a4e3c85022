"""pic-daemon: the service, and what is asked about it."""

import errno
import json
import logging
import os
import shlex
import signal
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from pic_daemon.cascade import Cascade, Identifier, load_identifier
from pic_daemon.config import MISSING, SHUT, Config, load_config
from pic_daemon.dispatch import dispatching
from pic_daemon.errors import InputError
from pic_daemon.folders import mount_of, text_of
from pic_daemon.hooks import check_hooks, describe_hooks
from pic_daemon.inotify_limits import instances_left, watches_left, watches_needed
from pic_daemon.lock import lock
from pic_daemon.match_log import SILENT_S, MatchLog
from pic_daemon.match_queries import read_status
from pic_daemon.model import Model, load_model
from pic_daemon.options import DATABASE, PROVIDERS, Place
from pic_daemon.schema import check as check_log
from pic_daemon.schema import must_be_there
from pic_daemon.served_files import state_of
from pic_daemon.service import Service
from pic_daemon.systemd import log_format

_OVERDUE_S = 900.0
_PATH = Place()
_NO_EVENTS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph")


def _words(_: click.Context, __: click.Parameter, text: str | None) -> list[str] | None:
    try:
        return None if text is None else shlex.split(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _service_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--config", type=_PATH, help="TOML file with the keys below."),
        click.option("--watch", multiple=True, type=_PATH, metavar="DIR",
                     help="Drop folder, with all below it; may be repeated."),
        click.option("--model", type=_PATH, help="ONNX file made by pic-export."),
        click.option("--describe", type=_PATH,
                     help="Descriptor: names products together with --index [off]."),
        click.option("--index", type=_PATH, help="Catalog index made by pic-index."),
        click.option("--gate-threshold", type=float,
                     help="Score from which on they decide [as the model says]."),
        click.option("--database", type=_PATH, help="SQLite match log; made if missing."),
        click.option("--provider", type=PROVIDERS, help="Execution provider [auto]."),
        click.option("--batch-size", type=int, help="Images scored at a time [32]."),
        click.option("--workers", type=int, help="Files decoded at a time [one a core]."),
        click.option("--settle-seconds", type=float,
                     help="How long an unannounced file must stand still [2]."),
        click.option("--rescan-seconds", type=float,
                     help="How often folders and log are compared [300]."),
        click.option("--max-pixels", type=int,
                     help="Largest picture decoded, width x height [200000000]."),
        click.option("--failed-folder", type=_PATH, metavar="DIR",
                     help="Move files that failed there [left where they are]."),
        click.option("--metrics", metavar="HOST:PORT",
                     help="Answer Prometheus there, such as 127.0.0.1:9465 [off]."),
        click.option("--decode-seconds", type=float,
                     help="Longest that reading one file may take [30]."),
        click.option("--webhook", metavar="URL",
                     help="POST every match there, as JSON [nobody is told]."),
        click.option("--webhook-header-file", type=_PATH, metavar="FILE",
                     help="Holds a header to send with it: 'Name: secret'."),
        click.option("--command", callback=_words, metavar="'PROGRAM ARG...'",
                     help="Run for every match, with JSON on its stdin [none]."),
        click.option("--hook-seconds", type=float,
                     help="Longest that telling a hook may take [10]."),
        click.option("--hook-hours", type=float,
                     help="How long a hook that fails is tried again [72]."),
        click.option("--keep-no-match-days", type=float, metavar="DAYS",
                     help="Then rows of no match go, if their files are gone [for ever]."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
@click.version_option(package_name="product-image-classifier")
def daemon() -> None:
    """Classify every image that lands in a folder and log it in SQLite.

    Example: pic-daemon run --watch /srv/drop --model model.onnx --database log.db
    """


@daemon.command()
@_service_options
@click.option("--verbose", is_flag=True, help="Log every image, not matches alone.")
def run(config: Path | None, verbose: bool, **overrides: Any) -> None:
    """Watch folders until SIGTERM or Ctrl-C; either finishes what is in hand.

    A changed model file is tried beside the one in use and then replaces it; SIGHUP
    does so at once, and compares folders and log.

    Example: pic-daemon run --watch /srv/drop --model model.onnx --database log.db
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    handler = logging.StreamHandler()
    handler.setFormatter(log_format())
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, handlers=[handler]
    )
    logging.getLogger("watchdog").setLevel(logging.WARNING)
    settings = load_config(config, overrides, may_miss=True)
    _check_missing(settings)
    check_hooks(settings)
    served = [settings.model, settings.describe, settings.index]
    before = {path: state_of(path) for path in served if path}
    model = load_model(settings.model, settings.provider)
    identifier = _identifier(settings)
    log = opened(settings.database)
    logging.getLogger("pic_daemon").info(_about_model(model))
    if identifier:
        logging.getLogger("pic_daemon").info(_about_identifier(identifier))
    cascade = Cascade(identifier, settings) if identifier else None
    service = Service(settings, model, log, cascade, before=before)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    signal.signal(signal.SIGHUP, lambda *_: service.reload())
    try:
        with alone_with(settings.database), dispatching(settings, service.health):
            service.run()
    except sqlite3.Error as error:
        raise click.ClickException(f"database {settings.database}: {error}") from error
    finally:
        log.close()


@contextmanager
def alone_with(database: Path) -> Iterator[None]:
    """Keep a second program that classifies off the log: a service would give up what hooks
    of this one wait for, and say that it lives when this one does not."""
    name = _lock_of(database)
    try:
        held = lock(name)
    except BlockingIOError as error:
        raise click.ClickException(
            f"database {database}: another pic-daemon serves it, or pic-classify fills it; "
            "stop that."
        ) from error
    except OSError as error:
        kind = InputError if error.errno == errno.EACCES else click.ClickException
        raise kind(f"database {database}: {name}: {error.strerror}.") from error
    try:
        yield
    finally:
        os.close(held)


def _lock_of(database: Path) -> str:
    return f"{os.path.realpath(database)}.lock"  # as SQLite goes by the file, not its links


def _check_missing(settings: Config) -> None:
    """A folder that is missing or shut is offline if it was watched before, else a mistake.

    Where failed files go may come later: the service does its work without.
    """
    before: Collection[str] = ()
    if settings.missing and os.path.exists(settings.database):
        with _open_log(settings.database) as log:
            before = log.mount_points()
    for path in settings.missing:
        if path == settings.failed_folder:
            problem = "failed_folder %s %s; what fails until it does stays where it is"
            logging.getLogger("pic_daemon").warning(problem, path, MISSING)
        elif text_of(str(path)) not in before:
            problem = SHUT if os.path.isdir(path) else MISSING
            raise InputError(f"watch folder {path} {problem}.")


@daemon.command()
@_service_options
def check(config: Path | None, **overrides: Any) -> None:
    """Try config, folders, models, index, database and hooks without starting.

    Exit code 2 if one fails, 1 if that may pass. Hooks are not told anything;
    a webhook that cannot be reached is only named. What the unit allows is not seen from
    here, nor whether the port of --metrics is free.

    Example: pic-daemon check --config /etc/pic-daemon.toml
    """
    settings = load_config(config, overrides)
    check_hooks(settings)
    model = load_model(settings.model, settings.provider)
    identifier = _identifier(settings)
    with _passing(settings.database):
        check_log(settings.database)
    beside = _lock_of(settings.database)
    if os.path.exists(beside) and not os.access(beside, os.W_OK):
        raise InputError(f"database {settings.database}: {beside} is not writable.")
    click.echo(_about_model(model))
    if identifier:
        click.echo(_about_identifier(identifier))
        changes = identifier.index.changes()
        state = "cannot be reached from here" if changes is None else "as indexed"
        click.echo(f"catalog {text_of(identifier.index.about.catalog)}: {changes or state}")
    click.echo(f"database {text_of(str(settings.database))}: ok")
    for folder in settings.folders:
        with suppress(OSError):
            os.scandir(folder.path).close()  # which mounts what is mounted when it is used
        kind = mount_of(folder.path).type or "unknown"
        remote = kind in _NO_EVENTS or kind.split(".")[0] == "fuse"
        silent = remote and folder.mode == "events"
        note = ', announces nothing: set mode = "poll"' if silent else ""
        click.echo(f"folder {text_of(str(folder.path))}: file system {kind}{note}")
    for line in describe_hooks(settings):
        click.echo(line)
    if settings.keep_no_match_days:
        click.echo(
            f"rows of no match go after {settings.keep_no_match_days:g} days, if their "
            "files are gone"
        )
    _check_watches(settings)


@daemon.command()
@DATABASE
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(database: Path, as_json: bool) -> None:
    """Say how the service is doing; exit 1 where something is wrong.

    That is where the service is down or stuck, a folder is offline, or a file has waited
    for 15 minutes.

    Example: pic-daemon status --database log.db
    """
    found = read_status(database)
    problem = None
    if found.get("stopped"):
        problem = "the service was stopped"
    elif found["age_s"] > SILENT_S:
        problem = f"no heartbeat for {found['age_s']:.0f} s: the service is down or stuck"
    elif found["age_s"] < -SILENT_S:  # a service that lives would have beaten since
        problem = "no heartbeat since the clock was set back: the service is down or stuck"
    elif found["oldest_waiting_s"] > _OVERDUE_S:
        problem = f"a file has been waiting for {found['oldest_waiting_s']:.0f} s"
    elif found.get("offline"):
        problem = f"offline: {', '.join(found['offline'])}"
    if as_json:
        click.echo(json.dumps({**found, "healthy": problem is None, "problem": problem}))
    else:
        rows = ", ".join(f"{n} {name}" for name, n in sorted(found["rows"].items()))
        told = ", ".join(f"{n} {state}" for state, n in found["deliveries"].items() if n)
        click.echo(
            f"{problem or 'healthy'}; {found['backlog']} waiting"
            + (", and a scan may bring more" if found.get("scanning") else "")
            + f"; rows: {rows or 0}"
            + (f"; deliveries: {told}" if told else "")
        )
    if problem:
        sys.exit(1)


@daemon.command()
@DATABASE
@click.option("--deliveries", is_flag=True,
              help="Instead tell hooks, at once, what was given up.")  # fmt: skip
@click.option("--forget", is_flag=True,
              help="With --deliveries: delete them, hooks are not told.")  # fmt: skip
def retry(database: Path, deliveries: bool, forget: bool) -> None:
    """Have the service try every failed image again, at its next scan or on SIGHUP.

    Those that --failed-folder took away are tried once they are moved back.

    Example: pic-daemon retry --database log.db && systemctl reload pic-daemon
    """
    if forget and not deliveries:
        raise click.UsageError("--forget goes with --deliveries.")
    with _open_log(database) as log:
        if forget:
            click.echo(f"{log.forget_deliveries()} deliveries were deleted")
            return
        if deliveries:
            click.echo(f"{log.deliver_again()} deliveries will be tried again")
            return
        found = log.mark_failed()
        click.echo(f"{found} failed images will be tried again, as far as they are there")


@daemon.command()
@DATABASE
def reclassify(database: Path) -> None:
    """Have the service score again what an earlier model scored, as far as it is there.

    Earlier than the model, or the index, that the service serves: after a change of the
    file wait for its "now serving". Takes effect at the next scan or on SIGHUP.

    Example: pic-daemon reclassify --database log.db && systemctl reload pic-daemon
    """
    with _open_log(database) as log:
        found, served = log.mark_outdated(), log.served()
        by = f" (present model: {served[0][:12]}, at {served[1]})" if served else ""
        click.echo(f"{found} images will be scored again, as far as they are there{by}")


@contextmanager
def _open_log(database: Path) -> Iterator[MatchLog]:
    must_be_there(database)
    log = opened(database)
    try:
        yield log
    except sqlite3.Error as error:
        raise click.ClickException(f"database {database}: {error}") from error
    finally:
        log.close()


def opened(database: Path) -> MatchLog:
    """The match log, to write to.

    Raises InputError as `MatchLog.open` does, and ClickException where it is locked or the
    disk is full.
    """
    with _passing(database):
        return MatchLog.open(database)


@contextmanager
def _passing(database: Path) -> Iterator[None]:
    """Trouble that passes is exit code 1, so that systemd tries again."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise click.ClickException(f"database {database}: {error}") from error


def _about_model(model: Model) -> str:
    info = model.info
    return (
        f"model {text_of(str(model.path))}: {info.architecture}, {info.input_size} x "
        f"{info.input_size}, threshold {info.threshold:.6g}, "
        f"catalog of {info.catalog_size}; provider {model.provider} "
        f"({model.provider_reason})"
    )


def _identifier(settings: Config) -> Identifier | None:
    if not settings.describe or not settings.index:
        return None
    return load_identifier(settings.describe, settings.index, settings.provider)


def _about_identifier(identifier: Identifier) -> str:
    index, info = identifier.index, identifier.descriptor.info
    return (
        f"index {text_of(str(index.path))}: {len(index.items)} items by "
        f"{info.architecture}, {info.dimensions} numbers from {info.input_size} x "
        f"{info.input_size}; {index.about_promise()}"
    )


def _check_watches(settings: Config) -> None:
    watched = [folder for folder in settings.folders if folder.mode == "events"]
    # A service that watches them holds what it needs already.
    left, instances = watches_left(watched), instances_left(watched)
    if left is None or instances is None:
        click.echo("inotify: not on this system")
        return
    needed = sum(watches_needed(folder) for folder in watched)
    click.echo(f"inotify: {needed} watches needed, {left} left for this user")
    if needed > left:
        raise InputError(
            f"{needed} folders need an inotify watch each and {left} are left: "
            "raise fs.inotify.max_user_watches with sysctl."
        )
    if len(watched) > instances:
        raise InputError(
            f"{len(watched)} watch folders need an inotify instance each and {instances} "
            "are left: raise fs.inotify.max_user_instances with sysctl."
        )
