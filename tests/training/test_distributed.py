"""Two processes under torchrun, with gloo, against one."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN
from small_run import options


def train(
    folders: Path, out: Path, processes: int, **changes: object
) -> subprocess.CompletedProcess[str]:
    start = [BIN / "torchrun", "--standalone", "--nproc-per-node", processes, "--no-python"]
    command = [*(start if processes > 1 else []), BIN / "pic-train"]
    given = {"arch": "cnn", "precision": "fp32", "train-images": 137, **changes}
    command += options(folders, out, **given)
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("naming", [0, 1])
def test_two_processes_come_to_the_result_of_one(
    folders: Path, tmp_path: Path, naming: int
) -> None:
    runs = {processes: tmp_path / str(processes) for processes in (1, 2)}
    printed = {}
    for processes, out in runs.items():
        result = train(folders, out, processes, naming=naming)
        assert result.returncode == 0, result.stderr
        printed[processes] = result.stdout
    assert printed[2].count("epoch 2/2") == printed[1].count("epoch 2/2") == 1
    one, two = (json.loads((out / "metrics.json").read_text()) for out in runs.values())
    for alone, shared in zip(one, two, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert shared[name] == pytest.approx(alone[name], abs=2e-3), name
    logits = [np.load(out / "validation.npz")["scores"] for out in runs.values()]
    assert np.abs(logits[0] - logits[1]).max() < 1e-2
    files = [{p.name for p in out.iterdir()} for out in runs.values()]
    assert files[0] == files[1]


def test_two_processes_train_the_default_network(folders: Path, tmp_path: Path) -> None:
    result = train(folders, tmp_path / "run", 2, arch="resnet8")
    assert result.returncode == 0, result.stderr
    history = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [metrics["epoch"] for metrics in history] == [1, 2]
    assert all(0 < metrics["train_loss"] < 20 for metrics in history)


def test_batches_that_the_processes_cannot_share_are_refused(
    folders: Path, tmp_path: Path
) -> None:
    sizes = {"train-images": 65, "batch-size": 64}  # leaves one sample for the last batch
    result = train(folders, tmp_path / "run", 2, **sizes)
    assert result.returncode != 0
    assert "2 processes cannot share a batch of 1" in result.stderr
    assert not (tmp_path / "run").exists()
