"""One training step, on whatever device and in however many processes."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pic_training.distributed import Processes
from pic_training.networks import Naming
from pic_training.recorded_steps import RecordedSteps
from pic_training.run_folder import RunConfig, fill, new_network
from pic_training.samples import Batch
from pic_training.tasks import task_of


class Learner:
    """A network and its optimizer. Totals stay on the device until they are asked for.

    `items` is the number of pictures in the catalog, near-duplicates counted once.
    """

    def __init__(self, config: RunConfig, processes: Processes, items: int) -> None:
        architecture = config.architecture
        self.config = config
        self.task = task_of(config)
        self.device = torch.device(config.device)
        network = new_network(config, config.weights, items)
        if architecture.stages:
            network.freeze(architecture.stages[: len(architecture.stages) - config.stages])
        if config.weights != "none":
            # Each batch's own would undo the head's start (bench/results/).
            network.keep_statistics()
        self.network = network.to(self.device).to(memory_format=torch.channels_last)
        self.naming = Naming(network, items).to(self.device) if config.naming else None
        learning = self.naming or self.network
        trained = [p for p in learning.parameters() if p.requires_grad]
        self.optimizer = self.task.optimizer(config, trained)
        # On the device, where a recorded step reads it.
        self._rate = torch.tensor(config.lr, device=self.device)
        self.processes = processes
        self._forward: nn.Module = learning
        if processes.count > 1:
            self._forward = DistributedDataParallel(learning)
        self._compiled = self._forward
        self.recorded: RecordedSteps | None = None
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.suppress_errors = True  # slower, but it trains
            self._compiled = torch.compile(self._forward)  # type: ignore[assignment]
            if processes.count == 1 and config.task == "classify":
                self.recorded = RecordedSteps(self.learn, config.batch_size)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.float64, device=self.device)

    def step(self, batch: Batch, of: int, share: float) -> None:
        """Learn from this process's share of a batch of `of` samples.

        `share` of the whole training is done, which sets the learning rate: it falls
        from `lr` to zero along a half cosine (Loshchilov and Hutter 2017).
        """
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        self._rate.fill_(self.config.lr * (1 + math.cos(math.pi * share)) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        if self.recorded:
            self.recorded(images, labels)
        else:
            self.learn(images, labels, of)

    def learn(
        self, images: torch.Tensor, labels: torch.Tensor, of: int | None = None
    ) -> None:
        """The step itself; without `of`, of a batch that no other process shares."""
        of = of or len(labels)
        # An epoch's last batch is not worth the time that compiling for its size takes.
        forward = self._compiled if of == self.config.batch_size else self._forward
        self.optimizer.zero_grad()
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            made = forward(images)
        outputs = made[0] if self.naming else made
        loss, correct = self.task.loss(outputs.float(), labels)
        self.loss_sum += loss.detach()
        if self.naming:
            loss = loss + self.config.naming * self.naming.loss(made[1], labels)
        # Gradients are averaged over the processes, whose shares may differ by one.
        loss = loss * (self.processes.count / of)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.correct += correct

    def take_totals(self) -> tuple[float, float]:
        """Losses in nats summed, and right answers, of all processes since last asked."""
        totals = self.loss_sum, self.correct
        self.processes.add_up(*totals)
        loss, correct = (float(total) for total in totals)
        for total in totals:
            total.zero_()
        return loss, correct

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on from here."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.naming:
            state["names"] = self.naming.names.state_dict()
        return state

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from the state in the checkpoint at `path`."""
        fill(self.network, state["network"], path)
        if self.naming:
            self.naming.names.load_state_dict(state["names"])
        self.optimizer.load_state_dict(state["optimizer"])
