"""What the published figure asks for, as one reads what its text leaves open.

    python bench/readings.py RUN [--again DIR]

It does not say how strongly samples were altered, nor whether its validation held other
pictures than its training or other copies of the same. RUN is a finished run folder of
pic-train whose catalog and others are still in their places: its network is asked about
each. `--again` first repeats that run in DIR with mild alterations and decoys as they
are, or goes on with such a run there, and asks that network.
"""

import os
from dataclasses import replace
from pathlib import Path

import click

from pic_training.process import prepare_for_training

prepare_for_training()

from training import asked, calibrated, gathered  # noqa: E402

from pic_training.augmentation import Augmentation  # noqa: E402
from pic_training.run_folder import load_network  # noqa: E402
from pic_training.sources import Split  # noqa: E402
from pic_training.training import run_training  # noqa: E402

MILD = Augmentation(
    crop_area=(0.9, 1.0), crop_aspect=1.05, side=(128, 256), quality=(50, 95), variety=False
)
ALTERATIONS = {
    "as pic-train's": Augmentation(variety=False),
    "mild": MILD,
    "none": Augmentation(probability=0, variety=False),
}
PICTURES: dict[Split, str] = {"train": "trained on", "val": "decoys never seen"}


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--again", type=click.Path(path_type=Path))
def main(run: Path, again: Path | None) -> None:
    if again:
        config = replace(load_network(run)[0], augmentation=MILD, least_area=0.9)
        run_training(
            config, again, os.cpu_count() or 1, resume=(again / "last.pt").exists()
        )
    config, network = load_network(again or run)
    with gathered(config, again or run) as sources:
        calibration = calibrated(config, again or run, sources)
        for alterations, augmentation in ALTERATIONS.items():
            for split, pictures in PICTURES.items():
                answer = asked(config, network, calibration, sources, split, augmentation)
                print(f"{alterations}, {pictures}: {answer}", flush=True)


if __name__ == "__main__":
    main()
