"""How many inotify watches this user has left, and how many a folder needs."""

import os
from collections.abc import Callable
from pathlib import Path

from pic_daemon.folders import Folder


def watches_left() -> int | None:
    """Watches this user may still add, or None where there is no inotify.

    Counts those of the user's processes that this process may look into
    (proc(5), fdinfo).
    """
    try:
        limit = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    except OSError:
        return None
    return max(0, limit - sum(map(_watches_of, Path("/proc").glob("[0-9]*"))))


def watches_needed(folder: Folder, progress: Callable[[], None] = lambda: None) -> int:
    """One watch for the folder and, if recursive, one for every folder below it.

    `progress` is called at each.
    """
    if not folder.recursive:
        return 1
    count = 0
    for _ in os.walk(folder.path):
        progress()
        count += 1
    return count


def _watches_of(process: Path) -> int:
    count = 0
    try:
        if process.stat().st_uid != os.getuid():
            return 0
        for descriptor in (process / "fd").iterdir():
            if os.readlink(descriptor) == "anon_inode:inotify":
                info = process / "fdinfo" / descriptor.name
                count += info.read_text().count("inotify wd:")
    except OSError:
        pass  # the process ended, or is not ours to look into
    return count
