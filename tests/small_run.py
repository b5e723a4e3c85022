"""A training run as small as one can be."""

import os
from pathlib import Path

EVERY_CORE = {
    name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"
}
"""The environment in which PyTorch takes every core, as a user's does."""


def options(folders: Path, out: Path, **changes: object) -> list[str]:
    """What pic-train is told, some of it changed."""
    given: dict[str, object] = {
        "catalog": folders / "catalog", "others": folders / "others", "out": out,
        "epochs": 2, "train-images": 192, "val-images": 256, "device": "cpu",
        "workers": 1, "target-fpr": 0.05, **changes,
    }  # fmt: skip
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)]
