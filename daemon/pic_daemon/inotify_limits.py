"""How much of inotify this user has left, and how many watches a folder needs.

What is left is the system's limit less what those of the user's processes hold that this
process may look into (proc(5), fdinfo).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from pic_daemon.folders import Folder


def watches_left(besides: Sequence[Folder] = ()) -> int | None:
    """Watches this user may still add, or None where there is no inotify.

    What watches one of the folders `besides` is not counted as taken.
    """
    return _left("max_user_watches", lambda info: info.count("inotify wd:"), besides)


def instances_left(besides: Sequence[Folder] = ()) -> int | None:
    """The same for instances, of which each folder that is watched takes one."""
    return _left("max_user_instances", lambda _: 1, besides)


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


def _left(limit: str, held: Callable[[str], int], besides: Sequence[Folder]) -> int | None:
    try:
        most = int(Path("/proc/sys/fs/inotify", limit).read_text())
    except OSError:
        return None
    free = [f"ino:{os.stat(folder.path).st_ino:x} " for folder in besides]
    infos = chain.from_iterable(map(_inotify_of, Path("/proc").glob("[0-9]*")))
    taken = (info for info in infos if not any(inode in info for inode in free))
    return max(0, most - sum(map(held, taken)))


def _inotify_of(process: Path) -> Iterator[str]:
    """What the kernel says of each inotify instance of a process."""
    try:
        if process.stat().st_uid != os.getuid():
            return
        descriptors = os.listdir(process / "fd")
    except OSError:
        return  # the process ended, or is not ours to look into
    for descriptor in descriptors:
        with suppress(OSError):  # it is closed by now
            if os.readlink(process / "fd" / descriptor) == "anon_inode:inotify":
                yield (process / "fdinfo" / descriptor).read_text()
