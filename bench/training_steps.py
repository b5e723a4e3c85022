"""How fast training steps are on a GPU: recorded or one kernel at a time, compiled or not.

    python bench/training_steps.py cnn:32 cnn:128 resnet8:64 resnet50:64

Each argument is an architecture and a batch size. Images are random and lie on the GPU
already; what drawing samples adds, bench/training_speed.py shows. Prints a line each for
compiled and uncompiled networks, milliseconds a step being the lesser of two rounds.
"""

import time
from collections.abc import Callable
from pathlib import Path

import click

from pic_training.process import prepare_for_training

prepare_for_training()

import torch  # noqa: E402

from pic_training.cli import _config  # noqa: E402
from pic_training.distributed import ALONE  # noqa: E402
from pic_training.learner import Learner  # noqa: E402


@click.command()
@click.argument("networks", nargs=-1, required=True)
@click.option("--steps", default=500, show_default=True)
def main(networks: tuple[str, ...], steps: int) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for network in networks:
        arch, _, batch = network.partition(":")
        for compiled in (True, False):
            measure(arch, int(batch), compiled, steps)


def measure(arch: str, batch: int, compiled: bool, steps: int) -> None:
    torch._dynamo.reset()
    nowhere = Path("-")
    config = _config(
        catalog=nowhere, others=nowhere, others_val=None, corrections=None, epochs=1,
        train_images=185_000, val_images=30_000, batch_size=batch, lr=1e-4, head_start=0,
        stages=None, seed=0, precision="bf16", target_fpr=0.001, arch=arch, device="cuda",
        task="classify", dimensions=None, weights="none", naming=None,
        least_area=0.5,
    )  # fmt: skip
    learner = Learner(config, ALONE, items=1000)
    learner.network.train()
    if not compiled:
        learner._compiled = learner._forward
    size = config.architecture.size
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).cuda()
    number = torch.arange(batch).cuda()
    labels = number % 2 * (number + 1)
    begun = time.perf_counter()
    for _ in range(5):  # recorded after three
        learner.step((images, labels), batch, 0.0)
    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    recorded = step_ms(lambda: learner.step((images, labels), batch, 0.0), steps)
    plain = step_ms(lambda: learner.learn(images, labels), max(steps // 3, 3))
    print(
        f"{arch} batch {batch} {'compiled' if compiled else 'as it is'}: first five "
        f"{first:.1f} s; recorded {recorded:.3f} ms, {1000 * batch / recorded:,.0f} "
        f"images/s; one by one {plain:.3f} ms, {1000 * batch / plain:,.0f}"
    )


def step_ms(step: Callable[[], None], steps: int) -> float:
    rounds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        rounds.append(time.perf_counter() - begun)
    return 1000 * min(rounds) / steps


if __name__ == "__main__":
    main()
