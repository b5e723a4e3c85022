"""What tests of several modules train on."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN
from pictures import write_products
from small_run import options

from pic_training.cli import _config
from pic_training.run_folder import RunConfig


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures in catalog/ and others/; run folders of the tests lie beside them."""
    home = tmp_path_factory.mktemp("folders")
    write_products(home / "catalog", range(6))
    write_products(home / "others", range(100, 130))
    return home


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
def finished(folders: Path) -> Path:
    """A run folder that no test alters."""
    out = folders / "run"
    command = [str(BIN / "pic-train"), *options(folders, out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


@pytest.fixture(scope="session")
def exported(finished: Path) -> Path:
    """Its model, alone in a folder."""
    output = finished.with_name("exported") / "model.onnx"
    command = [BIN / "pic-export", finished, "--output", output]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "256 real samples score as in PyTorch" in result.stdout
    return output
