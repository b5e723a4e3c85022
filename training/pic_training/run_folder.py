"""What a run folder holds, and writing it so that no file is ever half there."""

import csv
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TextIO
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from pic_daemon.errors import InputError
from pic_daemon.images import Pixels
from pic_training.augmentation import Augmentation
from pic_training.networks import (
    ARCHITECTURES,
    DESCRIBERS,
    Architecture,
    Describer,
    Normalised,
    Recogniser,
)
from pic_training.sources import Sources, digest_of

PARITY_SAMPLES = 256
"""Validation samples by which an exported file is proved to see what PyTorch sees."""

_PARITY = "parity.npy"
_VALIDATION = "validation.npz"
_RESTORE = "restore it, or train again in a new folder."


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run; stored as config.json.

    `head_start` samples fit the head alone first; then the last `stages` stages of
    the trunk are trained with it. `processes` share every batch. `corrections`: the
    match log whose corrected pictures take part, as corrections.json names them. A run
    that learns to ``describe`` ends in vectors of `dimensions` numbers. `naming` weighs
    telling the catalog's pictures apart: for each of its samples, that many times the
    cross-entropy is learned from besides. A resnet8 is then a Recogniser. Samples to train
    on are cropped to the share `least_area` of a picture's area or more, instead of what
    `augmentation` says, which measures.
    """

    catalog: str
    others: str
    others_val: str | None
    arch: str
    weights: str
    epochs: int
    train_images: int
    val_images: int
    batch_size: int
    lr: float
    momentum: float
    head_start: int
    stages: int
    seed: int
    device: str
    precision: str
    target_fpr: float
    processes: int = 1
    corrections: str | None = None
    task: Literal["classify", "describe"] = "classify"
    dimensions: int = 1
    naming: float = 0.0
    least_area: float = 0.5
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def architecture(self) -> Architecture:
        """The network's fixed properties, for this task."""
        return (DESCRIBERS if self.task == "describe" else ARCHITECTURES)[self.arch]

    @property
    def keeps_features(self) -> bool:
        """Whether only the head is trained, on features that are computed but once."""
        return (
            self.task == "describe" and bool(self.architecture.stages) and not self.stages
        )


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.csv. Losses are mean cross-entropies in nats.

    Accuracy is of the decision at one half where the run classifies. Where it
    describes, it is the share of samples whose nearest neighbour is a copy of the same
    picture: in the batch for training, among the catalog's originals for validation.
    `val_calibrated_loss` is the validation loss of the samples that calibrate after the
    calibration that makes it least; describing, it is their loss as it is.

    `network_share` of the training seconds went by in the network, the rest waiting
    for samples; on a GPU that makes its own, for the pictures that it makes them from.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    val_calibrated_loss: float
    seconds: float
    images_per_second: float
    val_seconds: float
    network_share: float


def best_of(history: Sequence[EpochMetrics]) -> EpochMetrics:
    """The epoch whose network is kept: the first with the least calibrated loss.

    A network that is sure of too much is not worse for it: its calibration mends that.
    """
    return min(history, key=lambda m: m.val_calibrated_loss)


_WORKING = {"sources.tmp", "sources.rgb"}
_BEFORE_CONFIG = {"corrections.json", "digest.json", "manifest.csv", "left_out.csv"}
"""Files of a run folder that has no config.json yet."""


def absolute(weights: str) -> str:
    """Where the weights are, whatever folder a run is resumed from."""
    is_file = weights not in ("none", "imagenet")
    return str(Path(weights).absolute()) if is_file else weights


def altered_otherwise(folder: Path) -> str:
    """What to say of a run that would go on with other samples."""
    return (
        f"{folder} was begun by a version that altered its samples otherwise; "
        "finish it with that version, or start again in a new folder."
    )


def claim_folder(config: RunConfig, folder: Path, resume: bool) -> bool:
    """Take an empty folder for a new run, or check that the one there is this run.

    Returns whether the run is new. Raises InputError where the folder holds another.
    """
    stored = folder / "config.json"
    if resume:
        if not stored.exists():
            raise InputError(f"{folder} holds no run to resume; begin it without --resume.")
        before = read_json(stored)
        before["weights"] = absolute(str(before["weights"]))  # once kept as it was given
        # A run begun before there was an option went by its default.
        for option in fields(RunConfig):
            if option.default is not MISSING:
                before.setdefault(option.name, option.default)
        now = json.loads(json.dumps(asdict(config)))
        changed = [key for key in now if before[key] != now[key]]
        if changed == ["augmentation"]:  # no option: versions differ in it
            raise InputError(altered_otherwise(folder))
        if changed:
            # First what others follow from, and what somebody gives.
            key = min(changed, key=lambda key: key not in ("task", "arch", "weights"))
            raise InputError(
                f"{folder} was begun with {key} = {before[key]!r}, not "
                f"{now[key]!r}; resume with the same settings."
            )
        return False
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not _was_killed_early(folder):
        what = "another run" if stored.exists() else "other files"
        raise InputError(
            f"{folder} already holds {what}; name a new folder or add --resume."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}.") from error
    return True


def _was_killed_early(folder: Path) -> bool:
    """Whether all that a folder holds is what a run left that was killed while it read its
    pictures; not where that run may be at work."""
    if not folder.is_dir():
        return False
    left = {path.name for path in folder.iterdir()}
    begun = {name.removesuffix(".tmp") for name in left - _WORKING}
    if not left & _WORKING or not begun <= _BEFORE_CONFIG:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; raises InputError where one is at work in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"another pic-train is at work in {folder}; wait for it, or name a new folder."
        ) from error
    except OSError:  # a file system that locks no folders goes without
        pass
    try:
        yield
    finally:
        os.close(handle)


def abandon(folder: Path, made: bool) -> None:
    """Remove what a run that could not begin has written, and a folder `made` for it."""
    for path in folder.iterdir():
        path.unlink()
    if made:
        with suppress(OSError):
            folder.rmdir()


def load_network(folder: Path) -> tuple[RunConfig, Normalised]:
    """The settings and the trained network of a run folder, on the CPU, ready to score.

    Raises InputError where the folder holds no finished epoch.
    """
    for needed in ("config.json", "best.pt"):
        if not os.path.exists(folder / needed):
            raise InputError(
                f"{folder} holds no finished epoch ({needed} is missing); train first "
                "with pic-train, or restore it."
            )
    stored = read_json(folder / "config.json")
    try:
        # Of an earlier version: how far decoys to train on were cropped, and no others.
        stored["augmentation"].pop("decoy_area", None)
        ranges: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in stored.pop("augmentation").items()
        }
        config = RunConfig(**stored, augmentation=Augmentation(**ranges))
        _ = config.architecture  # a KeyError where this version knows no such one
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not a run folder of pic-train: {error}.") from error
    path = folder / "best.pt"
    state = load_checkpoint(path, torch.device("cpu"))
    try:
        items = len(state["network"]["head.weight"])
    except (KeyError, TypeError) as error:
        raise InputError(another_version(path)) from error
    network = new_network(config, "none", items)
    fill(network, state["network"], path)
    return config, network.eval()


def fill(network: Normalised, state: dict[str, Any], path: Path) -> None:
    """Give a network the weights of a checkpoint; raises InputError where it is another."""
    try:
        network.load_state_dict(state)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InputError(another_version(path)) from error


def another_version(path: Path) -> str:
    """What to say of a checkpoint that this version cannot go on from."""
    return (
        f"the checkpoint {path} is of a version whose network was another: train "
        "again in a new folder."
    )


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What a checkpoint holds, by name, the weights as "network"; raises InputError where
    it is damaged or another file."""
    try:
        state: dict[str, Any] = torch.load(path, device, weights_only=True)
        if not isinstance(state["network"], dict):
            raise TypeError
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever PyTorch makes of bytes that are none of its own
        raise InputError(f"the checkpoint {path} is damaged; {_RESTORE}") from error
    return state


def load_validation(folder: Path, count: int) -> dict[str, NDArray[Any]]:
    """What the best epoch made of the run's `count` validation samples.

    `scores`, `right` and `labels` of shape (count,), as `Judged` has them, and `within`,
    as `scores`: of the samples within their margins. It is `scores` where a run describes,
    has not come to its end, or is of a version without. Raises InputError where the file
    is damaged.
    """
    path = folder / _VALIDATION
    try:
        with np.load(path) as stored:
            found = {name: stored[name] for name in ("scores", "right", "labels")}
            found["within"] = stored["within"] if "within" in stored else found["scores"]
    except (OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile) as error:
        raise InputError(f"{path} is missing or damaged ({error}); {_RESTORE}") from error
    if any(values.shape != (count,) for values in found.values()):
        raise InputError(f"{path} is damaged (not of {count} samples); {_RESTORE}")
    return found


def save_validation(folder: Path, **values: NDArray[Any]) -> None:
    """Write what `load_validation` reads."""
    with replacing(folder / _VALIDATION) as path, path.open("wb") as file:
        np.savez(file, **values)  # type: ignore[arg-type]


def load_parity(folder: Path, size: int) -> Pixels:
    """The samples of `save_parity`, of that side; raises InputError where they are none."""
    path = folder / _PARITY
    try:
        images = np.load(path)
        if images.dtype != np.uint8 or images.shape != (PARITY_SAMPLES, size, size, 3):
            raise ValueError(f"{images.shape} of {images.dtype}")
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise InputError(f"{path} is missing or damaged ({error}); {_RESTORE}") from error
    return np.asarray(images)


def has_parity(folder: Path) -> bool:
    """Whether `save_parity` has been called for a run."""
    return (folder / _PARITY).exists()


def save_parity(folder: Path, images: Pixels) -> None:
    """Write the first of the validation samples, uint8, shape (N, size, size, 3)."""
    with replacing(folder / _PARITY) as path, path.open("wb") as file:
        np.save(file, images[:PARITY_SAMPLES])


def new_network(config: RunConfig, weights: str, items: int) -> Normalised:
    """The network of a run before its training; `items` pictures are in its catalog."""
    if config.task == "describe":
        return Describer(config.architecture, weights, config.dimensions)
    if config.architecture.prototypes and config.naming:
        return Recogniser(config.architecture, weights, items)
    return Normalised(config.architecture, weights)


def write_metrics(history: list[EpochMetrics], folder: Path) -> None:
    """Write metrics.csv and metrics.json, one entry per epoch."""
    rows = [asdict(m) for m in history]
    write_json(folder / "metrics.json", rows)
    with (
        replacing(folder / "metrics.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_manifest(sources: Sources, folder: Path) -> None:
    """Write manifest.csv and left_out.csv into `folder`."""
    columns = ["path", "sha256", "kind", "split", "group", "stored_width", "stored_height"]
    rows = [[getattr(p, c) for c in columns] for p in sources.pictures]
    _write_table(folder / "manifest.csv", columns, rows)
    left_out = [[item.path, item.reason] for item in sources.left_out]
    _write_table(folder / "left_out.csv", ["path", "reason"], left_out)


def read_manifest(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every picture of a run; raises InputError where it is none, and
    where it names others than were trained on, as one that was cut off does."""
    try:
        with _table(folder / "manifest.csv", "r") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("its manifest.csv names no picture")
        digest = digest_of((row["sha256"], row["kind"], row["split"]) for row in rows)
        if digest != read_json(folder / "digest.json")["sources"]:
            raise ValueError("its manifest.csv is cut off, or of another run")
        return {row["path"]: row["sha256"] for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{folder} is not a run folder of pic-train: {error}.") from error


def _write_table(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    with replacing(path) as temporary, _table(temporary, "w") as file:
        csv.writer(file).writerows([columns, *rows])


def _table(path: Path, mode: Literal["r", "w"]) -> TextIO:
    # So that every name is found again, whether it is UTF-8 or not.
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


class _Stored(dict[str, Any]):
    """An object of a JSON file; to ask for what it lacks raises InputError."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.path} is damaged (it lacks {key!r}); {_RESTORE}")


def read_json(path: Path, kind: type[dict[str, Any] | list[Any]] = dict) -> Any:
    """The object, or other `kind` of value, in a JSON file of a run folder.

    Raises InputError where the file is missing, unreadable or damaged, and where one of its
    objects is asked for a key that it lacks.
    """

    def stored(pairs: list[tuple[str, Any]]) -> _Stored:
        made = _Stored(pairs)
        made.path = path
        return made

    try:
        value = json.loads(path.read_text(), object_pairs_hook=stored)
        if not isinstance(value, kind):
            raise ValueError(f"no {'object' if kind is dict else 'list'} in it")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {_RESTORE}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {_RESTORE}") from error
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` once it is written in full, on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
