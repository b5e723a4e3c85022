"""Settings of the service: from a TOML file, from the command line, or both."""

import math
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from pic_daemon.cores import cores
from pic_daemon.deliveries import Hook
from pic_daemon.errors import InputError
from pic_daemon.folders import EXCLUDED, Folder, answer_within
from pic_daemon.images import MAX_PIXELS, PATTERNS
from pic_daemon.onnx_session import Provider


@dataclass(frozen=True)
class Config:
    """Everything the service needs to know; times are in seconds.

    `settle_seconds`: a file that nobody announced as complete is read once it has
    stood still this long. `rescan_seconds`: how often the folders are compared with
    the match log. `workers` = 0: one reader per core. `decode_seconds`: the longest
    that reading one file may take. `metrics`: host:port where Prometheus may ask, or ''.
    `describe` and `index`: descriptor and catalog index, both or neither.
    `gate_threshold`: the score, in [0, 1], from which on these two decide, None for what
    the model's file says.
    `failed_folder`: where files that failed are moved, None to leave them.
    `webhook` and `command` are told of every match: an http(s) address with, in
    `webhook_header_file`, a header of one's own; a program with its arguments. One
    attempt may take `hook_seconds`; a delivery is tried for `hook_hours`.
    `keep_no_match_days`: see `retention`; with None no row goes by its age. `missing`:
    those of the folders that do not exist or are shut to this user, and a `failed_folder`
    that does not exist.
    """

    folders: tuple[Folder, ...]
    model: Path
    database: Path
    provider: Provider = "auto"
    batch_size: int = 32
    workers: int = 0
    settle_seconds: float = 2.0
    rescan_seconds: float = 300.0
    max_pixels: int = MAX_PIXELS
    decode_seconds: float = 30.0
    metrics: str = ""
    failed_folder: Path | None = None
    describe: Path | None = None
    index: Path | None = None
    gate_threshold: float | None = None
    webhook: str = ""
    webhook_header_file: Path | None = None
    command: tuple[str, ...] = ()
    hook_seconds: float = 10.0
    hook_hours: float = 72.0
    keep_no_match_days: float | None = None
    missing: frozenset[Path] = frozenset()

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """Who is told of every match."""
        set_here: dict[Hook, object] = {"webhook": self.webhook, "command": self.command}
        return tuple(hook for hook, setting in set_here.items() if setting)

    @property
    def readers(self) -> int:
        """How many files are decoded at the same time."""
        return self.workers or cores()


_KEYS = {
    field.name: field.type
    for field in fields(Config)
    if field.name not in ("folders", "missing")
}
_FOLDER_KEYS = {"path", "recursive", "include", "exclude", "mode", "poll_seconds"}
_PATHS = (
    "model", "database", "failed_folder", "describe", "index", "webhook_header_file",
)  # fmt: skip
_MINIMUM: dict[str, float] = {
    "batch_size": 1,
    "workers": 0,
    "settle_seconds": 0,
    "rescan_seconds": 1,
    "max_pixels": 1,
    "decode_seconds": 0.1,
    "hook_seconds": 0.1,
    "hook_hours": 0,
    "keep_no_match_days": 1,
    "gate_threshold": 0,
}
# Beyond which the clock ends, or the processes of a machine.
_MAXIMUM = {"seconds": 1e9, "hours": 1e6, "days": 1e5, "workers": 1024}
_ANSWER_S = 10.0  # watch folders that do not answer within it start as offline
_LEAST_S = 1.0  # for each, though those before it took all of it
MISSING = "does not exist or is no folder"
SHUT = "may not be read by this user"
_MOST_STEPS = 1000
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def load_config(
    file: Path | None, overrides: Mapping[str, Any], may_miss: bool = False
) -> Config:
    """Join a TOML file with overrides of the same keys (None: not given) and check both.

    The override ``watch`` is a list of folder paths. Relative paths in the file are
    taken from the file's folder. Raises InputError naming the key; `may_miss` lets
    folders pass that do not exist or are shut to this user.
    """
    values = _read(file) if file else {}
    where = str(file) if file else "the command line"
    base = file.parent if file else Path()
    unknown = set(values) - set(_KEYS) - {"watch"}
    if unknown:
        raise InputError(
            f"{where}: unknown key {sorted(unknown)[0]!r}; "
            f"known are watch, {', '.join(sorted(_KEYS))}."
        )
    for name in _PATHS:
        if isinstance(values.get(name), str) and values[name]:  # '' would be the folder
            values[name] = base / values[name]
    tables = values.pop("watch", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{where}: write every folder as a [[watch]] table.")
    given = {k: v for k, v in overrides.items() if v is not None and k != "watch"}
    settings = {name: _typed(where, name, v) for name, v in values.items()}
    settings |= {name: _typed("the command line", name, v) for name, v in given.items()}
    for name, option in (("model", "--model"), ("database", "--database")):
        if name not in settings:
            raise InputError(f"no {name} given: set {name} in the config or {option}.")
    until = time.monotonic() + _ANSWER_S
    folders = [_folder(where, base, table, until) for table in tables]
    folders += [_folder("--watch", Path(), {"path": p}, until) for p in overrides["watch"]]
    if not folders:
        raise InputError("no folder to watch: give --watch DIR or [[watch]] tables.")
    missing = {folder.path: problem for folder, problem in folders if problem}
    for path, problem in () if may_miss else missing.items():
        raise InputError(f"watch folder {path} {problem}.")
    config = Config(tuple(f for f, _ in folders), **settings, missing=frozenset(missing))
    _check_second_stage(config)
    _keep_apart("database", Path(os.path.realpath(config.database)).parent, config)
    _check_webhook(config)
    if config.failed_folder:
        return _failing_to(config.failed_folder, config, until, may_miss)
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {file}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"config {file} is not valid TOML: {error}.") from error


def _typed(where: str, name: str, value: Any) -> Any:
    kind = _KEYS[name]
    if name in ("webhook", "command"):
        return _web_address(where, value) if name == "webhook" else _command(where, value)
    if name in _PATHS:
        if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
            raise InputError(f"{where}: {name} must be a path, not {value!r}.")
        return Path(value).absolute()
    if name == "provider":
        if value not in get_args(Provider):
            raise InputError(f"{where}: provider must be one of auto, cpu, cuda.")
        return value
    if name == "metrics":
        return _host_and_port(where, value)
    wrong_kind = isinstance(value, bool) or (kind is int and isinstance(value, float))
    if wrong_kind or not isinstance(value, int | float):
        number = "a whole number" if kind is int else "a number"
        raise InputError(f"{where}: {name} must be {number}, not {value!r}.")
    least, most = _MINIMUM[name], _MAXIMUM.get(name.rpartition("_")[2], math.inf)
    if not least <= value <= most or value == math.inf:
        upwards = "finite" if most == math.inf else f"at most {most:g}"
        raise InputError(f"{where}: {name} must be at least {least} and {upwards}.")
    return value


def _host_and_port(where: str, value: Any) -> str:
    """HOST:PORT as given; the host may be in brackets, or left out. '' is for nobody."""
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    is_port = port.isascii() and port.isdigit() and int(port) < 2**16
    if value != "" and ("/" in host or not is_port):
        raise InputError(f'{where}: metrics must be HOST:PORT such as "127.0.0.1:9465".')
    return str(value)


def _web_address(where: str, value: Any) -> str:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        parts.port  # noqa: B018  raises where it is no number
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise InputError(f"{where}: webhook: {error}.") from error
    plain = value and str(value).isascii() and str(value).isprintable() and " " not in value
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise InputError(
            f'{where}: webhook must be an address such as "https://example.org/matches".'
        )
    if parts.username is not None:
        raise InputError(
            f"{where}: webhook: a password does not belong in an address; write an "
            "Authorization header into a file and name that as webhook_header_file."
        )
    return str(value)


def _command(where: str, value: Any) -> tuple[str, ...]:
    good = isinstance(value, list | tuple) and value
    if not good or not all(isinstance(w, str) and "\0" not in w for w in value):
        raise InputError(
            f'{where}: command must be a list such as ["/usr/bin/tell", "-q"].'
        )
    if not os.path.isabs(value[0]):
        raise InputError(f"{where}: command: write {value[0]!r} with its whole path.")
    return tuple(value)


def _check_webhook(config: Config) -> None:
    if config.webhook_header_file and not config.webhook:
        raise InputError("webhook_header_file is set, but no webhook.")
    parts = urlsplit(config.webhook)
    loopback = parts.hostname in _LOOPBACK
    if config.webhook_header_file and parts.scheme == "http" and not loopback:
        raise InputError(
            f"webhook {parts.hostname}: a secret header would travel over http for all to "
            "read; use https."
        )


def _folder(
    where: str, base: Path, table: Mapping[str, Any], until: float
) -> tuple[Folder, str]:
    """The folder of a table, and what is wrong with it; '' for one that does not answer."""
    for key in sorted(set(table) - _FOLDER_KEYS):
        hint = f"known are {', '.join(sorted(_FOLDER_KEYS))}"
        if key in _KEYS:
            hint = "it belongs above the first of these tables"
        raise InputError(f"{where}: unknown key {key!r} in [[watch]]; {hint}.")
    if not isinstance(table.get("path"), str | Path) or not str(table["path"]):
        raise InputError(f"{where}: a [[watch]] table needs a path.")
    if "\0" in str(table["path"]):
        raise InputError(f"{where}: the path of a [[watch]] table has a NUL in it.")
    path = base / table["path"]
    known = [path.absolute()]
    problem = _within(until, lambda: _about_folder(path, known))
    if problem in ("", MISSING, SHUT):
        known.append(Path(os.path.realpath(path)))
    elif problem:
        raise InputError(f"watch folder {path} {problem}.")
    recursive = table.get("recursive", True)
    if not isinstance(recursive, bool):
        raise InputError(f"{where}: recursive must be true or false.")
    patterns = _patterns(where, table)
    mode, poll_seconds = table.get("mode", "events"), table.get("poll_seconds", 10.0)
    if mode not in ("events", "poll"):
        raise InputError(f'{where}: mode must be "events" or "poll".')
    is_number = isinstance(poll_seconds, int | float) and not isinstance(poll_seconds, bool)
    if not is_number or not 0.1 <= poll_seconds <= _MAXIMUM["seconds"]:
        raise InputError(f"{where}: poll_seconds must be a number of at least 0.1.")
    folder = Folder(known[-1], recursive, **patterns, mode=mode, poll_seconds=poll_seconds)
    return folder, problem or ""


def _patterns(where: str, table: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    patterns = {}
    for name, default in (("include", PATTERNS), ("exclude", EXCLUDED)):
        value = table.get(name, default)
        if not isinstance(value, list | tuple) or not all(
            isinstance(pattern, str) for pattern in value
        ):
            raise InputError(f"{where}: {name} must be a list of file name patterns.")
        value = [pattern.rstrip("/") for pattern in value]  # as one writes a folder
        for pattern in value:
            if "/" in pattern and "[" not in pattern:
                raise InputError(
                    f"{where}: {name}: {pattern!r} fits nothing, as patterns are for names "
                    "alone, of files and of folders: leave the '/' out."
                )
        patterns[name] = tuple(value)
    for pattern in patterns["include"]:
        ending = pattern.lower().removeprefix(".")
        if f"*.{ending}" in PATTERNS:
            raise InputError(
                f"{where}: include: {pattern!r} fits no file but one of just that name; "
                f'write "*.{ending}".'
            )
    return patterns


def _about_folder(path: Path, known: list[Path]) -> str:
    """What is wrong with a folder, '' if nothing; `known` gets its path as its links are
    resolved, so that the same name comes out whether or not it answers."""
    for step in resolving(path.absolute()):
        known.append(step)
    if not os.path.isdir(path):  # unlike Path, never raises
        return MISSING
    if not os.access(path, os.R_OK | os.X_OK):
        return SHUT
    return ""


def resolving(path: Path) -> Iterator[Path]:
    """An absolute path with more and more of its links resolved, each before it is asked
    about what it names: of a path into a mount that hangs, the last that can be known."""
    done, rest = Path("/"), list(path.parts[1:])
    for _ in range(_MOST_STEPS):  # links may go in circles
        if not rest:
            return
        here = done / rest.pop(0)
        yield here.joinpath(*rest)
        if here.name == "..":
            done = done.parent
        elif os.path.islink(here):
            target = Path(os.readlink(here))
            done = Path("/") if target.is_absolute() else done
            rest = [*target.parts[target.is_absolute() :], *rest]
        else:
            done = here


def _within(until: float, ask: Callable[[], str]) -> str | None:
    return answer_within(max(_LEAST_S, until - time.monotonic()), ask)


def _check_second_stage(config: Config) -> None:
    if bool(config.describe) != bool(config.index):
        raise InputError("descriptor and index go together: give --describe and --index.")
    if config.gate_threshold is not None and not config.index:
        raise InputError("gate_threshold is for use with a descriptor and an index.")
    if (config.gate_threshold or 0) > 1:
        raise InputError("gate_threshold must be at most 1.")


def _failing_to(failed: Path, config: Config, until: float, may_miss: bool) -> Config:
    """Check where failed files go; one that does not answer passes."""
    known = [failed]

    def ask() -> str:
        for step in resolving(failed):
            known.append(step)
        return "" if os.path.isdir(failed) else MISSING

    problem = _within(until, ask)
    _keep_apart("failed_folder", known[-1], config)
    if problem and not may_miss:
        raise InputError(f"failed_folder {failed} {problem}.")
    if problem:
        return replace(config, missing=config.missing | {failed})
    for place in (failed, *(folder.path for folder in config.folders)):
        if place not in config.missing and _within(until, partial(_unwritable, place)):
            raise InputError(f"failed_folder is set, but {place} is not writable.")
    return config


def _unwritable(place: Path) -> str:
    return "" if os.access(place, os.W_OK) else "not writable"


def _keep_apart(name: str, home: Path, config: Config) -> None:
    """Refuse a place inside a watch folder for what the service itself writes."""
    for folder in config.folders:
        inside = folder.recursive and folder.path in home.parents
        if home == folder.path or inside:
            raise InputError(
                f"the {name} {getattr(config, name)} lies in the watch folder "
                f"{folder.path}; keep it elsewhere."
            )
