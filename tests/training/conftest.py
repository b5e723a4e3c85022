"""What tests of several modules train on."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN
from pictures import write_products
from small_run import EVERY_CORE, options

from pic_training.cli import _config
from pic_training.run_folder import RunConfig

Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Make a folder of this name once, for all of pytest-xdist's workers."""
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, half = home / name, home / f"{name}.half"
        with (home / f"{name}.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(half, ignore_errors=True)
                make(half)
                half.rename(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def folders(shared: Shared) -> Path:
    """Drawn pictures in catalog/ and others/, which no test alters."""

    def draw(home: Path) -> None:
        write_products(home / "catalog", range(6))
        write_products(home / "others", range(100, 130))

    return shared("folders", draw)


@pytest.fixture(scope="session")
def config_of(folders: Path) -> Callable[..., RunConfig]:
    """The settings of a small run on the drawn pictures, some of them changed."""

    def make(**changes: Any) -> RunConfig:
        given: dict[str, Any] = {
            "catalog": folders / "catalog", "others": folders / "others", "arch": None,
            "others_val": None, "corrections": None, "task": "classify", "epochs": 1,
            "train_images": 640, "val_images": 256, "batch_size": 32, "lr": None,
            "head_start": 0, "stages": None, "seed": 0, "device": "cpu", "weights": None,
            "precision": "fp32", "target_fpr": 0.05, "dimensions": None, "naming": None,
            "least_area": 0.5,
        }  # fmt: skip
        return _config(**given | changes)

    return make


@pytest.fixture(scope="session")
def finished(folders: Path, shared: Shared) -> Path:
    """A run folder that no test alters."""

    def train(out: Path) -> None:
        command = [str(BIN / "pic-train"), *options(folders, out)]
        subprocess.run(
            command, check=True, capture_output=True, timeout=300, env=EVERY_CORE
        )

    return shared("run", train)


@pytest.fixture(scope="session")
def exported(finished: Path, shared: Shared) -> Path:
    """Its model, alone in a folder."""

    def export(folder: Path) -> None:
        command = [BIN / "pic-export", finished, "--output", folder / "model.onnx"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "256 real samples score as in PyTorch" in result.stdout

    return shared("exported", export) / "model.onnx"
