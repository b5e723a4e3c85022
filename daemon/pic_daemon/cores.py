"""The cores that this process may use: fewer than the machine has where a unit's
CPUAffinity= or CPUQuota=, a container or taskset allows it no more."""

import math
import os
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """How many these are; of a quota's part of one, one."""
    bound = len(os.sched_getaffinity(0))
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    return min(bound, quota_of(groups, _GROUPS) or bound)


def are_limited() -> bool:
    """Whether they are fewer than the machine has."""
    return cores() < (os.cpu_count() or 1)


def quota_of(groups: str, root: Path) -> int | None:
    """Cores that the control group's quota, or that of one above it, comes to.

    `groups` is what /proc/self/cgroup says, `root` where version 2 is mounted; in a
    container that may be the group itself (kernel.org, admin-guide/cgroup-v2, cpu.max).
    None where there is no quota.
    """
    own = [line[len("0::/") :] for line in groups.splitlines() if line.startswith("0::/")]
    paths = {root}
    for name in own:
        paths |= {
            root / above for above in (PurePosixPath(name), *PurePosixPath(name).parents)
        }
    found = []
    for path in paths:
        try:
            quota, period = (path / "cpu.max").read_text().split()
            found.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # none here, or "max"
            continue
    return max(1, min(found)) if found else None
