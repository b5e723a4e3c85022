"""The commands of the box that trains: pic-train, pic-export and pic-evaluate."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pic_daemon.errors import InputError
from pic_daemon.folders import text_of
from pic_daemon.options import FiniteRange, Place
from pic_training.process import (
    cores,
    heed_sigterm,
    prepare_for_training,
    told_by_torchrun,
)

if TYPE_CHECKING:
    from pic_training.run_folder import RunConfig

# PyTorch is imported where it is needed: help should not wait for it.

_FILE = Place()
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_SEED = click.IntRange(0, 2**32 - 1)
_RATE = FiniteRange(1e-9, 1, max_open=True)  # no folder holds more decoys than that takes


@click.command()
@click.version_option(package_name="product-image-classifier")
@click.option("--catalog", required=True, type=_FOLDER, help="Your product images.")
@click.option(
    "--others",
    required=True,
    type=_FOLDER,
    help="Images that are not yours, best of the kinds people will drop.",
)
@click.option(
    "--others-val",
    type=_FOLDER,
    help="Others to validate on [a fifth of --others, by content hash].",
)
@click.option(
    "--corrections",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="DATABASE",
    help="Match log: its pictures marked as ours join the catalog, not ours the others.",
)
@click.option(
    "--out",
    required=True,
    type=_FILE,
    metavar="RUN_DIR",
    help="New folder for checkpoints, metrics and report.",
)
@click.option(
    "--task",
    type=click.Choice(["classify", "describe"]),
    default="classify",
    show_default=True,
    help="classify: is it from the catalog? describe: a vector by which to find which "
    "of its pictures it is.",
)
@click.option(
    "--arch",
    type=click.Choice(["cnn", "resnet8", "resnet50"]),
    help="The cnn is the published one  [classify resnet8; describe cnn].",
)
@click.option(
    "--dimensions",
    type=click.IntRange(2, 2048),
    help="Numbers in the vector that describes a picture [256].",
)
@click.option(
    "--weights",
    metavar="imagenet|none|FILE",
    help="Where the resnet50 starts from [imagenet].",
)
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--train-images", type=click.IntRange(2), default=185_000, show_default=True)
@click.option("--val-images", type=click.IntRange(256), default=30_000, show_default=True)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="[classify 32, resnet8 64; describe: cnn 256, resnet50 128, on kept features "
    "1024]",
)
@click.option(
    "--lr",
    type=FiniteRange(0, min_open=True),
    help="At the start; falls to zero along a half cosine [classify: cnn and resnet8 0.05, "
    "resnet50 0.001, from no weights 0.01, after a head start 0.0001; describe: cnn 0.001, "
    "resnet50 0.0001].",
)
@click.option(
    "--target-fpr",
    type=_RATE,
    default=0.001,
    show_default=True,
    help="False positive rate that the threshold is chosen for.",
)
@click.option(
    "--head-start",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="SAMPLES",
    help="Fit the head alone on so many samples first, the trunk left as it is.",
)
@click.option(
    "--stages",
    type=click.IntRange(0, 5),
    help="Last stages of the resnet50's trunk to train, the others left as they are "
    "[classify 5; describe 0: its features are computed once and kept].",
)
@click.option(
    "--naming",
    type=FiniteRange(0),
    metavar="WEIGHT",
    help="Learn besides to tell the catalog's pictures apart; a resnet8 then recognises "
    "them one by one  [resnet8 1, else 0].",
)
@click.option(
    "--least-area",
    type=FiniteRange(0.01, 1),
    default=0.5,
    show_default=True,
    help="Least share of its area that a picture to train on is cropped to; where samples "
    "measure it is 0.5.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the training steps; auto takes bf16 where the device computes in it.",
)
@click.option(
    "--workers", type=click.IntRange(0), help="Processes that augment [one a core]."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted RUN_DIR.")
def train(out: Path, workers: int | None, resume: bool, **options: Any) -> None:
    """Train a network that tells your catalog's images from all others.

    With --task describe it learns instead to give copies of one picture nearly the
    same vector, and any other picture another.

    Every sample is a picture cropped to 50-100% of its area, resized to 48-256
    pixels and compressed to JPEG quality 10-95, each with probability 0.8, alike for
    catalog and others. Others to train a classifier on are besides mirrored,
    recoloured and bent, each channel by a gamma of its own. Ctrl-C leaves a checkpoint
    for --resume.

    Example: pic-train --catalog products --others photos --out runs/first
    """
    _need_the_train_extra()
    prepare_for_training()
    heed_sigterm()
    from pic_training.report import doubt, summary, write_report
    from pic_training.training import Interrupted, run_training

    config = _config(**options | (_as_begun(out, options) if resume else {}))
    _check_place(out, config)
    if workers is None:
        workers = cores()
    try:
        result = run_training(config, out, workers, resume)
    except Interrupted:
        anew = "; features are computed anew" if config.keeps_features else ""
        click.echo(f"interrupted; the same command with --resume goes on{anew}", err=True)
        sys.exit(130)
    if result is None:  # one of torchrun's processes, but not the first
        return
    try:
        report = write_report(result, config, out)
    except OSError as error:
        raise InputError(
            f"{out}: {error.strerror or error}. All epochs are done: make room, and the "
            "same command with --resume writes the report."
        ) from error
    click.echo(summary(report))
    if noted := doubt(report):
        click.echo(f"note: {noted}", err=True)
    click.echo(text_of(f"report: {out / 'report.json'}"))


def _as_begun(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a run was begun with where the options leave it to a default, which may have
    changed since."""
    from pic_training.networks import ARCHITECTURES
    from pic_training.run_folder import read_json

    stored = out / "config.json"
    try:
        if not stored.exists():
            return {}
    except OSError as error:
        raise InputError(f"--out {out} cannot be read: {error.strerror}.") from error
    begun = read_json(stored)
    if begun["arch"] not in ARCHITECTURES:
        raise InputError(f"{stored}: this version knows no arch {begun['arch']!r}.")
    begun.setdefault("naming", 0.0)
    return {name: begun[name] for name in ("arch", "naming", "lr") if options[name] is None}


def _check_place(out: Path, config: "RunConfig") -> None:
    """Refuse a run folder whose own pictures the next run would take for yours."""
    try:
        place = out.resolve()
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise InputError(f"--out {out} cannot be followed: {error}.") from error
    for folder in (config.catalog, config.others, config.others_val):
        if folder and Path(folder).resolve() in (place, *place.parents):
            raise InputError(
                f"--out {out} lies in {folder}, whose pictures are trained on, and would "
                "get a plot of its own: choose a place outside."
            )


def _need_the_train_extra() -> None:
    missing = [p for p in ("torch", "torchvision", "onnx", "matplotlib", "imagehash")
               if find_spec(p) is None]  # fmt: skip
    if missing:
        raise InputError(
            f"training needs {', '.join(missing)}, which the base install leaves out: "
            "pip install '.[train]' in this project's folder."
        )


def _config(**options: Any) -> "RunConfig":
    import torch

    from pic_training.networks import ARCHITECTURES, DESCRIBERS
    from pic_training.run_folder import RunConfig, absolute

    describes = options["task"] == "describe"
    arch = options["arch"] or ("cnn" if describes else "resnet8")
    if describes and arch not in DESCRIBERS:
        raise InputError(f"--task describe: a {arch} does not learn it.")
    architecture = (DESCRIBERS if describes else ARCHITECTURES)[arch]
    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here.")
    precision = options["precision"]
    if precision == "auto":
        precision = "bf16" if _computes_in_bf16(device) else "fp32"
    weights = options["weights"]
    if weights is None:
        weights = "imagenet" if arch == "resnet50" else "none"
    paths = {k: str(options[k].absolute()) if options[k] else None
             for k in ("catalog", "others", "others_val", "corrections")}  # fmt: skip
    stages = _stages(arch, options["stages"], 0 if describes else None)
    batch = 1024 if describes and architecture.stages and not stages else None
    if not describes and options["dimensions"]:
        raise InputError("--dimensions goes with --task describe.")
    learned_lr = architecture.learned_lr if weights != "none" else None
    fitted_lr = architecture.fitted_lr if options["head_start"] else None
    naming = options["naming"]
    config = RunConfig(
        **paths,  # type: ignore[arg-type]
        arch=arch,
        weights=absolute(weights),
        epochs=options["epochs"],
        train_images=options["train_images"],
        val_images=options["val_images"],
        batch_size=options["batch_size"] or batch or architecture.batch_size,
        lr=options["lr"] or fitted_lr or learned_lr or architecture.lr,
        momentum=architecture.momentum,
        head_start=options["head_start"],
        stages=stages,
        seed=options["seed"],
        device=device,
        precision=precision,
        target_fpr=options["target_fpr"],
        processes=told_by_torchrun("WORLD_SIZE", 1),
        task=options["task"],
        dimensions=(options["dimensions"] or 256) if describes else 1,
        naming=float(architecture.prototypes) if naming is None else naming,
        least_area=options["least_area"],
    )
    if config.head_start and architecture.prototypes and config.naming:
        raise InputError(
            "--head-start fits a head of one number: a resnet8 has that with --naming 0."
        )
    if config.naming and architecture.stages and not stages:
        raise InputError(
            "--naming with --stages 0 would teach nothing that is exported: train a stage."
        )
    if describes:
        _check_description(config)
    return config


def _check_description(config: "RunConfig") -> None:
    if config.corrections:
        raise InputError(
            "--corrections goes with --task classify: a copy that somebody called ours "
            "would be taught as another picture than its original."
        )
    if config.naming:
        raise InputError(
            "--naming goes with --task classify: to describe is to tell apart."
        )
    for name in ("train_images", "batch_size"):
        if getattr(config, name) % 2:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} {getattr(config, name)}: to describe is learned from two "
                "copies of each picture, so it must be even."
            )
    if config.processes > 1:
        raise InputError(
            "--task describe trains in one process: a copy is told from the whole batch."
        )
    if config.head_start and config.dimensions > config.architecture.features:
        raise InputError(
            f"--dimensions {config.dimensions}: a head start can give a {config.arch} "
            f"{config.architecture.features} at most."
        )
    if config.keeps_features and config.head_start:
        raise InputError(
            "--head-start goes with --stages 1 or more: with none the head is fitted "
            "on all samples anyway."
        )


def _stages(arch: str, wanted: int | None, default: int | None) -> int:
    from pic_training.networks import ARCHITECTURES

    stages = len(ARCHITECTURES[arch].stages)
    if wanted is None:
        return stages if default is None else default
    if wanted > stages or not stages:
        raise InputError(f"--stages {wanted}: the {arch} is trained as a whole.")
    return wanted


def _computes_in_bf16(device: str) -> bool:
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without AVX-512 BF16 a CPU only emulates it, slower than fp32.
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


@click.command()
@click.version_option(package_name="product-image-classifier")
@click.argument("run_dir", type=_FOLDER)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The ONNX file to write.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="int8 is about twice as fast on a CPU, fp16 for GPUs; both get a threshold of "
    "their own, chosen as the run's was, from its pictures.",
)
@click.option(
    "--max-loss",
    type=FiniteRange(0, 1),
    default=0.02,
    show_default=True,
    help="Refuse a precision in which recall or accuracy falls by more.",
)
def export(run_dir: Path, output: Path, precision: Any, max_loss: float) -> None:
    """Write the best network of RUN_DIR as one ONNX file, checked against PyTorch.

    Example: pic-export runs/first --output model.onnx
    """
    _need_the_train_extra()
    heed_sigterm()
    from pic_training.export import export_run

    parity, cost = export_run(run_dir, output, precision, max_loss)
    before = "before its conversion " if cost else ""
    click.echo(
        f"{text_of(str(output))}: {output.stat().st_size:,} bytes; {before}"
        f"{parity.samples} real samples {parity.verb} as in PyTorch, largest difference "
        f"{parity.max_difference:.1e}, no decision flipped"
    )
    if cost:
        click.echo(f"{precision} against fp32, on the run's test pictures: {cost}")


@click.command()
@click.version_option(package_name="product-image-classifier")
@click.argument("model_file", type=_FILE, metavar="MODEL.onnx")
@click.option("--catalog", required=True, type=_FOLDER, help="Your product images.")
@click.option(
    "--others",
    required=True,
    type=_FOLDER,
    help="Images that are not yours and that the model was not trained on.",
)
@click.option(
    "--general",
    multiple=True,
    metavar="PREFIX",
    help="Others whose names begin so are general pictures, the rest look-alikes; "
    "may be repeated.",
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    type=_FOLDER,
    metavar="RUN_DIR",
    help="Leave out every one of the others that this run has seen; may be repeated.",
)
@click.option("--describe", type=_FILE, help="A descriptor, measured with --index.")
@click.option(
    "--index",
    type=_FILE,
    help="The index that it made of the catalog; its threshold must have been chosen on "
    "other pictures than --others.",
)
@click.option(
    "--gate-threshold",
    type=FiniteRange(0, 1),
    help="Score from which on they decide [as the model says].",
)
@click.option(
    "--target-fpr",
    type=_RATE,
    default=0.001,
    show_default=True,
)
@click.option("--per-edit", type=click.IntRange(1), default=200, show_default=True,
              help="Catalog pictures for each edit.")  # fmt: skip
@click.option("--per-decoy", type=click.IntRange(1), default=15, show_default=True,
              help="Edits of each look-alike.")  # fmt: skip
@click.option("--published", type=click.IntRange(2), default=4000, show_default=True,
              help="Samples of the published protocol.")  # fmt: skip
@click.option("--seed", type=_SEED, default=0, show_default=True)
@click.option(
    "--output", required=True, type=_FILE, help="Folder for evaluation.json and .html."
)
def evaluate(
    model_file: Path,
    catalog: Path,
    others: Path,
    general: tuple[str, ...],
    runs: tuple[Path, ...],
    describe: Path | None,
    index: Path | None,
    output: Path,
    **plan: Any,
) -> None:
    """Measure a model beside perceptual hashes, against look-alikes, edit by edit.

    Edits are made on copies of at most 256 pixels (or twice what the model sees).

    Example: pic-evaluate model.onnx --catalog products --others strangers --output report
    """
    _need_the_train_extra()
    heed_sigterm()
    from pic_training.evaluation_run import run_evaluation

    if bool(describe) != bool(index):
        raise click.UsageError("--describe and --index go together.")
    if plan["gate_threshold"] is not None and not index:
        raise click.UsageError("--gate-threshold goes with --describe and --index.")
    cascade = (describe, index) if describe and index else None
    run_evaluation(model_file, catalog, others, general, runs, output, cascade, plan)
