"""pic-train --task describe and pic-export as a user runs them, on a small scale."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_run
import torch
from conftest import BIN

from pic_daemon.descriptor import load_descriptor
from pic_daemon.images import to_pixels
from pic_training.augmentation import Augmentation
from pic_training.feature_samples import FeatureSamples, unaltered
from pic_training.samples import SampleSet
from pic_training.sources import gather

Run = Callable[..., subprocess.CompletedProcess[str]]


def options(folders: Path, out: Path, **changes: object) -> list[str]:
    describe = {"task": "describe", "dimensions": 32, "batch-size": 48, "precision": "fp32"}
    return small_run.options(folders, out, **describe | changes)


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that no test alters."""
    out = tmp_path_factory.mktemp("describing") / "run"
    command = [str(BIN / "pic-train"), *options(folders, out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


def test_two_copies_of_each_picture_follow_each_other(
    folders: Path, tmp_path: Path
) -> None:
    sources = gather(
        folders / "catalog", folders / "others", None, tmp_path / "sources.rgb", 128
    )
    samples = SampleSet(sources, "train", 24, 32, 0, Augmentation(), copies=2)
    images, labels = next(samples.load(0, 24, workers=0))
    assert torch.equal(labels[0::2], labels[1::2])
    assert not torch.equal(images[0::2], images[1::2])
    kinds = [sources.pictures[n].kind for n in labels[0::2].tolist()]
    assert kinds == ["other", "catalog"] * 6
    assert labels.tolist() == samples.sources_drawn().tolist()


def test_kept_features_are_shuffled_with_their_copies_together(
    folders: Path, tmp_path: Path
) -> None:
    sources = gather(
        folders / "catalog", folders / "others", None, tmp_path / "sources.rgb", 128
    )
    samples = SampleSet(sources, "train", 20, 32, 0, Augmentation(), copies=2)
    kept = FeatureSamples(samples, torch.arange(20.0)[:, None], torch.arange(20) // 2)
    first, second = (list(kept.load(epoch, 8)) for epoch in (0, 1))
    for batches in (first, second):
        assert sorted(torch.cat([f for f, _ in batches]).flatten().tolist()) == [
            float(n) for n in range(20)
        ]
        assert all(torch.equal(labels[0::2], labels[1::2]) for _, labels in batches)
    assert not torch.equal(first[0][0], second[0][0])
    assert torch.equal(next(kept.load(0, 8, first=1))[0], first[1][0])


def test_the_report_says_how_often_the_right_item_is_nearest(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    best = metrics[report["best_epoch"] - 1]
    assert report["top_1"]["value"] == pytest.approx(best["val_accuracy"])
    assert report["top_1"]["of"] == 128  # the catalog's half of the 256
    for name in ("top_1", "recall", "false_positive_rate"):
        share = report[name]
        assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1
    assert -1 <= report["threshold"] <= 1
    assert "temperature" not in report
    assert (finished / "TrainingLossAccuracyPlot.png").stat().st_size > 1000


def test_the_descriptor_finds_the_picture_that_a_copy_was_made_of(
    finished: Path, folders: Path, run_tool: Run, tmp_path: Path
) -> None:
    output = tmp_path / "describe.onnx"
    result = run_tool("pic-export", finished, "--output", output)
    assert result.returncode == 0, result.stderr
    assert "256 real samples are described as in PyTorch" in result.stdout
    descriptor = load_descriptor(output, "cpu")
    info, report = descriptor.info, json.loads((finished / "report.json").read_text())
    assert (info.architecture, info.input_size, info.dimensions) == ("cnn", 64, 32)
    assert (info.catalog_size, info.catalog_digest) == (6, report["catalog_digest"])

    sources = gather(
        folders / "catalog", folders / "others", None, tmp_path / "sources.rgb", 256
    )
    pixels, _ = next(unaltered(sources, 64, batch_size=6))
    originals = descriptor.describe(pixels.numpy())
    with np.load(finished / "validation.npz") as stored:
        scores, right, labels = stored["scores"], stored["right"], stored["labels"]
    copies = descriptor.describe(np.load(finished / "parity.npy"))
    cosines = (copies @ originals.T).max(1)
    assert np.abs(cosines - scores[:256]).max() < 1e-4
    assert right[labels > 0.5].mean() > 1 / 2  # by chance 1 / 6


def test_a_frozen_trunk_is_asked_once_and_stays_as_it_was(
    run_tool: Run, folders: Path, tmp_path: Path
) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    state = resnet50().state_dict()
    torch.save(state, tmp_path / "trunk.pth")
    changes = {"arch": "resnet50", "weights": tmp_path / "trunk.pth", "train-images": 24,
               "batch-size": 24, "dimensions": 8, "precision": "bf16"}  # fmt: skip
    trained = run_tool("pic-train", *options(folders, tmp_path / "run", **changes))
    assert trained.returncode == 0, trained.stderr
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["network"]
    assert all(
        torch.equal(after[f"trunk.{key}"], value)
        for key, value in state.items()
        if not key.startswith("fc.")
    )
    assert after["head.weight"].shape == (8, 3584)
    exported = run_tool("pic-export", tmp_path / "run", "--output", tmp_path / "d.onnx")
    assert exported.returncode == 0, exported.stderr

    # Trained in bfloat16, it is measured as it is exported, in fp32.
    descriptor = load_descriptor(tmp_path / "d.onnx", "cpu")
    size = descriptor.info.input_size
    sources = gather(folders / "catalog", folders / "others", None, tmp_path / "x", size)
    originals = [sources.image(p) for p in sources.of("catalog", "val")]
    known = descriptor.describe(np.stack([to_pixels(p, size) for p in originals]))
    copies = descriptor.describe(np.load(tmp_path / "run" / "parity.npy")[:32])
    with np.load(tmp_path / "run" / "validation.npz") as stored:
        scores = stored["scores"][:32]
    assert np.abs((copies @ known.T).max(axis=1) - scores).max() < 1e-4


def test_a_run_stopped_by_ctrl_c_resumes_to_the_very_same_descriptor(
    folders: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [str(BIN / "pic-train"), *options(folders, out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 1/2"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate()
    assert process.returncode == 130
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    whole, parts = (
        torch.load(folder / "last.pt", weights_only=True)["network"]
        for folder in (finished, out)
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch-size": 47}, "--batch-size 47: .* must be even"),
        ({"train-images": 191}, "--train-images 191: .* must be even"),
        ({"naming": 1}, "--naming goes with --task classify"),
        ({"corrections": "log.db"}, "--corrections goes with --task classify"),
        ({"task": "classify"}, "--dimensions goes with --task describe"),
        (
            {"arch": "resnet50", "weights": "none", "head-start": 8},
            "--head-start goes with --stages 1 or more",
        ),
        ({"weights": "imagenet"}, "no pretrained weights for the cnn"),
        ({"target-fpr": 0.001}, "decoy samples can promise"),
    ],
)
def test_wrong_settings_leave_no_run_folder(
    run_here: Run, folders: Path, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    import re

    out = tmp_path / "run"
    result = run_here("pic-train", *options(folders, out, **changes))
    assert result.returncode == 2
    assert re.search(sentence, result.stderr), result.stderr
    assert not out.exists()


def test_another_precision_than_fp32_is_refused(
    run_here: Run, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "describe.onnx"
    result = run_here("pic-export", finished, "--output", output, "--precision", "int8")
    assert result.returncode == 2
    assert "fp32 only" in result.stderr
    assert not output.exists()


def test_a_classifier_run_is_not_resumed_as_a_descriptor(
    run_here: Run, finished: Path, folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    command = options(folders, out, task="classify")
    del command[command.index("--dimensions") : command.index("--dimensions") + 2]
    result = run_here("pic-train", *command, "--resume")
    assert result.returncode == 2
    assert "was begun with task = 'describe', not 'classify'" in result.stderr
