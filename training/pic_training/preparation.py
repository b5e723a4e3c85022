"""Before the first epoch: the pictures are read, and what cannot end well is refused."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from hashlib import file_digest
from pathlib import Path

import click
import numpy as np

from pic_daemon.corrections import Correction, read_corrections
from pic_daemon.errors import InputError
from pic_daemon.folders import text_of
from pic_daemon.promise import about_support, check_support
from pic_training.run_folder import (
    RunConfig,
    abandon,
    claim_folder,
    held,
    read_json,
    write_json,
    write_manifest,
)
from pic_training.samples import SampleSet
from pic_training.sources import Sources, Split, gather

_FEW = 100  # between the 50 and the 460 that bench/results/first-run.md compares


def prepare(config: RunConfig, folder: Path, resume: bool, leaving: ExitStack) -> Sources:
    """Claim the folder, read the pictures, and refuse what cannot come to an end.

    The folder is held, and the working copies are in it, until `leaving` is left. Raises
    InputError; a folder that this made is gone again then.
    """
    is_made = not folder.exists()
    is_new = claim_folder(config, folder, resume)
    leaving.enter_context(held(folder))
    working_file = folder / "sources.rgb"
    leaving.callback(working_file.unlink, missing_ok=True)
    try:
        if is_new and config.corrections:
            _note_corrections(Path(config.corrections), folder)
        sources = pictures_of(config, folder, working_file)
        say_left_out(sources)
        _say_counts(sources)
        _say_how_often(config, sources)
        _check_halves(config, sources)
        _check_shares(config)
        config.architecture.trunk(config.weights)  # what cannot be had ends it here
        _identify(config, sources, folder, is_new)
    except BaseException:
        if is_new:
            abandon(folder, is_made)
        raise
    return sources


def pictures_of(config: RunConfig, folder: Path, working_file: Path) -> Sources:
    """The pictures of a run, read from where they lie; their copies in `working_file`.

    Corrections are those that stood when the run began.
    """
    return gather(
        Path(config.catalog),
        Path(config.others),
        Path(config.others_val) if config.others_val else None,
        working_file,
        config.architecture.size,
        _corrections(folder) if config.corrections else [],
    )


def _corrections(folder: Path) -> list[Correction]:
    stored = folder / "corrections.json"
    try:
        return [Correction(**fields) for fields in read_json(stored, list)]
    except TypeError as error:
        raise InputError(f"{stored} is damaged: {error}.") from error


def _note_corrections(database: Path, folder: Path) -> None:
    given = read_corrections(database)
    if not given:
        raise InputError(f"nobody corrected a verdict in {database} yet.")
    write_json(folder / "corrections.json", [asdict(correction) for correction in given])


def _identify(config: RunConfig, sources: Sources, folder: Path, is_new: bool) -> None:
    """Write down what the run is made of, or check that it is still made of that."""
    if is_new:
        digests = {"sources": sources.digest, "weights": _weights_digest(config.weights)}
        write_json(folder / "digest.json", digests)
        write_manifest(sources, folder)
        write_json(folder / "config.json", asdict(config))  # by which it can be resumed
        return
    begun = read_json(folder / "digest.json")
    if begun["sources"] != sources.digest:
        raise InputError(
            f"the images changed since {folder} was begun, or are chosen otherwise by this "
            "version; start a new run folder."
        )
    fresh = not (folder / "last.pt").exists()
    if fresh and begun.get("weights") != _weights_digest(config.weights):
        raise InputError(
            f"{config.weights} changed since {folder} was begun; start a new run folder."
        )


def _weights_digest(weights: str) -> str | None:
    if weights in ("none", "imagenet"):
        return None
    with Path(weights).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def samples_of(config: RunConfig, sources: Sources, split: Split) -> SampleSet:
    """The samples that a run draws from one split."""
    count = config.train_images if split == "train" else config.val_images
    copies = 2 if config.task == "describe" and split == "train" else 1
    ranges = config.augmentation
    if split == "train":
        ranges = replace(ranges, crop_area=(config.least_area, ranges.crop_area[1]))
    return SampleSet(
        sources,
        split,
        count,
        config.architecture.size,
        config.seed,
        ranges,
        copies,
    )


def _check_halves(config: RunConfig, sources: Sources) -> None:
    """Refuse now what the report could not promise hours later."""
    samples = samples_of(config, sources, "val")
    is_decoy = np.arange(samples.count) % 2 == 0
    is_test = samples.is_test()
    if not (is_decoy & is_test).any():
        raise InputError(
            "the others held back for validation are one picture or near-duplicates of "
            "one; the threshold needs one to be chosen on and one to be tested on: add "
            "others."
        )
    calibrating = int((is_decoy & ~is_test).sum())
    check_support(calibrating, config.target_fpr, "raise --val-images or --target-fpr")
    drawn = samples.sources_drawn()[is_decoy & ~is_test]
    different = len(np.unique(sources.groups()[drawn]))
    note_support(different, calibrating, config.target_fpr)


def note_support(decoys: int, samples: int, target: float) -> None:
    """Say where so many different decoys support less than their samples do."""
    if note := about_support(decoys, samples, target):
        click.echo(f"note: {note}", err=True)


def _check_shares(config: RunConfig) -> None:
    """Refuse batches with fewer samples than there are processes to share them."""
    last = config.train_images % config.batch_size or config.batch_size
    if last < config.processes:
        raise InputError(
            f"{config.processes} processes cannot share a batch of {last}, the last one "
            "of each epoch: change --train-images or --batch-size."
        )


def say_left_out(sources: Sources) -> None:
    """Name every file that takes no part, and why."""
    for item in sources.left_out:
        click.echo(text_of(f"left out {item.path}: {item.reason}"), err=True)


def _say_counts(sources: Sources) -> None:
    counts = [
        (len(sources.of("catalog", "train")), "catalog images"),
        (len(sources.of("other", "train")), "others to train on"),
        (len(sources.of("other", "val")), "others to validate on"),
        (len(sources.left_out), "files left out"),
    ]
    click.echo(", ".join(f"{count} {name}" for count, name in counts))


def _say_how_often(config: RunConfig, sources: Sources) -> None:
    catalog = len(sources.of("catalog", "train"))
    shown = config.train_images * config.epochs / 2 / catalog  # the other half are decoys
    from_nothing = config.task == "classify" and config.weights == "none"
    if from_nothing and shown < _FEW:
        click.echo(
            f"note: the run shows each catalog image only some {shown:.3g} times: raise "
            f"--train-images or --epochs until it is {_FEW} or more",
            err=True,
        )
