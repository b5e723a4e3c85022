"""How near training comes to the speed of its own steps.

    python bench/training_speed.py --catalog DIR --others DIR [--device cuda]

Alternates between PyTorch's own loop of forward, backward and update on one batch that
lies on the device already, the same by pic-train's step (the limit), and steps on samples
as pic-train draws them, and prints all as images/s, one line a round.
"""

import os
import tempfile
import time
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

import click

from pic_training.process import prepare_for_training

prepare_for_training()

import torch  # noqa: E402

from pic_training.cli import _config  # noqa: E402
from pic_training.device_samples import DeviceSamples, Pool  # noqa: E402
from pic_training.distributed import ALONE  # noqa: E402
from pic_training.learner import Learner  # noqa: E402
from pic_training.networks import ARCHITECTURES  # noqa: E402
from pic_training.preparation import samples_of  # noqa: E402
from pic_training.samples import Batch  # noqa: E402
from pic_training.sources import gather, working_side  # noqa: E402

FOLDER = click.Path(path_type=Path, exists=True)


@click.command()
@click.option("--catalog", required=True, type=FOLDER)
@click.option("--others", required=True, type=FOLDER)
@click.option("--arch", type=click.Choice([*ARCHITECTURES]), default="cnn")
@click.option("--weights", default="none")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--batch-size", type=int)
@click.option("--steps", type=int, default=200, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
def main(catalog: Path, others: Path, steps: int, rounds: int, **options: Any) -> None:
    config = _config(
        catalog=catalog, others=others, others_val=None, epochs=1, train_images=185_000,
        corrections=None, val_images=30_000, lr=None, target_fpr=0.001, head_start=0,
        stages=None, seed=0, precision="auto", task="classify", dimensions=None,
        naming=None, least_area=0.5, **options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        size = config.architecture.size
        sources = gather(catalog, others, None, Path(scratch) / "sources.rgb", size)
        samples = samples_of(config, sources, "train")
        learner = Learner(config, ALONE, len(sources.of("catalog", "train")))
        learner.network.train()
        if config.device == "cuda":
            made = DeviceSamples(samples, Pool(samples, working_side(size), learner.device))
            epochs = (made.load(n, config.batch_size) for n in count())
        else:
            workers = os.cpu_count() or 1
            epochs = (samples.load(n, config.batch_size, workers) for n in count())
        drawn = chain.from_iterable(epochs)
        images, labels = next(drawn)
        fixed = images.to(learner.device), labels.to(learner.device)

        def step(batch: Batch) -> None:
            learner.step(batch, config.batch_size, 0.0)

        started = time.monotonic()
        for _ in range(5):  # the GPU's is recorded after three
            step(fixed)
        wait(learner)
        print(f"first steps, with compiling: {time.monotonic() - started:.1f} s")
        for _ in range(rounds):
            loop = rate(learner, steps, config.batch_size, lambda: learner.learn(*fixed))
            limit = rate(learner, steps, config.batch_size, lambda: step(fixed))
            real = rate(learner, steps, config.batch_size, lambda: step(next(drawn)))
            print(
                f"plain loop {loop:.0f} images/s, bare steps {limit:.0f}, training "
                f"{real:.0f}: {real / limit:.0%} of bare steps, {real / loop:.2f} loops"
            )
    print(f"{config.arch}, batch {config.batch_size}, {config.precision}, torch "
          f"{torch.__version__}, {name_of(config.device)}")  # fmt: skip


def rate(learner: Learner, steps: int, batch_size: int, once: Callable[[], None]) -> float:
    wait(learner)
    started = time.monotonic()
    for _ in range(steps):
        once()
    wait(learner)
    return steps * batch_size / (time.monotonic() - started)


def wait(learner: Learner) -> None:
    learner.take_totals()  # reading a total waits for every step before it


def name_of(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
