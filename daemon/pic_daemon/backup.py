"""A copy of the match log while the service writes, whole and checked."""

import glob
import os
import sqlite3
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

from pic_daemon.errors import InputError
from pic_daemon.schema import check, open_read_only

_DAY_S = 86_400.0


def back_up(database: Path, output: Path) -> int:
    """Write a copy of the log to `output`; returns how many rows of images it holds.

    The copy is one state of the log, a single file that only its owner may read. It is
    checked before it takes its name, so that an earlier copy there is replaced by a good
    one or not at all. Raises InputError where that cannot be, and sqlite3.Error or
    OSError where reading, checking or writing fails.
    """
    check(database, for_writing=False)
    output = Path(os.path.realpath(output))  # what a link names, not the link
    _check_output(database, output)
    _remove_halves(output)
    handle, name = tempfile.mkstemp(".part", f".{output.name}.", output.parent)  # 0600
    os.close(handle)
    copy = Path(name)
    try:
        rows = _copy(database, copy)
        _to_disk(copy)
        copy.replace(output)
        _to_disk(output.parent)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{copy}{suffix}")
    return rows


def _remove_halves(output: Path) -> None:
    """Take away what a backup left behind that was killed, as large as the log."""
    for half in output.parent.glob(f".{glob.escape(output.name)}.*.part*"):
        with suppress(OSError):
            if time.time() - half.stat().st_mtime > _DAY_S:  # else one under way
                half.unlink()


def _check_output(database: Path, output: Path) -> None:
    if not os.path.isdir(output.parent):
        raise InputError(f"--output {output}: its folder does not exist; create it.")
    if not os.path.exists(output):
        return
    if os.path.samefile(database, output):
        raise InputError(f"--output {output} is the database itself; name another file.")
    if os.path.isdir(output):
        raise InputError(f"--output {output} is a folder; name a file in it.")
    check(output, for_writing=False)  # only an earlier copy is replaced
    wal = f"{output}-wal"
    with suppress(FileNotFoundError, sqlite3.Error):
        if not os.stat(wal).st_size:
            # Left behind where the copy was asked as a log; the last to close one that may
            # write takes it away.
            with closing(sqlite3.connect(output)) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if os.path.exists(wal):  # would be taken for part of the new copy
        raise InputError(f"--output {output} is in use ({wal} exists).")


def _copy(database: Path, copy: Path) -> int:
    # All pages in one step: a copy in several would begin anew with every commit of the
    # service. Reading holds up no writer.
    with closing(open_read_only(database)) as log, closing(sqlite3.connect(copy)) as target:
        assert log.conn
        log.conn.backup(target, pages=-1)
        target.execute("PRAGMA journal_mode = DELETE")  # one file, no -wal beside it
        found = [row[0] for row in target.execute("PRAGMA integrity_check")]
        if found != ["ok"]:
            raise sqlite3.DatabaseError(f"the copy is damaged: {found[0]}")
        return int(target.execute("SELECT count(*) FROM images").fetchone()[0])


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
