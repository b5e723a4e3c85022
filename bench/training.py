"""The published protocol at any scale: train, export, and print the figures as Markdown.

    python bench/training.py --data DIR --decoys general --work DIR [-- pic-train options]

DIR holds catalog/, others/train/ and others/val/ (or other/); `--decoys` chooses which
of the others take part, told apart by the prefix of their file names. An interrupted
run goes on when `--resume` is among the options after the double dash.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from pic_daemon.promise import Floats, Labels
from pic_training.augmentation import Augmentation
from pic_training.networks import Normalised
from pic_training.preparation import pictures_of, samples_of
from pic_training.run_folder import RunConfig, load_network
from pic_training.samples import SampleSet
from pic_training.sources import Sources, Split
from pic_training.threshold import Calibration, fit_calibration

GENERAL = ("caltech", "flowers", "urban", "plasma", "drone")
BIN = Path(sys.executable).parent


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--decoys", type=click.Choice(["general", "look-alike", "all"]), required=True
)
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(data: Path, decoys: str, work: Path, options: tuple[str, ...]) -> None:
    others = data / ("others" if (data / "others").exists() else "other")
    for split in ("train", "val"):
        choose(others / split, work / f"others-{split}", decoys)
    run = work / "run"
    command = [BIN / "pic-train", "--catalog", data / "catalog", "--out", run]
    command += ["--others", work / "others-train", "--others-val", work / "others-val"]
    started = time.monotonic()
    call(*command, *options)
    minutes = (time.monotonic() - started) / 60
    call(BIN / "pic-export", run, "--output", work / "model.onnx")
    print_figures(run, minutes)
    print_known(run)
    if decoys == "all":
        print_kinds(run)


def choose(folder: Path, to: Path, decoys: str) -> None:
    """Copy the pictures of the wanted kind into a folder of their own."""
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        general = path.name.startswith(GENERAL)
        copy = to / path.name
        if decoys != "all" and general != (decoys == "general"):
            copy.unlink(missing_ok=True)  # of an earlier choice
        elif not copy.exists():
            copy.write_bytes(path.read_bytes())


def call(*command: object) -> None:
    result = subprocess.run([str(part) for part in command])
    if result.returncode:
        sys.exit(result.returncode)


def print_figures(run: Path, minutes: float) -> None:
    epochs = json.loads((run / "metrics.json").read_text())
    report = json.loads((run / "report.json").read_text())
    print("\n| epoch | training loss | accuracy | validation loss | accuracy "
          "| images/s | in the network |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for e in epochs:
        print(
            f"| {e['epoch']} | {e['train_loss']:.4f} | {e['train_accuracy']:.2%} | "
            f"{e['val_loss']:.4f} | {e['val_accuracy']:.2%} | "
            f"{e['images_per_second']:.0f} | {e['network_share']:.0%} |"
        )
    print(f"\nAt the threshold for a false positive rate of {report['target_fpr']:g}:\n")
    for name in ("accuracy", "precision", "recall", "false_positive_rate"):
        share = report[name]
        interval = f"95% {share['low']:.3%} to {share['high']:.3%}"
        print(f"- {name}: {share['value']:.3%} ({interval})")
    right = [report[f"{kind}_{truth}"] for kind, truth in
             (("true", "positive"), ("false", "negative"),
              ("false", "positive"), ("true", "negative"))]  # fmt: skip
    print("\n| | called catalog | called other |\n|---|---|---|")
    print(f"| catalog | {right[0]} | {right[1]} |\n| other | {right[2]} | {right[3]} |")
    error, calibrated = report["calibration_error"], report["calibrated"]
    print(
        f"\nCalibration error {error['before']:.4f}, {error['after']:.4f} after dividing "
        f"the logits by {report['temperature']:.3f} and adding {report['bias']:.3f}; then "
        f"accuracy {calibrated['accuracy']['value']:.2%} at one half, loss "
        f"{calibrated['loss']:.4f}."
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\n{minutes:.0f} minutes, {report['device']}, {os.cpu_count()} cores; largest "
        f"process {peak:.1f} GiB; {json.dumps(report['versions'])}"
    )


def print_known(run: Path) -> None:
    """As many new samples of the very pictures trained on, decoys included, as there were
    for validation: what a split by augmented file, not by picture, would have shown."""
    config, network = load_network(run)
    plain = replace(config.augmentation, variety=False)
    with gathered(config, run) as sources:
        calibration = calibrated(config, run, sources)
        known = asked(config, network, calibration, sources, "train", plain)
    print(f"\nNew samples of pictures that were trained on: {known}")


def print_kinds(run: Path) -> None:
    """The validation's figures against each kind of decoys alone; both classes weigh the
    same. Calibrated by all kinds together, on the test half of the pictures."""
    config, _ = load_network(run)
    with gathered(config, run) as sources:
        val = samples_of(config, sources, "val")
        drawn, test = val.sources_drawn(), val.is_test()
        calibration = calibrated(config, run, sources)
    kept = np.load(run / "validation.npz")
    logits, labels = np.maximum(kept["scores"], kept["within"]), kept["labels"] > 0
    names = [Path(source.path).name for source in sources.pictures]
    general = np.array([name.startswith(GENERAL) for name in names])[drawn]
    print("\n| | accuracy | loss | calibrated: accuracy | loss | recall at 0.1 | at 0.01 "
          "| at 0.001 |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, of in (("general", general), ("look-alike", ~general)):
        figures = [
            (logits, labels, labels | of),
            (calibration(logits), labels, test & (labels | of)),
        ]
        shown = [balanced(x[part], y[part]) for x, y, part in figures]
        cells = [f"{accuracy:.2%} | {loss:.4f}" for accuracy, loss in shown]
        for rate in (0.1, 0.01, 0.001):
            threshold = np.quantile(logits[~labels & of], 1 - rate)
            cells.append(f"{(logits[labels] > threshold).mean():.1%}")
        print(f"| {name} | {' | '.join(cells)} |")


def calibrated(config: RunConfig, run: Path, sources: Sources) -> Calibration:
    """The calibration of a finished run, as its report has it."""
    kept = np.load(run / "validation.npz")
    fitted = ~samples_of(config, sources, "val").is_test()
    scores = np.maximum(kept["scores"], kept["within"])
    return fit_calibration(scores[fitted], kept["labels"][fitted] > 0)


def balanced(logits: Floats, labels: Labels) -> tuple[float, float]:
    """Accuracy at one half and log loss, each the mean of what the two classes have."""
    classes = [logits[labels], -logits[~labels]]
    accuracy = np.mean([(signed > 0).mean() for signed in classes])
    loss = np.mean([np.logaddexp(0, -signed).mean() for signed in classes])
    return float(accuracy), float(loss)


@contextmanager
def gathered(config: RunConfig, run: Path) -> Iterator[Sources]:
    """The pictures of a finished run, read again from where they lay."""
    with TemporaryDirectory() as folder:
        yield pictures_of(config, run, Path(folder) / "sources.rgb")


def asked(
    config: RunConfig, network: Normalised, calibration: Calibration, sources: Sources,
    split: Split, augmentation: Augmentation,
) -> str:  # fmt: skip
    """The network asked about as many samples as the run had for validation, of pictures
    trained on in an epoch that it never came to: accuracy at one half, by class as well,
    and loss, as it is and calibrated, without the second look."""
    size = config.architecture.size
    samples = SampleSet(
        sources, split, config.val_images, size, config.seed, augmentation
    )  # fmt: skip
    outputs, labels = [], []
    with torch.no_grad():
        for images, some in samples.load(config.epochs + 1, 128, os.cpu_count() or 1):
            outputs.append(network(images))
            labels.append(some > 0)
    logits, truth = torch.cat(outputs), torch.cat(labels)
    said = []
    for name, some in (("", logits), ("; calibrated: ", calibration(logits))):
        loss = binary_cross_entropy_with_logits(some, truth.float())
        right = ((some > 0) == truth).float()
        said.append(
            f"{name}accuracy {right.mean():.3%} (catalog {right[truth].mean():.3%}, "
            f"decoys {right[~truth].mean():.3%}), loss {loss:.5f}"
        )
    return "".join(said)


if __name__ == "__main__":
    main()
