"""The cores that this process may run on: fewer than the machine has where a unit's
CPUAffinity=, a container or taskset binds it to some."""

import os


def cores() -> int:
    """How many these are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # a system that binds no process to cores
        return os.cpu_count() or 1


def are_bound() -> bool:
    """Whether they are fewer than the machine has."""
    return cores() < (os.cpu_count() or 1)
