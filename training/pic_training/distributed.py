"""Several processes that train one network, as torchrun starts them.

Each takes its share of every batch; DistributedDataParallel averages the gradients.
The first one alone reads folders, validates and writes files.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed

from pic_daemon.errors import InputError
from pic_training.process import told_by_torchrun

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reads and writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all; so with its InputError."""
        if self.count == 1:
            return make()
        made: list[T | InputError | None] = [None]
        if self.is_first:
            try:
                made = [make()]
            except InputError as error:
                made = [error]
        distributed.broadcast_object_list(made)
        if isinstance(made[0], InputError):
            raise made[0]
        return cast(T, made[0])

    def add_up(self, *totals: torch.Tensor) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for total in totals:
                distributed.all_reduce(total)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set in any process. All must ask at the same point."""
        total = torch.tensor(float(flag), device=device)
        self.add_up(total)
        return bool(total)


ALONE = Processes()


def join(device: str) -> Processes:
    """Join the processes that torchrun started; alone where it did not start this one."""
    count = told_by_torchrun("WORLD_SIZE", 1)
    if count == 1:
        return ALONE
    told = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    told += ["LOCAL_RANK"] if device == "cuda" else []
    if missing := [name for name in told if name not in os.environ]:
        raise InputError(
            f"the environment says WORLD_SIZE={count}, but not {', '.join(missing)}: unset "
            "it to train in one process, or start pic-train with torchrun."
        )
    if device == "cuda":
        local = told_by_torchrun("LOCAL_RANK", 0)
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started more processes than there are GPUs "
                f"({torch.cuda.device_count()}): lower --nproc-per-node."
            )
        torch.cuda.set_device(local)
    if not distributed.is_initialized():
        # The others wait while the first reads folders, which may take hours.
        backend = "nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))
    return Processes(distributed.get_rank(), count)
